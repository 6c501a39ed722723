"""Which architecture a set of UNet keys belongs to.

Keys are those of diffusers' `UNet2DConditionModel`, e.g.
`down_blocks.0.attentions.0.proj_in.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONV_IN = "conv_in.weight"
# The guidance-scale embedding that a full LCM adds; InstructPix2Pix pipelines never feed it.
GUIDANCE_EMBEDDING = "time_embedding.cond_proj.weight"

_ARCHITECTURES = {
    "sd15": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}


@dataclass(frozen=True, slots=True)
class UNetArchitecture:
    """What the keys and shapes of a UNet say about it.

    Attributes:
        family: `sd15`, `sd21` or `sdxl`.
        in_channels: Input channels of `conv_in`; 8 for InstructPix2Pix.
        context: Width of the text embedding that cross-attention takes; 0 when it has none.
        has_guidance_embedding: True for a full LCM.
    """

    family: str
    in_channels: int
    context: int
    has_guidance_embedding: bool

    @property
    def title(self) -> str:
        """Return the family's full name."""
        return _ARCHITECTURES[self.family]


def detect_unet(shapes: Mapping[str, tuple[int, ...]]) -> UNetArchitecture | None:
    """Recognise a UNet in diffusers keys.

    SDXL is told by its `add_embedding`; Stable Diffusion 2 by linear `proj_in` layers where 1.x
    has 1x1 convolutions. Sizes are not looked at, so small models of a family are recognised.

    Args:
        shapes: Key to shape, `(out, in, kh, kw)` for convolutions.

    Returns:
        The architecture, or None when the keys are not those of such a UNet.
    """
    conv_in = shapes.get(CONV_IN)
    if conv_in is None or len(conv_in) != 4:
        return None
    context = next(
        (s[1] for k, s in shapes.items() if k.endswith("attn2.to_k.weight") and len(s) == 2), 0
    )
    if "add_embedding.linear_1.weight" in shapes:
        family = "sdxl"
    elif any(k.endswith(".proj_in.weight") and len(s) == 2 for k, s in shapes.items()):
        family = "sd21"
    else:
        family = "sd15"
    return UNetArchitecture(family, conv_in[1], context, GUIDANCE_EMBEDDING in shapes)
