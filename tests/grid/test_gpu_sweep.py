"""Cells on a GPU; run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from merge import Inputs, sweep

pytestmark = pytest.mark.gpu


def test_cells_on_a_gpu_have_the_bytes_of_the_cpu_and_nearly_its_numbers(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    models = {role: str(tiny_sd15 / role) for role in ("base", "distilled", "target")}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump({"name": "tiny", "models": models, "verify": {"resolution": 64}})
    )
    options: dict[str, Any] = {
        "inputs": Inputs(samples=4),
        "metrics": ("path", "endpoint", "residual"),
    }
    there = sweep(
        recipe, ["weight=0,0.5,1", "steps=2"], out=tmp_path / "cuda", device="cuda", **options
    )
    here = sweep(
        recipe, ["weight=0,0.5,1", "steps=2"], out=tmp_path / "cpu", device="cpu", **options
    )
    assert there.device == "cuda float16"
    for index, found in there.measured.items():
        assert found.sha256 == here.measured[index].sha256
        assert found.digest == here.measured[index].digest
        for name in options["metrics"]:
            assert found.mean(name) == pytest.approx(here.measured[index].mean(name), rel=0.1)
