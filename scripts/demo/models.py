"""The demo's models: sizes, and how they are written as ordinary diffusers folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_tiny

TEXT_LENGTH = 12  # tokens: begin, at most ten words, end
LATENT = 8  # latents a side: four pixels each

# v-prediction with a schedule that ends in pure noise: with the customary one, the first step
# still sees a trace of the picture's mean in training and none when it edits.
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
_UNET: dict[str, Any] = {
    "sample_size": LATENT,
    "out_channels": 4,
    "layers_per_block": 1,
    # Attention where a latent is a tile and convolution where it is a quarter of one.
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
_VAE: dict[str, Any] = {
    "sample_size": world.SIZE,
    "latent_channels": 4,
    "block_out_channels": (8, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_LENGTH,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def words() -> str:
    """Return every word of the world's captions and instructions."""
    kinds = (kind.name for kind in world.KINDS)
    return " ".join(
        sorted({*world.SKIES, *world.GROUNDS, *kinds, *" ".join(world.INSTRUCTIONS).split()})
    )


def make_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """Write the tokenizer, every word of the world one token, and load it."""
    make_tiny.write_tokenizer(folder, words(), TEXT_LENGTH, merge_count=1000)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def make_vae() -> diffusers.AutoencoderKL:
    """Build the autoencoder: 32 px to 8 x 8 latents."""
    return diffusers.AutoencoderKL(**_VAE)


def make_text_encoder(vocab_size: int) -> transformers.CLIPTextModel:
    """Build the text encoder."""
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**_TEXT, vocab_size=vocab_size))


def make_unet(in_channels: int, widths: tuple[int, int]) -> diffusers.UNet2DConditionModel:
    """Build a denoiser: 4 input channels for text-to-image, 8 for editing."""
    sizes = {"in_channels": in_channels, "block_out_channels": widths}
    return diffusers.UNet2DConditionModel(**(_UNET | sizes))


def cut_image_channels(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an 8-channel denoiser's weights without the four channels of the source picture."""
    return state | {"conv_in.weight": state["conv_in.weight"][:, :4].clone()}


def to_latents(
    vae: diffusers.AutoencoderKL, pictures: np.ndarray, batch: int = 256
) -> torch.Tensor:
    """Encode pictures `(n, 32, 32, 3)` to the modes of their latents `(n, 4, 8, 8)`, unscaled."""
    device = next(vae.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pictures), batch):
            images = torch.from_numpy(pictures[start : start + batch]).permute(0, 3, 1, 2)
            parts.append(vae.encode(images.to(device) * 2 - 1).latent_dist.mode())
    return torch.cat(parts).clone()


def to_pictures(
    vae: diffusers.AutoencoderKL, latents: torch.Tensor, batch: int = 256
) -> np.ndarray:
    """Decode unscaled latents `(n, 4, 8, 8)` to pictures `(n, 32, 32, 3)`, values in 0 to 1."""
    with torch.inference_mode():
        parts = [
            vae.decode(latents[start : start + batch]).sample.cpu()
            for start in range(0, len(latents), batch)
        ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def embed(
    text_encoder: transformers.CLIPTextModel,
    tokenizer: transformers.CLIPTokenizer,
    texts: list[str],
) -> torch.Tensor:
    """Encode texts to `(n, 12, 64)`, as the pipelines do."""
    ids = tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return text_encoder(ids.to(text_encoder.device))[0]


def _state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().float().cpu().numpy() for key, value in model.state_dict().items()}


def save_diffusers_model(model: Any, folder: Path) -> None:
    """Write a UNet or VAE in float16."""
    make_tiny.write_diffusers_model(folder, model, _state(model), torch.float16)


def save_pipeline(
    folder: Path,
    unet: diffusers.UNet2DConditionModel,
    vae: diffusers.AutoencoderKL,
    text_encoder: transformers.CLIPTextModel,
) -> None:
    """Write a whole InstructPix2Pix pipeline in float16, DDIM as its own scheduler."""
    save_diffusers_model(unet, folder / "unet")
    save_diffusers_model(vae, folder / "vae")
    # Published files have this prefix; transformers >= 5.6 builds the model without it.
    prefix = "text_model."
    state = {
        prefix + key.removeprefix(prefix): value for key, value in _state(text_encoder).items()
    }
    make_tiny.write_transformers_model(folder / "text_encoder", text_encoder, state, torch.float16)
    make_tokenizer(folder / "tokenizer")
    version = diffusers.__version__
    scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": version, **SCHEDULE}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "_diffusers_version": version,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write sorted JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
