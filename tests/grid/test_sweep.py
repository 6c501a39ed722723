"""Sweeps of tiny pipelines: their bytes are those of runs, and their pictures those of edits."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from merge import convert, load_recipe, run_recipe
from merge.background.digest_process import DigestProcess
from merge.editor.batches import edit
from merge.editor.load import load_editor
from merge.editor.settings import EditSettings
from merge.grid import bench
from merge.grid.inputs import Inputs
from merge.grid.sweep import plan_sweep
from merge.run.in_memory import MemoryMerger
from merge.verify.drawings import draw_picture
from merge.verify.model import Edit
from tests.grid.small import ONE, TWO, measure, read, rows_of, write_recipe

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


# The bytes of a run -----------------------------------------------------------------------------


def check_bytes(recipe: Path, axes: list[str], out: Path) -> None:
    """Measure a grid, and run each of its cells by the command that it gives."""
    measure(recipe, axes, out / "sweep", metrics=["l1"])
    tree = read(out / "sweep")
    assert tree["complete"] is True
    hashes = set()
    for cell in tree["cells"]:
        assert cell["command"][:3] == ["instruct-merge", "run", str(recipe)]
        words = cell["command"][3:]
        folder = run_recipe(
            # A run refuses a weight of 0, which a curve wants.
            load_recipe(recipe, [*words, "allow_noop=true"]),
            out / "run",
            device="cpu",
            overwrite=True,
            verify=False,
        ).folder
        manifest = json.loads((folder / "merge_manifest.json").read_text())
        assert cell["recipe_digest"] == manifest["recipe_digest"], cell["words"]
        assert cell["sha256"] == hashlib.sha256((folder / UNET).read_bytes()).hexdigest()
        hashes.add(cell["sha256"])
    assert len(hashes) == len(tree["cells"])


@pytest.mark.parametrize(
    ("arch", "axes", "changes"),
    [
        ("sd15", ["weight=0,0.75", "out_dtype=float32"], {}),
        ("sd15", ["block_weights[M00]=0,0.5", "weight=0.75"], {}),
        ("sd15", ["method=train_difference,ties"], {}),
        ("sd15", ["params={density: 0.2},{density: 0.7}"], {"method": "ties"}),
        ("sd15", ["exclude=[],[conv_out.*,mid_block.*]"], {}),
        ("sd15", ["models.distilled[0].weight=0.5,-1"], {"lora": "lora_peft.safetensors"}),
        ("sdxl", ["weight=0.5,1"], {}),
        ("sdxl", ["weight=0.5,1"], {"lora": "lora_kohya.safetensors"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_each_cell_has_the_bytes_of_a_run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    arch: str,
    axes: list[str],
    changes: dict[str, Any],
) -> None:
    models = request.getfixturevalue(f"tiny_{arch}")
    check_bytes(write_recipe(tmp_path, models, **changes), axes, tmp_path)


def test_models_may_be_an_axis(tiny_sd15: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_sd15 / "distilled", tmp_path / "other"))
    path = other / Path(UNET).name
    tensors = {key: value + 0.01 for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    recipe = write_recipe(tmp_path, tiny_sd15)
    axes = [f"models.distilled={tiny_sd15 / 'distilled'},{other}", "out_dtype=bfloat16"]
    check_bytes(recipe, axes, tmp_path)


@pytest.fixture(scope="module")
def pipelines(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and distilled with a text encoder each, beside the target."""
    root = tmp_path_factory.mktemp("pipelines")
    shutil.copytree(tiny_sd15 / "target", root / "target")
    text = load_file(root / "target" / TEXT)
    generator = torch.Generator().manual_seed(3)
    for role in ("base", "distilled"):
        shutil.copytree(tiny_sd15 / role, root / role / "unet")
        (root / role / "text_encoder").mkdir()
        for value in text.values():
            if value.is_floating_point():
                value += torch.randn(value.shape, generator=generator) * 0.01
        save_file(text, root / role / TEXT, {"format": "pt"})
    return root


def test_text_encoders_are_merged_beside(pipelines: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, pipelines)
    check_bytes(recipe, ["components=[unet],[unet,text_encoder]", "weight=0.75"], tmp_path)
    tree = read(tmp_path / "sweep")
    # Another text encoder makes another picture.
    first, second = (
        (tmp_path / "sweep" / cell["pictures"][0]).read_bytes() for cell in tree["cells"]
    )
    assert first != second


def test_a_single_file_may_be_the_target(tiny_sd15: Path, tmp_path: Path) -> None:
    convert(tiny_sd15 / "target", tmp_path / "one.safetensors")
    target = {"path": str(tmp_path / "one.safetensors"), "config": str(tiny_sd15 / "target")}
    recipe = write_recipe(tmp_path, tiny_sd15, target=target)
    check_bytes(recipe, ["weight=0.5,1"], tmp_path)
    rows = plan_sweep(recipe, ["weight=0.5,1"], device="cpu", inputs=Inputs(ONE)).unet_rows
    assert rows > 0


def test_pickles_may_be_the_target(tiny_sd15: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny_sd15 / "target", tmp_path / "target"))
    for path in [*target.rglob("*.safetensors")]:
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    recipe = write_recipe(tmp_path, tiny_sd15, target=str(target), allow_pickle=True)
    check_bytes(recipe, ["weight=0.5,1"], tmp_path)


# The pictures of an edit ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_sd15)


def edited_alone(folder: Path, cell: dict[str, Any], edits: tuple[Edit, ...]) -> list[Any]:
    """Edit with an output, one picture at a time, as a cell's settings say."""
    settings = cell["settings"]
    wanted = EditSettings(
        steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        image_guidance_scale=settings["image_guidance_scale"],
        resolution=settings["resolution"],
        timesteps=None if settings["timesteps"] is None else tuple(settings["timesteps"]),
    )
    editor = load_editor(folder, device="cpu", scheduler="own")
    return [
        np.asarray(
            edit(editor, draw_picture(one.drawing, 64), one.instruction, wanted).to_pil()
        ).astype(int)
        for one in edits
    ]


def seen(folder: Path, name: str) -> Any:
    with Image.open(folder / name) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "in a batch"])
def test_pictures_are_those_of_an_edit_with_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    if not together:
        monkeypatch.setattr("merge.grid.bench._CPU_PIXELS", 64 * 64)
    axes = ["steps=2"] if together else ["steps=1,2", "guidance_scale=2"]
    axes.append("weight=0.75,1" if together else "weight=0,0.75")
    measure(recipe, axes, tmp_path / "sweep", TWO)
    tree = read(tmp_path / "sweep")
    folders: dict[str, Path] = {}
    for cell in tree["cells"]:
        if cell["sha256"] not in folders:
            words = [f"weight={cell['values']['weight']}", "allow_noop=true"]
            out = tmp_path / cell["sha256"]
            folders[cell["sha256"]] = out
            run_recipe(load_recipe(recipe, words), out, device="cpu", verify=False)
        expected = edited_alone(folders[cell["sha256"]], cell, TWO)
        for name, picture in zip(cell["pictures"], expected, strict=True):
            gap = np.abs(seen(tmp_path / "sweep", name) - picture)
            assert gap.max() <= (1 if together else 0), cell["words"]
    assert len(folders) == 2
    # What the model saw, and where the target itself leads, lie beside.
    for index, sample in enumerate(tree["samples"]):
        source = np.asarray(draw_picture(TWO[index].drawing, 64)).astype(int)
        assert np.array_equal(seen(tmp_path / "sweep", sample["source"]), source)
        assert seen(tmp_path / "sweep", sample["reference"]).shape == (64, 64, 3)


def test_timesteps_and_seeds_decide_the_pictures(recipe: Path, tmp_path: Path) -> None:
    axes = ["timesteps=999/499,999", "seed=0,1"]
    measure(recipe, axes, tmp_path / "sweep")
    cells = read(tmp_path / "sweep")["cells"]
    pictures = {(tmp_path / "sweep" / cell["pictures"][0]).read_bytes() for cell in cells}
    assert len(pictures) == 4
    assert [cell["values"]["timesteps"] for cell in cells[::2]] == [[999, 499], [999]]
    assert len({cell["sha256"] for cell in cells}) == 1
    assert [cell["unet_rows"] for cell in cells] == [2, 2, 1, 1]
    assert [sample["seed"] for sample in read(tmp_path / "sweep")["samples"]] == [None]


# What is done, and how often --------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, tuple[int, str]]:
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_inputs_are_hashed_once_and_weights_merged_once(
    tiny_sd15: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    merges: list[str] = []
    loaded: list[object] = []
    real_load = bench.load_editor
    real_digest, real_merge = DigestProcess.__init__, MemoryMerger.merge

    def count_digests(self: DigestProcess, paths: Any, *rest: Any) -> None:
        hashed.extend(paths)
        real_digest(self, paths, *rest)

    def count_merges(self: MemoryMerger, prepared: Any, *rest: Any) -> None:
        merges.append(prepared.digest)
        real_merge(self, prepared, *rest)

    def count_loads(*words: Any, **options: Any) -> Any:
        loaded.append(words)
        return real_load(*words, **options)

    monkeypatch.setattr(bench, "load_editor", count_loads)
    monkeypatch.setattr(DigestProcess, "__init__", count_digests)
    monkeypatch.setattr(MemoryMerger, "merge", count_merges)
    other = Path(shutil.copytree(tiny_sd15 / "distilled", tmp_path / "other"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = contents(tiny_sd15)
    axes = ["weight=0.5,1", f"models.distilled={tiny_sd15 / 'distilled'},{other}"]
    told: list[tuple[str, int, int]] = []
    measure(recipe, axes, Path("out"), on_progress=lambda *words: told.append(words))
    # Target, base and two distilled models, each once; what is copied is not hashed at all.
    assert len(hashed) == len(set(hashed))
    name = Path(UNET).name
    unets = [*(tiny_sd15 / role / name for role in ("base", "distilled")), other / name]
    weights = sorted(path for path in hashed if path.suffix == ".safetensors")
    assert weights == sorted([*unets, tiny_sd15 / "target" / UNET])
    # The same bytes under two names are the same weights: by digest, not by place.
    tree = read(Path("out"))
    assert len({cell["recipe_digest"] for cell in tree["cells"]}) == 2
    # 2 weights of 2 sets of models, and the target's own of each before the cells and after them.
    cells = [digest for digest in merges if digest in {c["recipe_digest"] for c in tree["cells"]}]
    assert len(cells) == 4
    assert len(merges) - len(cells) == 4
    assert len(loaded) <= 6
    assert contents(tiny_sd15) == before
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
    assert [*(tmp_path / "scratch").iterdir()] == []
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("images", "sweep.csv", "sweep.html", "sweep.json")
    ]
    assert rows_of(told)[0] == rows_of(told)[1]


def test_what_only_changes_the_edit_merges_no_second_time(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[str] = []
    real = MemoryMerger.merge

    def count(self: MemoryMerger, prepared: Any, *rest: Any) -> None:
        merges.append(prepared.digest)
        real(self, prepared, *rest)

    monkeypatch.setattr(MemoryMerger, "merge", count)
    axes = ["steps=1,2", "guidance_scale=1,2", "scheduler.class_name=LCMScheduler,DDIMScheduler"]
    measure(recipe, axes, tmp_path / "out", metrics=["l1"])
    assert len(merges) == 1
    assert len(read(tmp_path / "out")["cells"]) == 8


# A dry run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "metrics"),
    [
        (["weight=0.5,1", "steps=3"], ["path", "endpoint", "residual"]),
        pytest.param(
            ["timesteps=999/499,999/59", "guidance_scale=2"],
            ["path", "residual"],
            marks=pytest.mark.slow,
        ),
        (["scheduler.class_name=DDIMScheduler,TCDScheduler", "steps=2"], ["path", "endpoint"]),
        (["image_guidance_scale=1,1.5", "guidance_scale=2", "steps=1"], ["l1"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_dry_run_counts_the_rows_of_the_real_one(
    recipe: Path, tmp_path: Path, axes: list[str], metrics: list[str]
) -> None:
    inputs = Inputs(TWO, samples=3)
    before = contents(recipe.parent)
    found = plan_sweep(recipe, axes, device="cpu", inputs=inputs, metrics=metrics)
    assert contents(recipe.parent) == before
    told: list[tuple[str, int, int]] = []
    measure(
        recipe,
        axes,
        tmp_path / "out",
        inputs=inputs,
        metrics=metrics,
        on_progress=lambda *words: told.append(words),
    )
    assert (found.unet_rows, found.unet_rows) == rows_of(told)
    sweeps = [(done, total) for stage, done, total in told if stage == "sweep"]
    assert {total for _, total in sweeps} == {found.unet_rows}
    assert sweeps == sorted(sweeps)
    tree = found.tree
    assert (tree["cells"], tree["samples"], tree["device"]) == (
        len(read(tmp_path / "out")["cells"]),
        3,
        "cpu float32",
    )
    for name in ("merges", "unet_rows", "row_seconds", "memory_bytes", "batch"):
        assert tree[name] > 0, name
    assert len(found.lines) == 5
