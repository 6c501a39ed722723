"""What a picture looks like after the model's VAE alone."""

from __future__ import annotations

import torch
from PIL import Image

from merge.editor.load import Editor
from merge.editor.result import in_8_bits
from merge.editor.vae import encode_pictures


def round_trip(
    editor: Editor, image: Image.Image, latents: torch.Tensor | None = None
) -> Image.Image:
    """Encode a picture and decode it again: what an edit that changes nothing gives.

    Args:
        editor: Whose VAE is used.
        image: RGB, of a size that the model takes.
        latents: Of the picture, where it is encoded already.
    """
    with torch.inference_mode():
        if latents is None:
            latents = encode_pictures(editor, [image])
        decoded = editor.pipeline.vae.decode(latents, return_dict=False)[0][0]
        values = (decoded.float() * 0.5 + 0.5).permute(1, 2, 0).cpu().numpy()
    return in_8_bits(values)
