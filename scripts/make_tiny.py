"""Write complete tiny InstructPix2Pix pipelines, their parents and LoRAs, with no network.

    python scripts/make_tiny.py OUT_FOLDER --arch all --dtype float16

For each architecture, OUT_FOLDER/<arch>/ receives

    target/                    an 8-channel InstructPix2Pix pipeline folder
    base/                      the 4-channel UNet that target and distilled descend from
    distilled/                 a full few-step UNet with a guidance embedding, as LCM-SDXL has
    lora_kohya.safetensors     a few-step LoRA as LCM-LoRA is published: kohya keys with alpha
    lora_peft.safetensors      the very same delta under peft keys, which carry no alpha

The UNets and VAEs are small in width only: blocks, layers and, but for SDXL's depth, key names
are those of the real models. Weights are random, and a seed fixes every byte.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save

State = dict[str, np.ndarray]

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}

# The modules of LCM-LoRA. Source: diffusers, train_lcm_distill_lora_sd_wds.py.
LORA_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
LORA_RANK = 4
LORA_ALPHA = 8

# Size of every delta relative to its tensor: small, yet above half a bfloat16 step (0.4 %).
DELTA = 0.05

TEXT_LENGTH = 77  # tokens

# The public SD1.5 target was saved by this old version. Its configs keep the string, so that a
# tool which rewrites them with the installed version shows up.
TARGET_DIFFUSERS_VERSION = "0.12.0.dev0"

# Widths grow at the same blocks as the real ones, which decides where a conv_shortcut exists.
SD15_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 12, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 12, 16),
    "norm_num_groups": 4,
    "attention_head_dim": (2, 2, 4),
    "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,  # six sizes, one pooled text
}
# Four blocks as in the real ones, so that 64 pixels are 8 latents and sizes are multiples of 8.
VAE: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (4, 8, 12, 12),
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TEXT_LENGTH,
    # As published: with eos 2, the pooled text is the one at the highest token id, <|endoftext|>.
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}

# What the tokenizer's merges are learnt from; other text falls apart into bytes.
CORPUS = """
add a an and as autumn beach black blue boat bridge bright brown building car castle cat change
child city cloud color dark dog dress evening face field fire flower forest garden girl glasses
gold grass green hair hat horse house in into it lake light like look made make man more morning
mountain mountains night of oil old on painting person photo picture pink pixel put rain red
remove replace river road robot rock rose sea sketch sky snow snowy sofa spring star stone street
style summer sun sunny sunset swap table the them to tree trees turn van gogh was water watercolor
were what white wild window winter with woman wood yellow
"""


def _rng(*names: object) -> np.random.Generator:
    """Return a generator that depends on the names alone, not on the order of calls."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _random_tensor(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw a float32 tensor that keeps activations near unit scale.

    Args:
        key: Its name; a 1-D `weight` belongs to a norm and lies around one.
        shape: Its shape, outputs first.
        rng: Where the numbers come from.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise / np.float32(math.sqrt(math.prod(shape[1:])))
    if key.endswith(".weight"):
        return 1 + np.float32(0.1) * noise
    return np.float32(0.05) * noise


def _random_state(module: torch.nn.Module, *names: object) -> State:
    """Draw every tensor of a module that was built on the meta device."""
    return {
        key: _random_tensor(key, tuple(value.shape), _rng(*names, key))
        for key, value in module.state_dict().items()
    }


def _perturb(state: State, *names: object) -> State:
    """Add noise of relative size `DELTA` to every tensor."""
    perturbed = {}
    for key, value in state.items():
        noise = _rng(*names, key).standard_normal(value.shape, dtype=np.float32)
        rms = np.sqrt(np.mean(np.square(value)))
        perturbed[key] = value + np.float32(DELTA) * rms * noise
    return perturbed


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(path: Path, state: State, dtype: torch.dtype) -> None:
    """Write a safetensors file, floating tensors in `dtype` and integers as they are."""
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `save_file`: it gives the file mode 0600 whatever the umask.
    path.write_bytes(save(cast, metadata={"format": "pt"}))


def write_diffusers_model(
    folder: Path, model: Any, state: State, dtype: torch.dtype, version: str | None = None
) -> None:
    """Write `config.json` and the weights of a diffusers model.

    Args:
        folder: Where to.
        model: The model on the meta device; it gives the config.
        state: Its weights.
        dtype: Their dtype in the file.
        version: Instead of the installed diffusers' version.
    """
    config = json.loads(model.to_json_string())
    config["_diffusers_version"] = version or config["_diffusers_version"]
    _write_json(folder / "config.json", config)
    _write_weights(folder / "diffusion_pytorch_model.safetensors", state, dtype)


def _unet(config: dict[str, Any], **changes: Any) -> Any:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**{**config, **changes})


def _write_unets(
    out: Path, config: dict[str, Any], arch: str, dtype: torch.dtype, seed: int
) -> None:
    """Write base, distilled and the target's UNet: one random model and two steps away from it."""
    model = _unet(config)
    base = _random_state(model, seed, arch, "unet")
    write_diffusers_model(out / "base", model, base, dtype)

    key = "time_embedding.cond_proj.weight"
    model = _unet(config, time_cond_proj_dim=256)
    distilled = _perturb(base, seed, arch, "distilled")
    shape = tuple(model.state_dict()[key].shape)
    distilled[key] = _random_tensor(key, shape, _rng(seed, arch, "distilled", key))
    write_diffusers_model(out / "distilled", model, distilled, dtype)

    key = "conv_in.weight"
    model = _unet(config, in_channels=8)
    target = _perturb(base, seed, arch, "target")
    shape = tuple(model.state_dict()[key].shape)
    wide = _random_tensor(key, shape, _rng(seed, arch, "image channels", key))
    wide[:, :4] = target[key]
    target[key] = wide
    write_diffusers_model(
        out / "target" / "unet", model, target, dtype, version=TARGET_DIFFUSERS_VERSION
    )


def _write_loras(
    out: Path, config: dict[str, Any], arch: str, dtype: torch.dtype, seed: int
) -> None:
    """Write one delta in two forms, kohya with alpha and peft without.

    alpha / rank is 2 here, and the peft form carries it in its up matrices. A factor of two is
    exact, so both files must merge to the same bytes.
    """
    kohya: State = {}
    peft: State = {}
    for key, value in _unet(config).state_dict().items():
        path = key.removesuffix(".weight")
        if path == key or not path.endswith(tuple(f".{name}" for name in LORA_MODULES)):
            continue
        rng = _rng(seed, arch, "lora", path)
        # A convolution keeps its kernel in `down`; `up` is then a 1x1 convolution.
        down = _random_tensor(path, (LORA_RANK, *value.shape[1:]), rng)
        up = _random_tensor(path, (value.shape[0], LORA_RANK, *[1] * (value.ndim - 2)), rng)
        up *= np.float32(DELTA * LORA_RANK / LORA_ALPHA)
        # Rounded before it is doubled: float16's subnormals would round differently after.
        up = torch.from_numpy(up).to(dtype).float().numpy()
        name = "lora_unet_" + path.replace(".", "_")
        kohya[f"{name}.lora_down.weight"] = down
        kohya[f"{name}.lora_up.weight"] = up
        kohya[f"{name}.alpha"] = np.array(LORA_ALPHA, dtype=np.float32)
        peft[f"unet.{path}.lora_A.weight"] = down
        peft[f"unet.{path}.lora_B.weight"] = up * np.float32(LORA_ALPHA / LORA_RANK)
    _write_weights(out / "lora_kohya.safetensors", kohya, dtype)
    _write_weights(out / "lora_peft.safetensors", peft, dtype)


def _byte_symbols() -> list[str]:
    """List the 256 printable stand-ins for bytes, in the order of CLIP's vocabulary.

    Source: GPT-2's byte-level BPE (`bytes_to_unicode`), which CLIP uses.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges: the most frequent pair first, ties in alphabetical order."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for split in splits for pair in itertools.pairwise(split))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for split in splits:
            for i in range(len(split) - 1, 0, -1):
                if tuple(split[i - 1 : i + 1]) == best:
                    split[i - 1 : i + 1] = ["".join(best)]
    return merges


def write_tokenizer(
    folder: Path,
    corpus: str = CORPUS,
    length: int = TEXT_LENGTH,
    pad_token: str = "<|endoftext|>",
    merge_count: int = 256,
) -> int:
    """Write a byte-level CLIP tokenizer and return the size of its vocabulary.

    Args:
        folder: Where to.
        corpus: The words that merges are learnt from.
        length: The most tokens of a text.
        pad_token: What short texts are filled with.
        merge_count: At most so many merges.
    """
    merges = _learn_merges(corpus.split(), merge_count)
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)]
    # Last, as in CLIP: text encoders find the end of the text at the highest id.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad_token,
        "unk_token": "<|endoftext|>",
    }
    _write_json(folder / "special_tokens_map.json", special)
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)
    return len(vocab)


def write_transformers_model(folder: Path, model: Any, state: State, dtype: torch.dtype) -> None:
    """Write the config and the weights of a transformers model."""
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    _write_weights(folder / "model.safetensors", state, dtype)


def _write_text_encoder(
    folder: Path, class_name: str, config: dict[str, Any], arch: str, dtype: torch.dtype, seed: int
) -> None:
    """Write a CLIP text encoder under the key names of the files on the Hub.

    transformers >= 5.6 builds `CLIPTextModel` without the `text_model.` prefix that every
    published file has, so it is put back here. It loads either way.
    """
    with torch.device("meta"):
        model = getattr(transformers, class_name)(transformers.CLIPTextConfig(**TEXT, **config))
    prefix = "text_model."
    state = {
        key if key.startswith((prefix, "text_projection.")) else prefix + key: value
        for key, value in _random_state(model, seed, arch, folder.name).items()
    }
    if arch == "sd15":
        # The public SD1.5 target dates from when this buffer was saved; SDXL's files lack it.
        state[f"{prefix}embeddings.position_ids"] = np.arange(TEXT_LENGTH)[None]
    write_transformers_model(folder, model, state, dtype)


def _write_safety_checker(folder: Path, dtype: torch.dtype, seed: int) -> None:
    """Write a safety checker that runs and never blackens a picture."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 8},
        vision_config=vision,
        projection_dim=16,
    )
    with torch.device("meta"):
        model = StableDiffusionSafetyChecker(config)
    state = _random_state(model, seed, "safety_checker")
    for key in ("concept_embeds_weights", "special_care_embeds_weights"):
        state[key] = 1.1 + np.abs(state[key])  # thresholds that no cosine can reach
    # As published: the prefix twice, which transformers >= 5.6 flattens, and the position buffer.
    flat, prefix = "vision_model.", "vision_model.vision_model."
    state = {
        prefix + key.removeprefix(prefix).removeprefix(flat) if key.startswith(flat) else key: value
        for key, value in state.items()
    }
    positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1  # patches and the class
    state[f"{prefix}embeddings.position_ids"] = np.arange(positions)[None]
    write_transformers_model(folder, model, state, dtype)


def _write_feature_extractor(folder: Path) -> None:
    config = {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 32},
    }
    _write_json(folder / "preprocessor_config.json", config)


def _write_vae(
    folder: Path, config: dict[str, Any], arch: str, dtype: torch.dtype, seed: int
) -> None:
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**VAE, **config)
    state = _random_state(model, seed, arch, "vae")
    write_diffusers_model(folder, model, state, dtype, version=TARGET_DIFFUSERS_VERSION)


def _write_scheduler(folder: Path) -> None:
    config = {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": TARGET_DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
    _write_json(folder / "scheduler_config.json", config)


def _write_model_index(folder: Path, class_name: str, entries: dict[str, Any]) -> None:
    index = {
        "_class_name": class_name,
        "_diffusers_version": TARGET_DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index | entries)


def make_sd15(out: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
    """Write a tiny SD1.5 set: `out`/target, base, distilled and two LoRAs.

    Args:
        out: The folder of this architecture; made if need be, files in it are replaced.
        dtype: Of every floating tensor.
        seed: Fixes every byte.
    """
    target = out / "target"
    _write_unets(out, SD15_UNET, "sd15", dtype, seed)
    _write_loras(out, SD15_UNET, "sd15", dtype, seed)
    _write_vae(target / "vae", {"scaling_factor": 0.18215}, "sd15", dtype, seed)
    vocab_size = write_tokenizer(target / "tokenizer")
    text = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": vocab_size}
    _write_text_encoder(target / "text_encoder", "CLIPTextModel", text, "sd15", dtype, seed)
    _write_safety_checker(target / "safety_checker", dtype, seed)
    _write_feature_extractor(target / "feature_extractor")
    _write_scheduler(target / "scheduler")
    entries = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": False,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    _write_model_index(target, "StableDiffusionInstructPix2PixPipeline", entries)


def make_sdxl(out: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
    """Write a tiny SDXL set: `out`/target, base, distilled and two LoRAs.

    Args:
        out: The folder of this architecture; made if need be, files in it are replaced.
        dtype: Of every floating tensor.
        seed: Fixes every byte.
    """
    target = out / "target"
    _write_unets(out, SDXL_UNET, "sdxl", dtype, seed)
    _write_loras(out, SDXL_UNET, "sdxl", dtype, seed)
    vae = {"scaling_factor": 0.13025, "force_upcast": True}
    _write_vae(target / "vae", vae, "sdxl", dtype, seed)
    vocab_size = write_tokenizer(target / "tokenizer")
    write_tokenizer(target / "tokenizer_2", pad_token="!")
    # Unequal widths, so that exchanging the two encoders cannot go unseen.
    text = {"hidden_size": 12, "intermediate_size": 24, "vocab_size": vocab_size}
    _write_text_encoder(target / "text_encoder", "CLIPTextModel", text, "sdxl", dtype, seed)
    text_2 = {
        "hidden_size": 20,
        "intermediate_size": 40,
        "projection_dim": 20,
        "hidden_act": "gelu",
        "vocab_size": vocab_size,
    }
    _write_text_encoder(
        target / "text_encoder_2", "CLIPTextModelWithProjection", text_2, "sdxl", dtype, seed
    )
    _write_scheduler(target / "scheduler")
    entries = {
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    _write_model_index(target, "StableDiffusionXLInstructPix2PixPipeline", entries)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT_FOLDER", type=Path, help="made if need be")
    parser.add_argument("--arch", choices=("sd15", "sdxl", "all"), default="all")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of all weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    makers = {"sd15": make_sd15, "sdxl": make_sdxl}
    for arch in makers if args.arch == "all" else [args.arch]:
        makers[arch](args.out / arch, dtype=DTYPES[args.dtype], seed=args.seed)
        print(args.out / arch)


if __name__ == "__main__":
    main()
