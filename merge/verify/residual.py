"""How much of a little noise a model leaves in a picture: what tells pictures from noise.

Noise is added to an edit's latents at an early timestep, and a UNet predicts it. One that knows
such pictures finds most of it. Random weights find none, and a good UNet finds little in a
picture of random weights.

Shares that were left, means over the three drawn pictures or the demo's six with three seeds each,
by the merged UNet itself and by the target; demo, demo-lora and a larger model of the same kind:

    weight 0 to 1     0.01 to 0.06   0.01 to 0.06
    weight 1.5        0.03 to 0.10   0.04 to 0.15
    weight 3          0.18 to 0.54   0.20 to 0.99
    weight -0.5       0.03 to 0.09   0.04 to 0.13
    weight -2         0.12 to 0.19   0.41 to 0.82
    random weights    1.01 to 1.18   2.8 to 4.2
    as much noise     0.64 to 0.97   2.2 to 2.8       (added to every weight of a good merge)

So neither tells whether an edit is right, nor a merge that is only somewhat wrong, -0.5 among them.
No statistics of the pictures did better: random weights and good merges overlap in neighbouring
differences, total variation, saturated pixels and the latents' own spread, since the decoder makes
plausible textures of anything. Latents of the larger models on the Hub were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge.editor.denoise import Conditions, make_conditions
from merge.editor.guidance import Rows
from merge.editor.load import Editor
from merge.editor.result import EditResult
from merge.editor.text import encode_texts

# Of the training timesteps: low enough that the picture still says where the noise is.
_SHARE = 0.1
# Not one of the seeds that people edit with, so that it is not the noise an edit began with.
_SEED = 0x5EED0FF5


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """An edit that noise is added to.

    Attributes:
        latents: What the edit ended in, `(1, 4, h, w)` float32 on the CPU.
        conditions: The instruction and the source picture, one row.
    """

    latents: torch.Tensor
    conditions: Conditions


def make_sample(
    editor: Editor, result: EditResult, instruction: str, image_latents: torch.Tensor
) -> Sample:
    """Keep what `noise_left` needs of an edit.

    Args:
        editor: Whose text encoders are used.
        result: The edit.
        instruction: What was asked.
        image_latents: Of the source, `(1, 4, h, w)`.
    """
    with torch.inference_mode():
        text = encode_texts(editor, [instruction])[0]
        conditions = make_conditions(editor, Rows.TEXT, [text], None, image_latents)
        return Sample(torch.from_numpy(result.latents)[None], conditions)


def noise_left(editor: Editor, samples: Sequence[Sample]) -> float | None:
    """Return the share of added noise, as a mean square, that the editor's UNet does not find.

    0: it finds all of it. 1: as if it had predicted none.

    Args:
        editor: Its UNet predicts, at guidance 1; its scheduler says how much noise a timestep has.
        samples: Edits; those whose numbers are not finite are passed over.

    Returns:
        The mean over the samples; None when nothing could be measured.
    """
    config = editor.pipeline.scheduler.config
    alphas = getattr(editor.pipeline.scheduler, "alphas_cumprod", None)
    kind = getattr(config, "prediction_type", None)
    if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
        # A flow has other noise levels.
        return None
    timestep = round(editor.trained_steps * _SHARE)
    power = float(alphas[timestep])
    shares = [_share(editor, sample, timestep, power, kind) for sample in samples]
    finite = [share for share in shares if math.isfinite(share)]
    return sum(finite) / len(finite) if finite else None


@torch.inference_mode()
def _share(editor: Editor, sample: Sample, timestep: int, power: float, kind: str) -> float:
    """Return one sample's share; `power` is that of the picture, the noise has the rest of 1."""
    unet, conditions = editor.pipeline.unet, sample.conditions
    alpha, beta = math.sqrt(power), math.sqrt(1 - power)
    generator = torch.Generator("cpu").manual_seed(_SEED)
    noise = torch.randn(sample.latents.shape, generator=generator)
    noisy = alpha * sample.latents + beta * noise
    inputs = torch.cat([editor.move(noisy), conditions.image_latents], dim=1).to(unet.dtype)
    step = torch.tensor(timestep, device=editor.device)
    prediction = conditions.predict(unet, inputs, step).cpu()
    if kind == "epsilon":
        found = prediction
    elif kind == "v_prediction":
        found = alpha * prediction + beta * noisy
    else:
        found = (noisy - alpha * prediction) / beta
    error = (found - noise).double().square().mean()
    return float(error / noise.double().square().mean())
