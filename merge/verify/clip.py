"""CLIP image similarity and directional similarity, as InstructPix2Pix measures them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from merge.errors import SourceNotFoundError

# Of every CLIP that OpenAI published.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_clip(model: str) -> str:
    """Look at a CLIP model's config, so that a wrong name fails before anything else is done.

    Args:
        model: A local folder, which comes first, or `org/name` on the Hub.

    Returns:
        The Hub id, or the name of the folder.

    Raises:
        SourceNotFoundError: there is no such CLIP model.
    """
    import transformers

    with _named(model):
        where, options = _where(model)
        if not options and not _HUB_ID.fullmatch(model):
            raise ValueError("there is no such folder, and it is no Hub id of the form org/name")
        config = transformers.AutoConfig.from_pretrained(where, **options)
        if config.model_type != "clip":
            raise ValueError(f"it is a model of type {config.model_type}")
    folder = Path(model).expanduser()
    return (folder.resolve().name or model) if folder.is_dir() else model


class ClipScorer:
    """A loaded CLIP model."""

    def __init__(self, model: str, device: torch.device) -> None:
        """Load a model.

        Args:
            model: As for `find_clip`.
            device: Where to compute, in float32.

        Raises:
            SourceNotFoundError: there is no such CLIP model.
        """
        import transformers

        where, options = _where(model)
        with _named(model):
            # Pickles can run code and are not read.
            self._model = transformers.CLIPModel.from_pretrained(
                where, dtype=torch.float32, use_safetensors=True, **options
            )
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        self._model.eval().to(device)
        self._device = device

    def score(
        self,
        before: Image.Image,
        after: Image.Image,
        before_caption: str | None,
        after_caption: str | None,
    ) -> dict[str, float | None]:
        """Measure an edit.

        Returns:
            `clip_image`, the cosine of the two pictures; `clip_text`, that of the edited picture
            and its caption; `clip_direction`, that of the change of the pictures and the change of
            the captions. The last two need captions. None where a change is zero.

        Source:
            Brooks et al. 2023, arXiv:2211.09800; metrics/clip_similarity.py of
            timothybrooks/instruct-pix2pix: features are normalised, then subtracted.
        """
        with torch.inference_mode():
            first, second = self._encode_images([before, after])
            scores: dict[str, float | None] = {"clip_image": _cosine(first, second)}
            if before_caption is not None and after_caption is not None:
                texts = self._encode_texts([before_caption, after_caption])
                scores["clip_text"] = _cosine(second, texts[1])
                scores["clip_direction"] = _cosine(second - first, texts[1] - texts[0])
        return scores

    def _encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalised features of shape `(images, width)`."""
        side = self._model.config.vision_config.image_size
        pixels = torch.stack(
            [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        )
        values = pixels.to(self._device, torch.float32) / 255
        # As the source does it: bicubic without antialiasing, the whole picture to a square.
        values = torch.nn.functional.interpolate(
            values, size=(side, side), mode="bicubic", align_corners=False
        )
        mean = torch.tensor(_MEAN, device=self._device).view(1, 3, 1, 1)
        std = torch.tensor(_STD, device=self._device).view(1, 3, 1, 1)
        hidden = self._model.vision_model(pixel_values=(values - mean) / std).pooler_output
        return _normalise(self._model.visual_projection(hidden))

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Return normalised features of shape `(texts, width)`."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self._device)
        hidden = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _normalise(self._model.text_projection(hidden))


def _where(model: str) -> tuple[Any, dict[str, Any]]:
    folder = Path(model).expanduser()
    return (folder, {"local_files_only": True}) if folder.is_dir() else (model, {})


@contextmanager
def _named(model: str) -> Iterator[None]:
    """Turn what the library raises for a model into our error."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceNotFoundError(
            f"--clip: {model} is no CLIP model that can be loaded: {first}",
            hint="name a folder, or a repository such as openai/clip-vit-large-patch14",
        ) from error


def _normalise(features: torch.Tensor) -> torch.Tensor:
    normalised: torch.Tensor = features / features.norm(dim=-1, keepdim=True)
    return normalised


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    length = float(a.norm() * b.norm())
    return None if length == 0 else float(torch.dot(a, b)) / length
