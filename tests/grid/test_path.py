"""The target's own path, against DDIM by another hand: plain diffusers and numpy in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from merge.editor.denoise import GuidedModel, make_conditions
from merge.editor.guidance import choose_rows
from merge.editor.load import Editor, load_editor, load_scheduler
from merge.editor.schedule import Noise, draw_noise, make_schedule
from merge.editor.settings import EditSettings
from merge.editor.text import empty_text, encode_texts
from merge.editor.vae import encode_pictures
from merge.errors import ImageError, VerificationError
from merge.grid.path import NoiseLevels, draws_noise, follow_path, ode_grid, starts_of
from merge.verify.drawings import draw_picture
from tests.grid.small import ONE, TWO, measure, read, write_recipe

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
POWERS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
WORDS = ("make it winter", "turn the boat into a car")
SEEDS = (3, 11)


# The parts of it ---------------------------------------------------------------------------------


@given(st.integers(1, 999))
def test_the_grid_of_the_ode_falls_evenly_from_where_it_starts(start: int) -> None:
    grid = ode_grid(start, 1000)
    count = max(4, math.ceil(16 * start / 1000))
    assert grid[0] == start
    assert grid[-1] > 0
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert len(grid) == min(count, start)
    ends = [*grid, 0]
    gaps = [a - b for a, b in itertools.pairwise(ends)]
    assert max(gaps) - min(gaps) <= 2


def test_a_path_from_no_noise_is_one_answer() -> None:
    assert ode_grid(0, 1000) == [0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep", [1, 259, 999])
def test_a_right_prediction_splits_what_was_mixed(kind: str, timestep: int) -> None:
    levels = NoiseLevels.of(LCMScheduler(prediction_type=kind, **CONFIG))
    generator = torch.Generator().manual_seed(timestep)
    clean, noise = (torch.randn(2, 4, 3, 3, generator=generator).double() for _ in range(2))
    alpha, sigma = levels.alphas[timestep], levels.sigmas[timestep]
    assert alpha**2 == pytest.approx(POWERS[timestep], rel=1e-5)
    assert alpha**2 + sigma**2 == pytest.approx(1)
    noisy = levels.mix(clean, noise, timestep)
    assert torch.allclose(noisy, alpha * clean + sigma * noise)
    prediction = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
    found = levels.split(prediction[kind], noisy, timestep)
    assert torch.allclose(found[0], clean)
    assert torch.allclose(found[1], noise)


def test_noise_of_another_kind_is_refused() -> None:
    with pytest.raises(VerificationError, match="FlowMatchEulerDiscreteScheduler has no noise"):
        NoiseLevels.of(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ImageError, match="FlowMatchEulerDiscreteScheduler is no scheduler of the"):
        make_schedule(FlowMatchEulerDiscreteScheduler(), EditSettings())


@pytest.mark.parametrize(
    ("name", "starts", "draws"),
    [
        ("LCMScheduler", [999, 759, 499, 259], False),
        ("DDIMScheduler", [750], False),
        ("TCDScheduler", [999], False),
        ("EulerDiscreteScheduler", [999], False),
        ("DPMSolverMultistepScheduler", [999], False),
        ("EulerAncestralDiscreteScheduler", [999], True),
    ],
)
def test_only_a_consistency_models_steps_begin_paths(
    name: str, starts: list[int], draws: bool
) -> None:
    scheduler = load_scheduler({"_class_name": name, **CONFIG})
    schedule = make_schedule(scheduler, EditSettings(steps=4))
    assert starts_of(schedule, NoiseLevels.of(scheduler)) == starts
    assert draws_noise(schedule) is draws
    # Trying it left it as it was.
    step = schedule.step(0, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), noise_of(schedule))
    again = make_schedule(scheduler, EditSettings(steps=4))
    other = again.step(0, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), noise_of(again))
    assert step.equal(other)


def noise_of(schedule: Any) -> Noise:
    drawn, generators = draw_noise([0], (4, 2, 2), schedule)
    return Noise(drawn[0], tuple(drawn[1:]), generators)


# The whole, by another hand ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor(tiny_sd15: Path) -> Editor:
    return load_editor(tiny_sd15 / "target", device="cpu")


class ByHand:
    """The target's path by diffusers' networks and numpy, with none of our own code."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.scales = (1.0, 1.0)
        self.texts, self.empty = self._texts(folder)
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        pixels = [np.asarray(draw_picture(name, 64)) / 127.5 - 1 for name in ("house", "boat")]
        images = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
        with torch.inference_mode():
            self.images = vae.encode(images).latent_dist.mode()

    def _texts(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        tokens = tokenizer([*WORDS, ""], padding="max_length", return_tensors="pt", max_length=77)
        with torch.inference_mode():
            states = encoder(tokens.input_ids).last_hidden_state
        return states[:2], states[2:]

    def predict(self, noisy: Any, timestep: int) -> Any:
        """Return the guided prediction, of three rows whatever the scales are."""
        count = len(noisy)
        latents = torch.tensor(noisy, dtype=torch.float32)
        empty = self.empty.expand(count, -1, -1)
        rows = [
            (self.texts, self.images),
            (empty, self.images),
            (empty, torch.zeros_like(self.images)),
        ]
        with torch.inference_mode():
            text, image, none = (
                self.unet(torch.cat([latents, pictures], dim=1), timestep, states)
                .sample.double()
                .numpy()
                for states, pictures in rows
            )
        return none + self.scales[0] * (text - image) + self.scales[1] * (image - none)

    def solve(self, noisy: Any, start: int, kind: str) -> Any:
        """Return the end of the ODE: DDIM with eta 0, equation 12 of Song et al."""
        grid = [*ode_grid(start, 1000), None]
        for step, following in itertools.pairwise(grid):
            assert step is not None
            power = POWERS[step]
            predicted = self.predict(noisy, step)
            if kind == "epsilon":
                noise = predicted
                clean = (noisy - (1 - power) ** 0.5 * noise) / power**0.5
            else:
                clean = power**0.5 * noisy - (1 - power) ** 0.5 * predicted
                noise = power**0.5 * predicted + (1 - power) ** 0.5 * noisy
            if following is None:
                return clean
            noisy = POWERS[following] ** 0.5 * clean + (1 - POWERS[following]) ** 0.5 * noise
        raise AssertionError


@pytest.fixture(scope="module")
def hand(tiny_sd15: Path) -> ByHand:
    return ByHand(tiny_sd15 / "target")


def follow(editor: Editor, settings: EditSettings, guidance: tuple[float, float]) -> Any:
    """Follow the path as a worker does; return states, ends and evaluations."""
    schedule = make_schedule(editor.pipeline.scheduler, settings)
    rows = choose_rows(*guidance)
    counted: list[int] = []
    with torch.inference_mode():
        pictures = [draw_picture(name, 64) for name in ("house", "boat")]
        texts, latents = encode_texts(editor, WORDS), encode_pictures(editor, pictures)
        empty = empty_text(editor, texts[0]) if rows > 1 else None
        conditions = make_conditions(editor, rows, texts, empty, latents)
        predict = GuidedModel(editor, conditions, guidance)
        drawn, generators = draw_noise(SEEDS, latents.shape[1:], schedule)
        noise = Noise(drawn[0], tuple(drawn[1:]), generators)
        found = follow_path(editor, schedule, predict, noise, lambda: counted.append(1))
    return (*found, len(counted))


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("epsilon", (1.0, 1.0)),
        ("epsilon", (2.0, 1.5)),
        ("v_prediction", (1.0, 1.0)),
        ("v_prediction", (3.0, 1.0)),
    ],
    ids=str,
)
def test_a_path_is_that_of_plain_diffusers(
    editor: Editor, hand: ByHand, kind: str, guidance: tuple[float, float]
) -> None:
    config = dict(editor.pipeline.scheduler.config)
    editor.use_scheduler({**config, "_class_name": "LCMScheduler", "prediction_type": kind})
    starts = (999, 499, 59)
    states, ends, evaluations = follow(editor, EditSettings(steps=3, timesteps=starts), guidance)
    assert states.shape == ends.shape == (3, 2, 4, 8, 8)
    assert evaluations == 16 + 8 + 4
    hand.scales = guidance
    # The noise of the edit: one generator for each picture, first and then step by step.
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    state: Any = None
    end: Any = None
    for index, start in enumerate(starts):
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
        drawn = noise.double().numpy()
        if state is None:
            state = drawn
        else:
            power = POWERS[start]
            state = power**0.5 * end + (1 - power) ** 0.5 * drawn
        end = hand.solve(state, start, kind)
        for found, expected in ((states[index], state), (ends[index], end)):
            gap = np.abs(found.double().numpy() - expected).max()
            assert gap < 2e-4 * np.abs(expected).max(), (index, start)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "TCDScheduler"])
def test_a_solver_has_one_path_whatever_its_steps(editor: Editor, hand: ByHand, name: str) -> None:
    config = dict(editor.pipeline.scheduler.config)
    trailing = {"_class_name": name, "timestep_spacing": "trailing", "prediction_type": "epsilon"}
    editor.use_scheduler({**config, **trailing})
    found = [follow(editor, EditSettings(steps=steps), (1.0, 1.0)) for steps in (2, 4)]
    (states, ends, evaluations), (_, other, _) = found
    assert states.shape == ends.shape == (1, 2, 4, 8, 8)
    assert evaluations == 16
    assert ends.equal(other)
    hand.scales = (1.0, 1.0)
    expected = hand.solve(states[0].double().numpy(), 999, "epsilon")
    assert np.abs(ends[0].double().numpy() - expected).max() < 2e-4 * np.abs(expected).max()


# What a sweep makes of it ------------------------------------------------------------------------


@pytest.fixture
def knowing(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Models that know one answer: the source's latents, and what is in the list more.

    To the target it is the source alone, whose path then ends there wherever it begins.
    """
    target = UNet2DConditionModel.from_pretrained(
        tiny_sd15 / "target" / "unet", torch_dtype=torch.float32
    )
    bias, more = target.conv_out.bias.detach().half().float(), [0.0]

    def predict(model: Any, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        model.calls += 1
        power = float(POWERS[int(timestep)])
        is_target = model._unet.conv_out.bias.equal(bias)
        answer = model._conditions.image_latents + (0 if is_target else more[0])
        epsilon: torch.Tensor = (noisy - power**0.5 * answer) / (1 - power) ** 0.5
        return epsilon

    monkeypatch.setattr(GuidedModel, "__call__", predict)
    return more


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_model_that_answers_as_the_target_has_no_distance(
    tiny_sd15: Path, tmp_path: Path, knowing: list[float], offset: float
) -> None:
    knowing[0] = offset
    recipe = write_recipe(tmp_path, tiny_sd15)
    measure(
        recipe,
        ["timesteps=999,999/499/99", "weight=0.5"],
        tmp_path / "out",
        TWO,
        metrics=["path", "endpoint", "residual"],
    )
    for cell in read(tmp_path / "out")["cells"]:
        assert cell["metrics"]["path"] == pytest.approx(offset**2, abs=1e-6)
        assert cell["metrics"]["endpoint"] == pytest.approx(offset**2, abs=1e-6)
        assert cell["metrics"]["residual"] == pytest.approx(offset**2, abs=1e-6)


def test_the_target_itself_is_measured_at_a_weight_of_zero(
    tiny_sd15: Path, tmp_path: Path, hand: ByHand
) -> None:
    """Of one step, the distance is that of one answer to the end of the path, by another hand."""
    recipe = write_recipe(tmp_path, tiny_sd15)
    axes = ["weight=0,1", "timesteps=999"]
    measure(recipe, axes, tmp_path / "out", ONE, metrics=["path", "endpoint"])
    found = read(tmp_path / "out")["cells"][0]["metrics"]
    hand.scales = (1.0, 1.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double().numpy()
    both = np.concatenate([noise, noise])
    end = hand.solve(both, 999, "epsilon")[0]
    power = POWERS[999]
    answer = (both - (1 - power) ** 0.5 * hand.predict(both, 999)) / power**0.5
    expected = np.square(answer[0] - end).mean()
    assert found["path"] == pytest.approx(expected, rel=1e-3)
    assert found["endpoint"] == pytest.approx(expected, rel=1e-3)


def test_noise_that_a_scheduler_draws_is_told(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "EulerAncestralDiscreteScheduler,EulerDiscreteScheduler"
    recipe = write_recipe(tmp_path, tiny_sd15)
    with caplog.at_level("WARNING", "merge.grid.session"):
        measure(recipe, [f"scheduler.class_name={names}", "steps=2"], tmp_path / "out")
    said = [r.getMessage() for r in caplog.records if r.name == "merge.grid.session"]
    assert len(said) == 1
    assert said[0].startswith("EulerAncestralDiscreteScheduler draws noise in its steps")
