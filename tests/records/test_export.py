"""What is written around the merged weights: configs as diffusers has them, and the records."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge.errors import CheckpointError
from merge.family.stable_diffusion import SD1
from merge.json_files import json_bytes
from merge.plan.build import build_plan
from merge.plan.export import ExportFiles, plan_export, scheduler_config
from merge.recipe.load import load_recipe
from merge.recipe.schema import DistilledRef, ModelRef, Models, Recipe, SchedulerSpec
from merge.records.folder import OutputRecords
from merge.records.lock.write import build_lock
from merge.records.manifest import FileRecord, InputDigests, build_manifest, recipe_digest
from merge.sources.model import ResolvedModel, SourceFile, Sources
from merge.sources.resolve import resolve_sources
from tests.mini import write_models

# Scheduler configs as they lie in published folders.
PUBLISHED: dict[str, dict[str, Any]] = {
    "euler ancestral": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.12.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "pndm": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "ddim": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": False,
        "clip_sample_range": 2.0,
        "dynamic_thresholding_ratio": 0.9,
        "num_train_timesteps": 500,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.5,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "thresholding": True,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    },
    "betas": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.30.0",
        "interpolation_type": "linear",
        "num_train_timesteps": 4,
        "timestep_spacing": "leading",
        "trained_betas": [0.1, 0.2, 0.3, 0.4],
        "use_karras_sigmas": False,
    },
}


def written_scheduler(
    spec: SchedulerSpec, target: dict[str, Any], version: str | None
) -> dict[str, Any]:
    return scheduler_config(spec, target, version, SD1.scheduler_keys)


def values_of(scheduler: Any) -> dict[str, Any]:
    """Return what a scheduler was made with, for every argument of its class."""
    names = list(inspect.signature(type(scheduler).__init__).parameters)[1:]
    return {name: scheduler.config[name] for name in names if name != "kwargs"}


@pytest.mark.parametrize("class_name", ["LCMScheduler", "TCDScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("source", PUBLISHED)
def test_the_scheduler_is_the_one_that_diffusers_makes(source: str, class_name: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, class_name)
    target = PUBLISHED[source]
    expected = values_of(scheduler.from_config(dict(target)))
    # As it is loaded again: through JSON on the disk.
    config = json.loads(json_bytes(written_scheduler(SchedulerSpec(class_name), target, None)))
    assert config["_class_name"] == class_name
    assert config["_diffusers_version"] == target["_diffusers_version"]
    assert values_of(scheduler.from_config(config)) == expected
    # Something of the target is in it that no default would have brought.
    assert expected != values_of(scheduler())


@pytest.mark.parametrize("source", ["euler ancestral", "pndm"])
def test_the_timesteps_are_those_of_the_lcm_schedule(source: str) -> None:
    from diffusers import LCMScheduler

    config = written_scheduler(SchedulerSpec(), PUBLISHED[source], None)
    scheduler = LCMScheduler.from_config(config)
    scheduler.set_timesteps(4, original_inference_steps=50)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


def test_the_recipes_values_come_last() -> None:
    spec = SchedulerSpec("TCDScheduler", {"timestep_spacing": "trailing", "beta_end": 0.5})
    config = written_scheduler(spec, PUBLISHED["pndm"], None)
    assert (config["timestep_spacing"], config["beta_end"]) == ("trailing", 0.5)
    assert config["beta_start"] == 0.00085
    assert PUBLISHED["pndm"]["beta_end"] == 0.012


def test_a_scheduler_of_the_same_class_stays_as_it_is() -> None:
    target = {**PUBLISHED["pndm"], "something_new": [1]}
    config = written_scheduler(SchedulerSpec("PNDMScheduler"), target, "9.9")
    assert config == {**target, "prediction_type": "epsilon"}


def test_a_target_without_a_scheduler_gets_the_version_of_its_pipeline() -> None:
    assert written_scheduler(SchedulerSpec(), {}, "0.12.0") == {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.12.0",
        "prediction_type": "epsilon",
    }
    assert "_diffusers_version" not in written_scheduler(SchedulerSpec(), {}, None)


# The folder ------------------------------------------------------------------------------------


def export_of(models: Path, target: Path, **fields: Any) -> ExportFiles:
    refs = Models(
        ModelRef(path=str(target)),
        [DistilledRef(path=str(models / "distilled"))],
        ModelRef(path=str(models / "base")),
    )
    recipe = Recipe("r", refs, **fields)
    sources = resolve_sources(recipe)
    return plan_export(recipe, build_plan(recipe, sources), sources.target)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_index_names_the_pipeline_and_the_scheduler(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    models = request.getfixturevalue(f"tiny_{family}")
    export = export_of(models, models / "target", scheduler=SchedulerSpec("TCDScheduler"))
    assert set(export.written) == {
        *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"),
    }
    for data in export.written.values():
        tree = json.loads(data)
        assert data.decode() == json.dumps(tree, indent=2, sort_keys=True) + "\n"
    written = {name: json.loads(data) for name, data in export.written.items()}
    source = json.loads((models / "target" / "model_index.json").read_text())
    infix = "XL" if family == "sdxl" else ""
    assert written["model_index.json"] == {
        **source,
        "_class_name": f"StableDiffusion{infix}InstructPix2PixPipeline",
        "scheduler": ["diffusers", "TCDScheduler"],
    }
    assert written["scheduler/scheduler_config.json"]["_class_name"] == "TCDScheduler"
    unet = json.loads((models / "target" / "unet" / "config.json").read_text())
    assert written["unet/config.json"] == unet
    # Everything else is copied, and nothing is there twice.
    names = {
        path.relative_to(models / "target").as_posix()
        for path in (models / "target").rglob("*")
        if path.is_file()
    }
    assert set(export.copies) == names - set(export.written) - {
        "unet/diffusion_pytorch_model.safetensors"
    }
    for name, file in export.copies.items():
        assert file.path == models / "target" / name


def test_a_class_that_is_no_editor_is_corrected(tiny_sd15: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for path in (tiny_sd15 / "target").iterdir():
        (target / path.name).symlink_to(path)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").unlink()
    index |= {"_class_name": "StableDiffusionPipeline", "image_encoder": [None, None], "é": "ü"}
    (target / "model_index.json").write_text(json.dumps(index))
    data = export_of(tiny_sd15, target).written["model_index.json"]
    written = json.loads(data)
    assert written["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    assert written["image_encoder"] == [None, None]
    assert written["scheduler"] == ["diffusers", "LCMScheduler"]
    assert '"é": "ü"'.encode() in data


def test_a_unet_gives_a_unet(tiny_sd15: Path, tmp_path: Path) -> None:
    export = export_of(tiny_sd15, tiny_sd15 / "target" / "unet")
    assert (list(export.written), export.copies) == (["unet/config.json"], {})
    file = tiny_sd15 / "target" / "unet" / "diffusion_pytorch_model.safetensors"
    assert export_of(tiny_sd15, file) == ExportFiles({}, {})


# The recipe's digest ---------------------------------------------------------------------------


def model(role: str, *names: str, **fields: Any) -> ResolvedModel:
    files = tuple(SourceFile(name, Path("/models") / role / name, 10) for name in names)
    plain: dict[str, Any] = {
        **dict.fromkeys(("repo", "commit", "config", "scheduler", "pipeline")),
        "label": role,
        "root": Path("/models"),
        "is_folder": True,
        "variant": "",
    }
    return ResolvedModel(role=role, weights={"": files}, **{**plain, **fields})


SOURCES = Sources(
    model("target", "unet/t.safetensors"),
    (model("distilled[0]", "d-1.safetensors", "d-2.safetensors"), model("distilled[1]", "l")),
    model("base", "b.safetensors"),
)
DIGESTS: dict[tuple[str, str], str] = {
    ("target", "unet/t.safetensors"): "a" * 64,
    ("base", "b.safetensors"): "b" * 64,
    ("distilled[0]", "d-1.safetensors"): "c" * 64,
    ("distilled[0]", "d-2.safetensors"): "d" * 64,
    ("distilled[1]", "l"): "e" * 64,
}
RECIPE = Recipe(
    name="mine",
    models=Models(
        ModelRef(repo="a/target", revision="main"),
        [DistilledRef(path="/models/d"), DistilledRef(path="/models/l", weight=0.5)],
        ModelRef(path="/models/b"),
    ),
    block_weights={"down_blocks.*": 0.5, "up_blocks.*": 0.7},
    components=["unet"],
    exclude=["conv_in.*", "conv_out.*"],
)
EXPECTED = recipe_digest(RECIPE, SOURCES, DIGESTS)


def changed(value: object, **changes: Any) -> Any:
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]


def renamed(sources: Sources) -> Sources:
    """Give every model another name, place and origin, with the same files in the same order."""

    def move(model: ResolvedModel) -> ResolvedModel:
        files = tuple(
            changed(file, path=Path("/elsewhere") / file.name) for file in model.main_files
        )
        place = {"root": Path("/elsewhere"), "repo": "x/y", "commit": "1" * 40}
        return changed(model, label="other", weights={"": files}, variant="fp16", **place)

    assert sources.base is not None
    return Sources(move(sources.target), tuple(map(move, sources.distilled)), move(sources.base))


SAME: dict[str, Callable[[], tuple[Recipe, Sources, InputDigests]]] = {
    "name": lambda: (changed(RECIPE, name="other"), SOURCES, DIGESTS),
    "places": lambda: (RECIPE, renamed(SOURCES), DIGESTS),
    "revision": lambda: (
        changed(RECIPE, models=changed(RECIPE.models, target=ModelRef(path="/x", variant="fp16"))),
        SOURCES,
        DIGESTS,
    ),
    "scheduler": lambda: (
        changed(RECIPE, scheduler=SchedulerSpec("X", {"a": 1})),
        SOURCES,
        DIGESTS,
    ),
    "verify": lambda: (
        changed(RECIPE, verify=changed(RECIPE.verify, steps=9)),
        SOURCES,
        DIGESTS,
    ),
    "folder": lambda: (
        changed(RECIPE, output=changed(RECIPE.output, folder="/elsewhere")),
        SOURCES,
        DIGESTS,
    ),
    "order of patterns": lambda: (
        changed(
            RECIPE,
            exclude=RECIPE.exclude[::-1],
            block_weights=dict(reversed(RECIPE.block_weights.items())),
        ),
        SOURCES,
        DIGESTS,
    ),
    "order of digests": lambda: (RECIPE, SOURCES, dict(reversed(DIGESTS.items()))),
    "other files": lambda: (RECIPE, SOURCES, {**DIGESTS, ("target", "vae/v"): "f" * 64}),
}


@pytest.mark.parametrize("case", SAME)
def test_the_digest_does_not_depend_on(case: str) -> None:
    recipe, sources, digests = SAME[case]()
    assert recipe_digest(recipe, sources, digests) == EXPECTED


CHANGED_FIELDS: dict[str, Any] = {
    "method": "other",
    "params": {"density": 0.5},
    "weight": 0.9999999999999999,
    "components": ["unet", "text_encoder"],
    "channel_rule": "first",
    "block_weights": {"down_blocks.*": 0.5},
    "exclude": ["conv_in.*"],
    "guidance_embedding": "error",
    "bake_guidance": 8.0,
    "compute_dtype": "float64",
    "out_dtype": "bfloat16",
    "on_overflow": "clamp",
    "output": changed(RECIPE.output, other_dtype="float16"),
}


@pytest.mark.parametrize("field", CHANGED_FIELDS)
def test_the_digest_depends_on_the_field(field: str) -> None:
    recipe = changed(RECIPE, **{field: CHANGED_FIELDS[field]})
    assert recipe_digest(recipe, SOURCES, DIGESTS) != EXPECTED


@pytest.mark.parametrize("key", DIGESTS, ids="/".join)
def test_the_digest_depends_on_every_input(key: tuple[str, str]) -> None:
    assert recipe_digest(RECIPE, SOURCES, {**DIGESTS, key: "0" * 64}) != EXPECTED


def test_the_digest_depends_on_who_is_who() -> None:
    assert SOURCES.base is not None
    found = {EXPECTED}
    first, second = SOURCES.distilled
    # The same five hashes, in other roles.
    for target, base, distilled in (
        (SOURCES.base, SOURCES.target, (first, second)),
        (SOURCES.target, None, (first, second)),
        (SOURCES.target, SOURCES.base, (second, first)),
        (
            SOURCES.target,
            SOURCES.base,
            (changed(first, weights={"": first.main_files[::-1]}), second),
        ),
    ):
        found.add(recipe_digest(RECIPE, Sources(target, distilled, base), DIGESTS))
    weights = [changed(ref, weight=0.25) for ref in RECIPE.models.distilled]
    recipe = changed(RECIPE, models=changed(RECIPE.models, distilled=weights))
    found.add(recipe_digest(recipe, SOURCES, DIGESTS))
    assert len(found) == 6
    assert all(len(digest) == 64 for digest in found)


def test_the_digest_of_a_recipe_never_changes() -> None:
    # Lock files and published checkpoints hold it.
    assert EXPECTED == "35a74f4b465cafa9e57c9ec9568b0e3a6ac8e0311a185323ca731ab9dc73c0df"


# Lock and manifest -----------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path: Path) -> tuple[Recipe, dict[str, Any], dict[str, Any], str]:
    """A recipe full of local paths, the parsed lock and manifest, and their text."""
    folder = tmp_path / "private name"
    write_models(folder)
    tree = {
        "name": "mini",
        "models": {
            "base": {"path": "./base", "sha256": {}},
            "distilled": [
                {"path": str(folder / "distilled" / "diffusion_pytorch_model.safetensors")},
            ],
            "target": {"path": "target", "config": "./target"},
        },
        "output": {"folder": str(folder / "out")},
        "verify": {"edits": [{"image": "./pictures/ü.png", "instruction": "a: b"}]},
    }
    (folder / "mini.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(folder / "mini.yaml")
    sources = resolve_sources(recipe)
    digests = {
        (model.role, file.name): f"{index}" * 64
        for index, model in enumerate(sources.models)
        for file in model.files
    }
    plan = build_plan(recipe, sources)
    lock = build_lock(recipe, sources, digests)
    files = {"b": FileRecord(2, "b" * 64), "a": FileRecord(1, "a" * 64)}
    manifest = build_manifest(plan, sources, digests, "f" * 64, files, {"k": 3})
    text = lock.decode() + manifest.decode()
    return recipe, yaml.safe_load(lock), json.loads(manifest), text


Records = tuple[Recipe, dict[str, Any], dict[str, Any], str]


def test_records_hold_no_place_of_this_machine(records: Records, tmp_path: Path) -> None:
    recipe, lock, _, text = records
    # The recipe that they are made of is full of it.
    assert str(tmp_path) in str(recipe)
    assert str(tmp_path) not in text
    assert "private name" not in text
    assert lock["recipe"]["output"]["folder"] == "outputs/mini"
    assert lock["recipe"]["verify"]["edits"][0]["image"] == "ü.png"
    assert lock["recipe"]["models"]["target"] == {
        "path": "target",
        "config": "./target",
        "sha256": {},
    }
    assert lock["recipe"]["models"]["distilled"] == [
        {"path": "diffusion_pytorch_model.safetensors", "sha256": {}, "weight": 1.0},
    ]


def test_records_hold_every_input_by_its_digest(records: Records) -> None:
    _, lock, manifest, _ = records
    assert manifest["inputs"] == lock["models"]
    assert {role: entry["name"] for role, entry in lock["models"].items()} == {
        "target": "target",
        "base": "base",
        "distilled": "diffusion_pytorch_model.safetensors",
    }
    for index, role in enumerate(("target", "base", "distilled")):
        files = lock["models"][role]["files"]
        weights = files.pop("diffusion_pytorch_model.safetensors")
        assert weights["sha256"] == f"{index}" * 64
        assert weights["size"] > 1000
        # The configs of folders decide what is written too.
        assert files.keys() == (set() if role == "distilled" else {"config.json"})
    assert manifest["files"] == {
        "a": {"size": 1, "sha256": "a" * 64},
        "b": {"size": 2, "sha256": "b" * 64},
    }
    assert manifest["counts"] == {"delta": 7, "lora": 0, "copy": 1, "cast": 0, "bake": 0}
    assert manifest["recipe_digest"] == "f" * 64
    assert manifest["overflows"] == {"k": 3}
    assert manifest["schema_version"] == lock["lock_version"] == 1


def test_a_locked_recipe_is_a_recipe(records: Records, tmp_path: Path) -> None:
    recipe, lock, _, _ = records
    path = tmp_path / "private name" / "again.yaml"
    path.write_text(yaml.safe_dump(lock["recipe"]))
    again = load_recipe(path)
    assert again.verify.edits[0].instruction == recipe.verify.edits[0].instruction
    same = ("name", "method", "weight", "channel_rule", "out_dtype", "scheduler", "block_weights")
    for field in same:
        assert getattr(again, field) == getattr(recipe, field)
    assert again.models.base == recipe.models.base


def test_a_hub_model_is_locked_at_its_commit() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    target = changed(SOURCES.target, repo="a/target", label="a/target", commit=commit)
    lock = yaml.safe_load(build_lock(RECIPE, changed(SOURCES, target=target), DIGESTS))
    assert lock["recipe"]["models"]["target"] == {
        "repo": "a/target",
        "revision": commit,
        "sha256": {},
    }
    assert lock["models"]["target"] == {
        "repo": "a/target",
        "commit": commit,
        "files": {"unet/t.safetensors": {"size": 10, "sha256": "a" * 64}},
    }
    assert [entry["weight"] for entry in lock["recipe"]["models"]["distilled"]] == [1.0, 0.5]


BAD_RECORDS = {
    "broken": "{",
    "deep": "[" * 100_000,
    "not utf-8": '"\udcff"',
    "list": "[1]",
    "no files": '{"recipe": 1}',
    "no digest": '{"files": {"a": {"size": 1}}, "recipe": 1}',
    "no size": '{"files": {"a": {"sha256": "0"}}, "recipe": 1}',
    "no record": '{"files": {"a": 1}, "recipe": 1}',
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_records_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    data = BAD_RECORDS[case].encode(errors="surrogateescape")
    records = OutputRecords(tmp_path)
    for name, record in (("merge_manifest.json", "manifest"), ("recipe.lock.yaml", "recipe")):
        assert getattr(records, record) is None
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{name} (cannot be read|is no|holds no )"):
            getattr(records, record)
