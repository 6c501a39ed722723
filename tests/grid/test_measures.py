"""What is measured of a cell, against numpy by another hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image
from skimage.metrics import structural_similarity

from merge.editor.result import EditResult, StageTimes
from merge.editor.schedule import make_schedule
from merge.editor.settings import EditSettings
from merge.errors import RecipeError, VerificationError
from merge.grid import measures
from merge.grid.jobs import SampleReference
from merge.grid.measures import (
    check_finite,
    check_latents,
    check_metrics,
    endpoint_of,
    mean_square,
    measure_samples,
    residual_of,
)
from merge.grid.model import Sample
from merge.grid.path import NoiseLevels
from merge.verify.model import Edit

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 3, 5)


def levels_by_hand() -> Any:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


class Linear:
    """A model that anybody can compute: a factor of its input, and a part of the timestep."""

    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 0.7 * noisy + 0.0005 * float(timestep)


EDITOR: Any = SimpleNamespace(
    trained_steps=1000, device=torch.device("cpu"), move=lambda values: values
)
MODEL: Any = Linear()


def random_latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, *SHAPE, generator=torch.Generator().manual_seed(seed))


# What the target would change --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_residual_is_what_one_step_from_little_noise_changes(kind: str) -> None:
    levels = NoiseLevels.of(LCMScheduler(prediction_type=kind, **CONFIG))
    latents, indices = random_latents(1, 3), [4, 0, 7]
    found = residual_of(EDITOR, levels, MODEL, latents, indices)
    power = levels_by_hand()[200]
    alpha, sigma = power**0.5, (1 - power) ** 0.5
    for row, index, value in zip(latents.double().numpy(), indices, found, strict=True):
        generator = torch.Generator().manual_seed(0x5EED0FF5 + index)
        noise = torch.randn(SHAPE, generator=generator).double().numpy()
        noisy = alpha * row + sigma * noise
        predicted = 0.7 * noisy + 0.1
        clean = {
            "epsilon": (noisy - sigma * predicted) / alpha,
            "v_prediction": alpha * noisy - sigma * predicted,
            "sample": predicted,
        }[kind]
        assert value == pytest.approx(np.square(clean - row).mean(), rel=1e-5)


def test_the_residual_of_a_sample_does_not_depend_on_its_batch() -> None:
    levels = NoiseLevels.of(LCMScheduler(**CONFIG))
    latents = random_latents(2, 4)
    together = residual_of(EDITOR, levels, MODEL, latents, [0, 1, 2, 3])
    alone = [residual_of(EDITOR, levels, MODEL, latents[i : i + 1], [i])[0] for i in range(4)]
    assert together == pytest.approx(alone, rel=1e-6)
    assert len(set(together)) == 4


# Single steps ------------------------------------------------------------------------------------


def test_the_error_of_single_steps_is_that_of_their_answers() -> None:
    settings = EditSettings(timesteps=(999, 499, 59), steps=3)
    schedule = make_schedule(LCMScheduler(**CONFIG), settings)
    states, ends = random_latents(3, 3, 2), random_latents(4, 3, 2)
    found = endpoint_of(EDITOR, schedule, MODEL, states, ends)
    expected = np.zeros(2)
    powers = levels_by_hand()
    for step, timestep in enumerate((999, 499, 59)):
        alpha, sigma = powers[timestep] ** 0.5, (1 - powers[timestep]) ** 0.5
        # LCM's boundary conditions: sigma_data 0.5, timesteps scaled by 10.
        scaled = timestep * 10
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        noisy = states[step].double().numpy()
        predicted = 0.7 * noisy + 0.0005 * timestep
        answer = out * (noisy - sigma * predicted) / alpha + skip * noisy
        gap = answer - ends[step].double().numpy()
        expected += np.square(gap).mean(axis=(1, 2, 3)) / 3
    assert found == pytest.approx(expected, rel=1e-4)


def test_steps_of_a_solver_have_no_answers() -> None:
    def fail(*words: Any) -> None:
        raise AssertionError("nothing has to be evaluated for that")

    schedule = make_schedule(DDIMScheduler(**CONFIG), EditSettings(steps=3))
    states, ends = random_latents(3, 1, 2), random_latents(4, 1, 2)
    assert endpoint_of(EDITOR, schedule, fail, states, ends) == [None, None]  # type: ignore[arg-type]


# Pictures and latents ----------------------------------------------------------------------------


def result(values: Any, latents: Any, source: Any) -> EditResult:
    return EditResult(
        image=values.astype(np.float32),
        source=Image.fromarray(source),
        unet_rows=1,
        seconds=0.0,
        latents=latents,
        stages=StageTimes(0, 0, 0, 0),
        settings=EditSettings(),
    )


def test_distances_are_means_in_float64() -> None:
    values = np.full(SHAPE, 3000.25, np.float32)
    assert mean_square(values, np.full(SHAPE, 3000.0, np.float32)) == 0.0625
    tiny = np.full(SHAPE, 1e-30, np.float32)
    assert mean_square(tiny, np.zeros(SHAPE, np.float32)) == pytest.approx(1e-60, rel=1e-5)


def test_metrics_of_pictures_and_latents_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    edits = [Sample(Edit(None, "x"), 0)] * 2
    results, references = [], {}
    for index in range(2):
        source = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        latents = rng.normal(size=SHAPE).astype(np.float32)
        results.append(result(rng.random((16, 24, 3)), latents, source))
        ends = rng.normal(size=(3, *SHAPE)).astype(np.float32)
        references[index] = SampleReference(ends, ends)
    names = ["path", "l1", "psnr", "ssim", "residual"]
    found = measure_samples(results, edits, references, names)
    assert list(found) == ["path", "l1", "psnr", "ssim"]
    for index, each in enumerate(results):
        picture = np.round(each.image.astype(np.float64) * 255) / 255
        source = np.asarray(each.source) / 255
        gap = each.latents.astype(np.float64) - references[index].ends[-1].astype(np.float64)
        assert found["path"][index] == pytest.approx(np.square(gap).mean())
        assert found["l1"][index] == pytest.approx(np.abs(picture - source).mean(), abs=1e-4)
        error = np.square(picture - source).mean()
        assert found["psnr"][index] == pytest.approx(10 * math.log10(1 / error), abs=1e-3)
        expected = structural_similarity(picture, source, channel_axis=2, data_range=1.0)
        assert found["ssim"][index] == pytest.approx(expected, abs=1e-3)
    assert list(measure_samples(results, edits, None, names)) == ["l1", "psnr", "ssim"]
    assert measure_samples(results, edits, references, []) == {}


def test_a_picture_that_is_its_source_has_no_psnr() -> None:
    source = np.full((16, 16, 3), 51, np.uint8)
    same = result(np.full((16, 16, 3), 0.2), np.zeros(SHAPE, np.float32), source)
    found = measure_samples([same], [Sample(Edit(None, "x"), 0)], None, ["psnr", "l1"])
    assert found == {"l1": (0.0,), "psnr": (None,)}


def test_right_is_what_is_near_to_any_known_answer(tmp_path: Path) -> None:
    for name, level in (("black", 0), ("grey", 128), ("white", 255)):
        # Of another size than the edit: it is compared at the edit's.
        Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / f"{name}.png")
    grey = result(
        np.full((16, 16, 3), 0.55), np.zeros(SHAPE, np.float32), np.zeros((16, 16, 3), np.uint8)
    )

    def right(*names: str, limit: float = 0.1) -> float | None:
        paths = tuple(tmp_path / f"{name}.png" for name in names)
        edit = Edit(None, "x", expected=paths, expected_limit=limit)
        samples = [Sample(edit, 0), Sample(Edit(None, "y", expected=paths), 0)]
        found = measure_samples([grey, grey], samples, None, [])
        return found["right"][0]

    assert right("grey") == 1
    assert right("black", "grey") == 1
    assert right("black", "white") == 0
    # It is 0.55 - 128 / 255 away.
    assert right("grey", limit=0.04) == 0
    assert right("grey", limit=0.06) == 1
    mixed = [
        Sample(Edit(None, "x"), 0),
        Sample(Edit(None, "x", expected=(tmp_path / "grey.png",)), 0),
    ]
    assert measure_samples([grey, grey], mixed, None, [])["right"] == (None, 1.0)
    assert "right" not in measure_samples([grey], mixed[:1], None, [])


# What is refused ---------------------------------------------------------------------------------


def test_names_of_metrics_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_metrics(["l1", "path", "l1"]) == ("l1", "path")
    assert check_metrics([]) == ()
    with pytest.raises(RecipeError) as caught:
        check_metrics(["beauty", "right", "l1"])
    assert caught.value.problems == tuple(
        f"'{name}' is no metric; there are path, endpoint, residual, l1, psnr, ssim"
        for name in ("beauty", "right")
    )
    monkeypatch.setattr(measures, "has_ssim", lambda: False)
    with pytest.raises(RecipeError, match=r"instruct-merge\[metrics\]"):
        check_metrics(["ssim"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_named(value: float) -> None:
    values = {"l1": (1.0, None), "path": (0.5, value)}
    with pytest.raises(VerificationError, match=f"weight=9: path of sample 1 is {value}, not a"):
        check_finite(values, "weight=9")
    check_finite({"path": (0.5, None)}, "weight=9")
    latents = [np.zeros(SHAPE, np.float32), np.full(SHAPE, value, np.float32)]
    with pytest.raises(VerificationError, match="weight=9: the latents of sample 1 are not finite"):
        check_latents(latents, "weight=9")
    check_latents(latents[:1], "weight=9")
