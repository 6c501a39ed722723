"""Models that several test modules share, made once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

try:
    from hypothesis import settings
except ModuleNotFoundError:
    # A machine with a GPU may have only what the CUDA tests themselves need.
    pass
else:
    # A busy machine is no failure; what a test may cost is decided by its number of examples.
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where torch finds none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the mini UNets and a recipe over them."""
    from tests.mini import write_models, write_recipe

    write_models(tmp_path)
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target, base, distilled and two LoRAs of Stable Diffusion 1.5's structure."""
    from scripts.make_tiny import make_sd15

    folder = tmp_path_factory.mktemp("tiny") / "sd15"
    make_sd15(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Stable Diffusion XL's structure."""
    from scripts.make_tiny import make_sdxl

    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    make_sdxl(folder)
    return folder


@pytest.fixture(scope="module")
def single(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tensors of a whole single file, by key."""
    from safetensors.torch import load_file

    from merge import convert

    path = tmp_path_factory.mktemp("single") / "s.safetensors"
    convert(tiny_sd15 / "target", path)
    return load_file(path)
