"""Which of base and distilled the target descends from, against numpy."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from merge import load_recipe, run_recipe
from merge.engine import origin as origin_module
from merge.engine.origin import measure_origins
from merge.errors import IntegrityError
from tests.mini import Tensors, plan_of, random_tensors, write_models, write_recipe, write_unet


def distance(a: Tensors, b: Tensors) -> float:
    """Return the norm of a difference over the first's, of matrices that have one shape."""
    keys = [k for k, v in a.items() if v.ndim > 1 and k in b and v.shape == b[k].shape]
    x, y = (np.concatenate([t[k].double().numpy().ravel() for k in keys]) for t in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(x))


def deltas(models: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the difference of the parents where the target has the same shape, in float64."""
    return {
        key: models["distilled"][key].double() - base.double()
        for key, base in models["base"].items()
        if base.shape == models["target"][key].shape
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_distances_are_those_of_numpy(tmp_path: Path, dtype: torch.dtype, is_swapped: bool) -> None:
    models = write_models(tmp_path, dtype=dtype)
    names = ("distilled", "base") if is_swapped else ("base", "distilled")
    write_recipe(
        tmp_path,
        models={"base": f"./{names[0]}", "distilled": f"./{names[1]}", "target": "./target"},
    )
    (found,) = measure_origins(plan_of(tmp_path))
    base, distilled = (models[name] for name in names)
    assert found.to_base == pytest.approx(distance(models["target"], base), abs=1e-6)
    assert found.to_distilled == pytest.approx(distance(models["target"], distilled), abs=1e-6)
    # The cosine rule, from numpy's three distances.
    moved, other = (distance(models["target"], model) for model in (base, distilled))
    apart = distance(
        models["target"], {key: models["target"][key] + d for key, d in deltas(models).items()}
    )
    expected = (moved**2 + apart**2 - other**2) / (2 * apart**2)
    assert found.position == pytest.approx(expected, abs=1e-4)
    assert abs(found.position - is_swapped) < 0.2
    assert found.looks_swapped == is_swapped
    # conv_in has other channels and the rest are vectors.
    assert (found.role, found.tensors) == ("distilled", 5)


def test_a_sample_is_spread_and_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(place)
    monkeypatch.setattr(origin_module, "_TENSORS", 2)
    monkeypatch.setattr(origin_module, "_VALUES", 7)
    pairs = origin_module._sample(plan.tensors, "distilled")
    assert [tensor.key for tensor, _ in pairs] == [
        "conv_out.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    ]
    turned = tuple(
        dataclasses.replace(part, tensors=part.tensors[::-1]) for part in plan.components
    )
    # By key, whatever the order of the files.
    assert measure_origins(dataclasses.replace(plan, components=turned)) == measure_origins(plan)


def test_each_distilled_model_is_measured(place: Path) -> None:
    write_unet(place / "other", random_tensors(9))
    both = [{"path": "./other"}, {"path": "./distilled"}]
    write_recipe(place, models={"base": "./base", "distilled": both, "target": "./target"})
    first, second = measure_origins(plan_of(place))
    assert (first.role, second.role) == ("distilled[0]", "distilled[1]")
    # Unrelated to base: far from everything.
    assert not first.looks_swapped
    assert not second.looks_swapped
    assert first.to_distilled > 1 > second.to_distilled
    assert first.to_base == second.to_base


def test_what_is_not_finite_or_nothing_is_not_measured(place: Path) -> None:
    tensors = random_tensors(3, channels=8)
    write_unet(place / "target", {key: torch.zeros_like(value) for key, value in tensors.items()})
    assert measure_origins(plan_of(place)) == ()
    tensors["conv_out.weight"][0] = float("inf")
    write_unet(place / "target", tensors)
    assert measure_origins(plan_of(place)) == ()


def test_a_target_beyond_distilled_is_no_sign(place: Path) -> None:
    base = random_tensors(1, scale=0.1)
    wide = random_tensors(3, channels=8)
    far = {
        key: (wide[key] if key == "conv_in.weight" else value * 1.4) for key, value in base.items()
    }
    write_unet(place / "base", base)
    write_unet(place / "distilled", {key: value * 1.1 for key, value in base.items()})
    write_unet(place / "target", far)
    (found,) = measure_origins(plan_of(place))
    assert found.to_distilled < found.to_base
    assert found.position == pytest.approx(4, abs=0.02)
    assert not found.looks_swapped


def test_an_input_that_changes_meanwhile_is_told(place: Path) -> None:
    plan = plan_of(place)
    write_unet(place / "base", random_tensors(9))
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        measure_origins(plan)


def test_a_run_warns_before_it_merges(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="merge")
    run_recipe(load_recipe(place / "mini.yaml"), place / "right", device="cpu", verify=False)
    assert caplog.messages == []
    write_recipe(place, models={"base": "./distilled", "distilled": "./base", "target": "./target"})
    run_recipe(load_recipe(place / "mini.yaml"), place / "out", device="cpu", verify=False)
    (message,) = caplog.messages
    assert message.startswith("target is nearer to distilled than to base (0.0")
    assert message.endswith("base and distilled look swapped")


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_the_tiny_models_are_told_apart(
    request: pytest.FixtureRequest, tmp_path: Path, arch: str
) -> None:
    models = request.getfixturevalue(f"tiny_{arch}")
    roles = {"base": "base", "distilled": "distilled"}
    for swapped in (False, True):
        if swapped:
            roles = {"base": "distilled", "distilled": "base"}
        paths = {role: str(models / name) for role, name in roles.items()}
        write_recipe(tmp_path, models={**paths, "target": str(models / "target")})
        (found,) = measure_origins(plan_of(tmp_path))
        assert found.tensors == 64
        assert found.looks_swapped == swapped
