"""The loop: noise to latents, by the UNet rows that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge.editor.guidance import Rows, combine
from merge.editor.load import Editor
from merge.editor.schedule import Noise, Schedule
from merge.editor.text import TextEmbedding

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, slots=True)
class Conditions:
    """What the UNet is told besides the noisy latents, for all rows of a batch of `n` pictures.

    Rows lie as in diffusers: first t of every picture, then i, then u.

    Attributes:
        rows: How many rows a picture has.
        states: `(rows * n, tokens, width)`.
        image_latents: `(n, 4, h, w)`, of the pictures.
        added: SDXL only: `text_embeds`, `(rows * n, width)`, and `time_ids`, `(rows * n, 6)`,
            which are original size, crop and target size.
    """

    rows: Rows
    states: torch.Tensor
    image_latents: torch.Tensor
    added: Mapping[str, torch.Tensor] | None = None

    def predict(self, unet: Any, inputs: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return what a UNet predicts for all rows, in float32."""
        prediction: torch.Tensor = unet(
            inputs,
            timestep,
            encoder_hidden_states=self.states,
            added_cond_kwargs=self.added,
            return_dict=False,
        )[0]
        return prediction.float()


def make_conditions(
    editor: Editor,
    rows: Rows,
    texts: Sequence[TextEmbedding],
    empty: TextEmbedding | None,
    image_latents: torch.Tensor,
) -> Conditions:
    """Lay out the conditions of a batch.

    Args:
        editor: The checkpoint.
        rows: How many rows a picture has.
        texts: One per picture.
        empty: No prompt; None where `rows` needs none.
        image_latents: `(n, 4, h, w)`.
    """
    embeddings = list(texts)
    if empty is not None:
        embeddings += [empty] * (len(texts) * (rows - 1))
    states = torch.stack([embedding.states for embedding in embeddings])
    if not editor.has_added_conditions:
        return Conditions(rows, states, image_latents)
    pooled = torch.stack([e.pooled for e in embeddings if e.pooled is not None])
    height, width = (side * editor.vae_scale_factor for side in image_latents.shape[2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=states.dtype)
    time_ids = editor.move(sizes.repeat(len(embeddings), 1))
    return Conditions(rows, states, image_latents, {"text_embeds": pooled, "time_ids": time_ids})


class GuidedModel:
    """The UNet with the conditions of a batch, its rows put together by the guidance.

    Attributes:
        rows: How many rows a picture has.
        calls: How often it was asked.
    """

    def __init__(
        self, editor: Editor, conditions: Conditions, guidance: tuple[float, float]
    ) -> None:
        """Fill in the pictures.

        Args:
            editor: The checkpoint.
            conditions: Of the batch.
            guidance: guidance_scale and image_guidance_scale.
        """
        self._unet = editor.pipeline.unet
        self._conditions = conditions
        self._guidance = guidance
        self._inputs, self._noisy = _input_buffer(conditions, self._unet.dtype)
        self.rows = int(conditions.rows)
        self.calls = 0

    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the guided prediction, `(n, 4, h, w)` float32.

        Args:
            noisy: What the UNet is given, `(n, 4, h, w)`.
            timestep: On the device.
        """
        self.calls += 1
        self._noisy.copy_(noisy)
        prediction = self._conditions.predict(self._unet, self._inputs, timestep)
        guided: torch.Tensor = combine(prediction.chunk(self.rows), *self._guidance)
        return guided


def denoise(
    editor: Editor,
    schedule: Schedule,
    conditions: Conditions,
    noise: Noise,
    guidance: tuple[float, float],
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Run the steps and return the latents, `(n, 4, h, w)` float32.

    The latents stay in float32 between the steps; only what enters the UNet is in its dtype.

    Args:
        editor: The checkpoint.
        schedule: A fresh one.
        conditions: Of the batch.
        noise: On the device, of the schedule.
        guidance: guidance_scale and image_guidance_scale.
        on_step: Called with the number of finished steps and of all.
    """
    predict = GuidedModel(editor, conditions, guidance)
    latents = noise.first * schedule.init_noise_sigma
    timesteps = editor.move(schedule.timesteps)
    steps = len(timesteps)
    for index in range(steps):
        guided = predict(schedule.scale(latents, index), timesteps[index])
        latents = schedule.step(index, guided, latents, noise)
        if on_step is not None:
            on_step(index + 1, steps)
    return latents


def _input_buffer(conditions: Conditions, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the UNet's input with the pictures filled in, and a view of its noisy part.

    The view is `(rows, n, 4, h, w)`, so one copy of the latents fills every row.
    """
    rows, image_latents = int(conditions.rows), conditions.image_latents
    count, channels, height, width = image_latents.shape
    inputs = image_latents.new_empty((rows, count, 2 * channels, height, width), dtype=dtype)
    inputs[:, :, channels:] = image_latents
    if rows == Rows.ALL:
        # "No picture" is all zeros.
        inputs[2, :, channels:] = 0
    return inputs.flatten(0, 1), inputs[:, :, :channels]
