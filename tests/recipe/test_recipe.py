from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge.errors import RecipeError
from merge.recipe.bundled import bundled_folder, bundled_recipes, describe_recipe, find_recipe
from merge.recipe.load import load_recipe
from merge.recipe.schema import (
    DistilledRef,
    EditSpec,
    ModelRef,
    OutputSpec,
    Recipe,
    SchedulerSpec,
    VerifySpec,
)

BASE = """\
name: mine
models:
  base: org/base
  distilled: org/distilled
  target: org/target
"""
# A recipe without its models, to be given others.
NAME = "name: mine\n"

Load = Callable[..., Recipe]
Problems = Callable[..., tuple[str, ...]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(more: str = "", *overrides: str, base: str = BASE) -> Recipe:
        path = tmp_path / "recipes" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((base + more).encode())
        return load_recipe(path, overrides)

    return write_and_load


@pytest.fixture
def problems(load: Load) -> Problems:
    def refuse(more: str = "", *overrides: str, base: str = BASE) -> tuple[str, ...]:
        with pytest.raises(RecipeError, match=r"(?s)mine\.yaml is not valid:.*\nhint: ") as caught:
            load(more, *overrides, base=base)
        assert caught.value.exit_code == 3
        return caught.value.problems

    return refuse


def distilled(recipe: Recipe) -> DistilledRef:
    (only,) = recipe.models.distilled
    return only


# --------------------------------------------------------------------------------- what is read


def test_defaults(load: Load) -> None:
    recipe = load()
    assert recipe == Recipe(
        name="mine",
        models=recipe.models,
        method="add_difference",
        params={},
        weight=1.0,
        components=None,
        channel_rule="skip",
        block_weights={},
        exclude=[],
        guidance_embedding="drop",
        bake_guidance=None,
        compute_dtype="float32",
        out_dtype="float16",
        on_overflow="error",
        allow_noop=False,
        allow_pickle=False,
        scheduler=SchedulerSpec("LCMScheduler", {}),
        output=OutputSpec("outputs/mine", False, "keep"),
        verify=VerifySpec([], 4, 2.0, 1.0, 512, 50, None, [0]),
    )
    assert recipe.models.base == ModelRef(repo="org/base")
    assert recipe.models.distilled == [DistilledRef(repo="org/distilled", weight=1.0)]
    assert recipe.models.target == ModelRef(repo="org/target")


def test_every_field_can_be_given(load: Load, tmp_path: Path) -> None:
    recipe = load(
        """
models:
  base: null
  distilled:
    - {repo: a/b, revision: v1, file: x.safetensors, weight: 0.5}
    - {path: ./lora.safetensors, weight: -1}
  target: {path: ../t, subfolder: unet, variant: fp16, config: org/configs}
method: add_difference
params: {}
weight: 0.75
components: [unet]
channel_rule: first
block_weights: {"down_blocks.0.*": 0, "*.attn1.*": 2}
exclude: ["conv_out.*"]
guidance_embedding: error
compute_dtype: float32
out_dtype: keep
on_overflow: clamp
allow_noop: true
scheduler: {class_name: TCDScheduler, config: {timestep_spacing: trailing, steps: [1, 2.5, null]}}
output: {folder: "made/${name}-${out_dtype}"}
verify:
  edits: [{image: ./a.png, instruction: "make it #1: red", seed: 3, after_caption: red}]
  steps: 3
  guidance_scale: 1
  image_guidance_scale: 1.5
  resolution: 768
  original_inference_steps: 100
  timesteps: [999, 499, 0]
  seeds: [1, 9223372036854775807]
""",
        base=NAME,
    )
    folder = tmp_path / "recipes"
    assert recipe.models.base is None
    assert recipe.models.distilled == [
        DistilledRef(repo="a/b", revision="v1", file="x.safetensors", weight=0.5),
        DistilledRef(path=str(folder / "lora.safetensors"), weight=-1.0),
    ]
    assert recipe.models.target == ModelRef(
        path=str(folder / "../t"), subfolder="unet", variant="fp16", config="org/configs"
    )
    assert recipe.block_weights == {"down_blocks.0.*": 0.0, "*.attn1.*": 2.0}
    assert recipe.exclude == ["conv_out.*"]
    assert recipe.allow_noop is True
    assert recipe.scheduler.config == {"timestep_spacing": "trailing", "steps": [1, 2.5, None]}
    assert recipe.output.folder == "made/mine-keep"
    assert recipe.verify == VerifySpec(
        edits=[EditSpec(str(folder / "a.png"), "make it #1: red", 3, None, "red")],
        steps=3,
        guidance_scale=1.0,
        image_guidance_scale=1.5,
        resolution=768,
        original_inference_steps=100,
        timesteps=[999, 499, 0],
        seeds=[1, 2**63 - 1],
    )
    types = {type(value) for value in (recipe.weight, recipe.verify.guidance_scale)}
    assert types == {float}


def test_recipes_are_frozen_all_the_way_down(load: Load) -> None:
    recipe = load("verify: {edits: [{image: a.png, instruction: b}]}")
    parts = [
        *(
            recipe,
            recipe.models,
            recipe.models.base,
            recipe.models.target,
            *recipe.models.distilled,
        ),
        *(recipe.scheduler, recipe.output, recipe.verify, *recipe.verify.edits),
    ]
    for part in parts:
        field = dataclasses.fields(part)[0].name  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to .*'{field}'"):
            setattr(part, field, "other")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + BASE,
        BASE.replace("\n", "\r\n"),
        "\ufeff" + BASE.replace("\n", "\r\n"),
        "---\n" + BASE,
        "---\n" + BASE + "...\n",
        "# a comment\n\n" + BASE.rstrip(),
        "%YAML 1.1\n---\n" + BASE,
        "{name: mine, models: {base: org/base, distilled: org/distilled, target: org/target}}",
    ],
    ids=["BOM", "CRLF", "BOM and CRLF", "---", "--- and ...", "comment", "directive", "flow"],
)
def test_forms_of_the_same_text(load: Load, text: str) -> None:
    assert load(base=text) == load()


# ------------------------------------------------------------------------------ a closed schema


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("wieght: 0.5", "wieght: unknown key, did you mean 'weight'?"),
        ("out_dtyp: float16", "out_dtyp: unknown key, did you mean 'out_dtype'?"),
        ("zzz: 1", "zzz: unknown key"),
        ("Weight: 1", "Weight: unknown key, did you mean 'weight'?"),
        ("1: 1", "1: unknown key"),
        ("verify: {stepz: 4}", "verify.stepz: unknown key, did you mean 'steps'?"),
        ("output: {dir: x}", "output.dir: unknown key"),
        (
            "scheduler: {clas_name: x}",
            "scheduler.clas_name: unknown key, did you mean 'class_name'?",
        ),
        (
            "verify: {edits: [{image: a, instruction: b, sed: 1}]}",
            "verify.edits[0].sed: unknown key, did you mean 'seed'?",
        ),
        ("params: {density: 0.5}", "params.density: method add_difference has no such parameter"),
    ],
)
def test_unknown_keys_are_errors_with_a_suggestion(
    problems: Problems, more: str, problem: str
) -> None:
    assert problems(more) == (problem,)


def test_unknown_keys_of_models(problems: Problems) -> None:
    found = problems(
        """
models:
  bsae: a/b
  base: {repo: a/b, weight: 2}
  distilled: [{repo: a/b, wieght: 1}, {repo: a/b, varaint: x}]
  target: {repo: a/b, subfoldr: unet}
""",
        base=NAME,
    )
    assert found == (
        "models.bsae: unknown key, did you mean 'base'?",
        "models.base.weight: unknown key",
        "models.distilled[0].wieght: unknown key, did you mean 'weight'?",
        "models.distilled[1].varaint: unknown key, did you mean 'variant'?",
        "models.target.subfoldr: unknown key, did you mean 'subfolder'?",
    )


def test_all_problems_are_shown_at_once(problems: Problems) -> None:
    found = problems(
        """
models: {base: {repo: nope}, distilled: {path: ./x, revision: main}}
wieght: 1
weight: 12:30
out_dtype: flaot16
exclude: [a, [b]]
output: {folder: "${oc.env:HOME}"}
scheduler: {class_name: a-b}
verify: {steps: many, seeds: [-1], resolution: 4}
""",
        "block_weights[a]=nan",
        "no equals sign",
        base="name: Not Good\n",
    )
    assert found == (
        "weight: '12:30' is not a plain number",
        "verify.steps: 'many' is not a plain number",
        "block_weights.a: 'nan' is not a plain number",
        "override 'no equals sign' is not of the form key=value",
        "wieght: unknown key, did you mean 'weight'?",
        "exclude[1]: must be a single value, not ['b']",
        "output.folder: only plain ${key} may be used, not '${oc.env:HOME}'",
        "models.target: missing",
    )
    found = problems(
        """
models: {base: {repo: nope}, distilled: {path: ./x, revision: main}, target: a/b}
out_dtype: flaot16
scheduler: {class_name: a-b}
verify: {seeds: [-1], resolution: 4}
wieght: 1
""",
        base="name: Not Good\n",
    )
    assert found == (
        "wieght: unknown key, did you mean 'weight'?",
        "name: 'Not Good' must be lower-case letters, digits, `.`, `_` and `-`",
        (
            "models.base: 'nope' is no Hub id of the form org/name "
            "(a local path starts with `.`, `/` or `~`)"
        ),
        "models.distilled: revision and file belong to repo, not to path",
        (
            "out_dtype: 'flaot16' is not one of float16, bfloat16, float32, keep, "
            "did you mean 'float16'?"
        ),
        "scheduler.class_name: 'a-b' is no class name",
        "verify.resolution: 4 is not within 8 to 8192 pixels",
        "verify.seeds: -1 is not within 0 to 2^63 - 1",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {"name: missing", "models: missing"}),
        ("name: mine", {"models: missing"}),
        ("name: mine\nmodels: {}", {"models.target: missing", "models.distilled: missing"}),
        (BASE.replace("name: mine\n", ""), {"name: missing"}),
        (BASE + "verify: {edits: [{image: a}]}", {"verify.edits[0].instruction: missing"}),
    ],
)
def test_what_is_missing_is_named(problems: Problems, text: str, expected: set[str]) -> None:
    assert set(problems(base=text)) == expected


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("exclude: conv_in", "exclude: must be a list such as [a, b], not 'conv_in'"),
        ("exclude: {a: b}", "exclude: must be a list such as [a, b], not {'a': 'b'}"),
        ("exclude: [{a: b}]", "exclude[0]: must be a single value, not {'a': 'b'}"),
        ("exclude: [a, null]", "exclude[1]: it has no value"),
        ("exclude: null", "exclude: field 'exclude' is not Optional"),
        ("block_weights: [a]", "block_weights: must be a mapping of names to values, not ['a']"),
        ("block_weights: {a: {b: 1}}", "block_weights.a: must be a single value, not {'b': 1}"),
        ("block_weights: {a: null}", "block_weights.a: it has no value"),
        ("weight: [1]", "weight: must be a single value, not [1]"),
        ("weight:", "weight: Incompatible value 'None' for field of type 'float'"),
        ("out_dtype: {a: b}", "out_dtype: must be a single value, not {'a': 'b'}"),
        ("verify: 4", "verify: must be a mapping of names to values, not 4"),
        ("verify: {steps: 4.5}", "verify.steps: Value '4.5' of type 'float' could not be"),
        ("verify: {seeds: 0}", "verify.seeds: must be a list such as [a, b], not 0"),
        ("verify: {seeds: [[1]]}", "verify.seeds[0]: must be a single value, not [1]"),
        ("verify: {edits: [a]}", "verify.edits[0]: must be a mapping of names to values, not 'a'"),
        ("verify: {edits: {image: a}}", "verify.edits: must be a list such as"),
        ("scheduler: LCMScheduler", "scheduler: must be a mapping of names to values"),
        ("params: [a]", "params: must be a mapping of names to values, not ['a']"),
        ("allow_noop: maybe", "allow_noop: Value 'maybe' is not a valid bool"),
    ],
)
def test_values_of_the_wrong_kind(problems: Problems, more: str, problem: str) -> None:
    (only,) = problems(more)
    assert only.startswith(problem)


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ("5", "models: must be a mapping of names to values, not 5"),
        ("{distilled: [null], target: a/b}", "models.distilled[0]: it has no value"),
        ("{distilled: [[a/b]], target: a/b}", "models.distilled[0]: must be a mapping"),
        ("{distilled: null, target: a/b}", "models.distilled: field 'distilled' is not"),
        ("{distilled: [], target: a/b}", "models.distilled: name at least one model"),
        ("{distilled: a/b, target: null}", "models.target: field 'target' is not Optional"),
        ("{distilled: a/b, target: {}}", "models.target: give either repo or path"),
        ("{distilled: a/b, target: {repo: a/b, path: c}}", "models.target: give either repo or"),
        ("{distilled: a/b, target: just-a-name}", "models.target: 'just-a-name' is no Hub id"),
        ("{distilled: a/b/c, target: a/b}", "models.distilled: 'a/b/c' is no Hub id"),
        ("{distilled: [a/b, ' a/b'], target: a/b}", "models.distilled[1]: ' a/b' is no Hub id"),
        ("{distilled: 'https://hf.co/a/b', target: a/b}", "models.distilled: 'https://hf.co"),
        ("{distilled: a/b, target: {path: x, file: y}}", "models.target: revision and file"),
        ("{distilled: a/b, target: {repo: a/b, file: ../y}}", "models.target.file: '../y' must"),
        ("{distilled: a/b, target: {repo: a/b, file: '..\\y'}}", "models.target.file: '..\\\\y'"),
        ("{distilled: a/b, target: {repo: a/b, file: 'C:y'}}", "models.target.file: 'C:y' must"),
        ("{distilled: a/b, target: {path: x, subfolder: /y}}", "models.target.subfolder: '/y'"),
        ("{distilled: a/b, target: {path: x, subfolder: ''}}", "models.target.subfolder: ''"),
        ("{distilled: a/b, target: {path: x, variant: a/b}}", "models.target.variant: 'a/b'"),
        (
            "{distilled: a/b, target: {path: x, sha256: {a: AB}}}",
            "models.target.sha256[a]: must be 64 lower-case hexadecimal digits",
        ),
        (
            "{distilled: a/b, target: {path: x, sha256: {a: {b: c}}}}",
            "models.target.sha256.a: must",
        ),
    ],
)
def test_models_that_cannot_be(problems: Problems, models: str, problem: str) -> None:
    (only,) = problems(f"models: {models}", base=NAME)
    assert only.startswith(problem)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("method: add_diff", "method: 'add_diff' is not one of add_difference, ties, dare"),
        ("method: slurp", "method: 'slurp' is not one of add_difference"),
        ("method: dare\nparams: {density: 0}", "params.density: 0 is not within 1e-06 to 1"),
        ("name: a/b", "name: 'a/b' must be lower-case"),
        ("name: .hidden", "name: '.hidden' must be lower-case"),
        ("components: [unet, vae]", "components: 'vae' is not one of unet, text_encoder"),
        ("components: [unet, unet]", "components: ['unet', 'unet'] - name what is merged, each"),
        ("components: []", "components: [] - name what is merged, each once"),
        ("channel_rule: frist", "channel_rule: 'frist' is not one of skip, first, error, did you"),
        ("exclude: ['']", "block_weights, exclude: an empty pattern matches nothing"),
        ("block_weights: {'': 1}", "block_weights, exclude: an empty pattern matches nothing"),
        ("guidance_embedding: bake", "guidance_embedding: bake needs bake_guidance"),
        (
            "guidance_embedding: bake\nbake_guidance: .inf",
            "bake_guidance: inf is not within 0 to 100",
        ),
        (
            "guidance_embedding: bake\nbake_guidance: -1",
            "bake_guidance: -1.0 is not within 0 to 100",
        ),
        ("bake_guidance: 7.5", "bake_guidance: it belongs to guidance_embedding: bake"),
        ("compute_dtype: float64", "compute_dtype: 'float64' is not one of float32"),
        ("out_dtype: fp16", "out_dtype: 'fp16' is not one of"),
        ("on_overflow: ignore", "on_overflow: 'ignore' is not one of error, clamp, keep_target"),
        ("output: {folder: ''}", "output.folder: '' is no path"),
        ("output: {other_dtype: float16}", "output.other_dtype: only keep is available"),
        ("verify: {steps: 0}", "verify.steps: 0 is not within 1 to original_inference_steps (50)"),
        ("verify: {steps: 51}", "verify.steps: 51 is not within 1 to original_inference_steps"),
        ("verify: {original_inference_steps: 1001}", "verify.original_inference_steps: 1001 is"),
        ("verify: {guidance_scale: -1}", "verify.guidance_scale: -1.0 is not a finite number"),
        ("verify: {image_guidance_scale: .inf}", "verify.image_guidance_scale: inf is not"),
        ("verify: {resolution: 8193}", "verify.resolution: 8193 is not within 8 to 8192"),
        ("verify: {timesteps: []}", "verify.timesteps: [] must fall strictly"),
        ("verify: {timesteps: [499, 999]}", "verify.timesteps: [499, 999] must fall strictly"),
        ("verify: {timesteps: [5, 5]}", "verify.timesteps: [5, 5] must fall strictly"),
        ("verify: {timesteps: [1000]}", "verify.timesteps: [1000] must fall strictly"),
        ("verify: {seeds: []}", "verify.seeds: name at least one seed"),
        ("verify: {seeds: [9223372036854775808]}", "verify.seeds: 9223372036854775808 is not"),
        ("verify: {edits: [{image: a, instruction: ' '}]}", "verify.edits[0].instruction: it is"),
        ("scheduler: {config: {a: .nan}}", "scheduler.config.a: it cannot be written as JSON"),
        ("scheduler: {config: {a: '${models}'}}", "scheduler.config.a: it cannot be written as"),
    ],
)
def test_values_out_of_range(problems: Problems, more: str, problem: str) -> None:
    base = BASE.replace(NAME, "") if more.startswith("name:") else BASE
    (only,) = problems(more, base=base)
    assert only.startswith(problem)


# -------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("1", 1.0), ("+1", 1.0), ("-0.5", -0.5), (".5", 0.5), ("5.", 5.0), ("0", 0.0)),
        *(("1e-3", 1e-3), ("1E5", 1e5), ("1e30", 1e30), ("3.4028234663852886e38", 3.4028235e38)),
        *(('"0.5"', 0.5), ("0.1", 0.1), ("00.5", 0.5)),
    ],
)
def test_plain_numbers_are_read(load: Load, text: str, expected: float) -> None:
    assert load(f"weight: {text}").weight == pytest.approx(expected, rel=1e-7)
    assert load("", f"weight={text}").weight == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    "text",
    [
        *("12:30", "1_000", "017", "-017", "0x10", "0b1", "0o17", "1_0.5", "190:20:30.15"),
        *('"12:30"', '"1_000"', "'017'", '" 5 "', "０１", "１２", "0,7", "1/2", "5%", "one"),
        *("on", "yes", "true", "nan", "inf", "infinity", "2020-01-01", "???", "1.0.0", "1e"),
    ],
)
def test_odd_numbers_are_refused(problems: Problems, text: str) -> None:
    found = problems(f"weight: {text}\nverify:\n  seeds:\n    - {text}\n  steps: {text}\n")
    written = text.strip("\"'")
    for field in ("weight", "verify.seeds[0]", "verify.steps"):
        assert f"{field}: {written!r} is not a plain number" in found
    assert f"weight: {written!r} is not a plain number" in problems("", f"weight={text}")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", ".NaN", "1e39", "-1e39", "1e400"])
def test_weights_must_fit_float32(problems: Problems, text: str) -> None:
    reason = "(is not a finite number|does not fit float32)"
    models = f"models: {{distilled: [a/b, {{repo: a/b, weight: {text}}}], target: a/b}}\n"
    found = "\n".join(problems(f"{models}weight: {text}\nblock_weights: {{x: {text}}}", base=NAME))
    for field in ("weight", r"block_weights\[x\]", r"models\.distilled\[1\]\.weight"):
        assert re.search(rf"^{field}: \S+ {reason}$", found, re.M)


def test_the_product_of_the_weights_must_fit_too(problems: Problems) -> None:
    models = "models: {distilled: {repo: a/b, weight: 1e20}, target: a/b}\n"
    assert problems(models + "weight: 1e20", base=NAME) == (
        "weight times models.distilled.weight: 1e+40 does not fit float32",
    )


# ---------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text",
    [
        *("0123456", "0e12345", "1234567", "1e5", "on", "off", "yes", "no", "true", "False"),
        *("1_000", "1.10", "0x1f", "2020-01-01", "007"),
    ],
)
def test_text_stays_as_written(load: Load, text: str) -> None:
    models = f"models: {{distilled: a/b, target: {{repo: a/b, revision: {text}}}}}\n"
    recipe = load(models, base=NAME)
    assert recipe.models.target.revision == text
    assert load("", f"models.target.revision={text}").models.target.revision == text


@pytest.mark.parametrize("text", ["0123456", "on", "12:30", "1_000", "1.10", ".5", "1.", "1e5"])
def test_text_of_lists_stays_as_written(load: Load, text: str) -> None:
    assert load(f"exclude: [{text}]").exclude == [text]
    assert load("", f"exclude=[{text}]").exclude == [text]


@pytest.mark.parametrize(
    "text",
    [
        *("../x", "a/../b", "a..b", "-x", "/x", "x/", "a//b", ".x", "x.", "a b", "a~1", "a^"),
        *("a:b", "a?", "a*", "a[0]", "a\\b", "@{1}", "a\tb"),
    ],
)
def test_revisions_that_git_cannot_have(problems: Problems, text: str) -> None:
    (problem,) = problems("", f"models.target.revision='{text}'")
    assert problem == f"models.target.revision: {text!r} is no branch, tag or commit"


@pytest.mark.parametrize("name", ["on", "0123456", "1e5", "true", "1.10", "007", "2020-01-01"])
def test_names_stay_as_written(load: Load, name: str) -> None:
    recipe = load(base=BASE.replace("mine", name))
    assert recipe.name == name
    assert recipe.output.folder == f"outputs/{name}"
    assert load("", f"name={name}").name == name


def test_keys_of_mappings_stay_as_written(load: Load) -> None:
    assert load("block_weights: {0123: 1, on: 2, 1.10: 3, 12:30: 4}").block_weights == {
        "0123": 1.0,
        "on": 2.0,
        "1.10": 3.0,
        "12:30": 4.0,
    }


@pytest.mark.parametrize(
    "text",
    [
        *("make it #1", "#hash", "a: b", "[x] and {y}", "*star", "&anchor x", "!tag x", "| pipe"),
        *("> quote", "- dash", "100%", "@at", "`tick`", "say 'hi'", "back\\slash", "é 😀", "???x"),
        *("a = b", "two\nlines", "1_000", "on", "null and void"),
    ],
)
def test_overrides_of_text_stay_as_written(load: Load, text: str) -> None:
    edits = "verify: {edits: [{image: a.png, instruction: x}]}"
    recipe = load(edits, f"verify.edits[0].instruction={text}")
    assert recipe.verify.edits[0].instruction == text


def test_quotes_around_an_override_are_yaml(load: Load) -> None:
    assert load("", "output.folder='a: b'").output.folder == "a: b"
    assert load("", 'output.folder="a\\tb"').output.folder == "a\tb"


@pytest.mark.parametrize("text", ["null", "~", "", "NULL"])
def test_null_is_no_text(load: Load, problems: Problems, text: str) -> None:
    assert load("", "models.target.variant=fp16").models.target.variant == "fp16"
    assert load("", f"models.target.variant={text}").models.target.variant is None
    assert problems("", f"out_dtype={text}") == (
        "out_dtype: Incompatible value 'None' for field of type 'str'",
    )


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("on", True),
        ("017", 15),
        ("1_0", 10),
        ("12:30", 750),
        ("0x1f", 31),
        ("!!binary aGk=", b"hi"),
    ],
)
def test_free_values_that_yaml_would_change_ask_for_quotes(
    problems: Problems, load: Load, value: str, read: object
) -> None:
    written = value.split(" ")[-1]
    problem = f"YAML reads {written!r} as {read!r}, put it in quotes"
    assert problems(f"scheduler: {{config: {{a: [{value}]}}}}") == (
        f"scheduler.config.a[0]: {problem}",
    )
    assert problems("", f"scheduler.config.a={value}") == (f"scheduler.config.a: {problem}",)
    assert load(f"scheduler: {{config: {{a: '{written}'}}}}").scheduler.config == {"a": written}


def test_free_values_that_yaml_keeps(load: Load) -> None:
    text = "{a: true, b: False, c: 1, d: -2.5, e: 1e-3, f: x, g: null}"
    config = {"a": True, "b": False, "c": 1, "d": -2.5, "e": 1e-3, "f": "x", "g": None}
    assert load(f"scheduler: {{config: {text}}}").scheduler.config == config


# --------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", {"repo": "org/name"}),
        ("org/name@main", {"repo": "org/name", "revision": "main"}),
        ("org/name@refs/pr/1", {"repo": "org/name", "revision": "refs/pr/1"}),
        ("org/name@0123456", {"repo": "org/name", "revision": "0123456"}),
        ("org/name.v1.5", {"repo": "org/name.v1.5"}),
        ("./folder", {"path": "{}/folder"}),
        ("../folder", {"path": "{}/../folder"}),
        (".hidden", {"path": "{}/.hidden"}),
        ("/abs/folder", {"path": "/abs/folder"}),
        ("~/models", {"path": "/home/me/models"}),
        ("~nobody-of-this-name/x", {"path": "{}/~nobody-of-this-name/x"}),
        ("model.safetensors", {"path": "{}/model.safetensors"}),
        ("sub/model.ckpt", {"path": "{}/sub/model.ckpt"}),
        ("a b/c.pt", {"path": "{}/a b/c.pt"}),
        ("./dir #1", {"path": "{}/dir #1"}),
    ],
)
def test_models_as_strings(
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: dict[str, str],
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    here = tmp_path / "here"
    (here / "org" / "name").mkdir(parents=True)  # whatever lies in the current folder
    monkeypatch.chdir(here)

    def fill(folder: Path) -> dict[str, str]:
        return {key: value.replace("{}", str(folder)) for key, value in expected.items()}

    quoted = json.dumps(text)
    recipe = load(f"models: {{base: {quoted}, distilled: [{quoted}], target: {quoted}}}", base=NAME)
    beside_the_recipe = fill(tmp_path / "recipes")
    assert recipe.models.base == ModelRef(**beside_the_recipe)
    assert recipe.models.target == ModelRef(**beside_the_recipe)
    assert recipe.models.distilled == [DistilledRef(**beside_the_recipe)]

    words = [f"models.{role}={text}" for role in ("base", "distilled", "target")]
    recipe = load("", *words)
    in_the_current_folder = fill(here)
    assert recipe.models.base == ModelRef(**in_the_current_folder)
    assert recipe.models.target == ModelRef(**in_the_current_folder)
    assert recipe.models.distilled == [DistilledRef(**in_the_current_folder)]


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_current_folder(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = """
models:
  base: {path: b}
  distilled: [{path: d0}, {path: d1}]
  target: {path: t.safetensors, config: ./config}
verify: {edits: [{image: i0.png, instruction: x}, {image: i1.png, instruction: y}]}
"""

    def paths(*overrides: str) -> list[str]:
        recipe = load(text, *overrides, base=NAME)
        models = recipe.models
        assert models.base is not None
        values = [models.base.path, *(ref.path for ref in models.distilled)]
        values += [models.target.path, models.target.config]
        values += [edit.image for edit in recipe.verify.edits]
        assert all(value is not None and Path(value).is_absolute() for value in values)
        return [os.path.relpath(str(value), tmp_path) for value in values]

    assert paths() == [
        *("recipes/b", "recipes/d0", "recipes/d1", "recipes/t.safetensors", "recipes/config"),
        *("recipes/i0.png", "recipes/i1.png"),
    ]
    # One value moves and its neighbours stay.
    assert paths("models.distilled[1].path=d", "verify.edits[0].image=./i.png") == [
        *("recipes/b", "recipes/d0", "here/d", "recipes/t.safetensors", "recipes/config"),
        *("here/i.png", "recipes/i1.png"),
    ]
    assert paths("models.target.config=../c", "models.distilled[0]=./d", "weight=2") == [
        *("recipes/b", "here/d", "recipes/d1", "recipes/t.safetensors", "c"),
        *("recipes/i0.png", "recipes/i1.png"),
    ]
    # Another field of a model, given on the command line, leaves its path where it was.
    assert paths("models.base.variant=fp16")[0] == "recipes/b"
    assert paths("models.distilled=[./x, ./y]", "models.base={path: z}")[:3] == [
        *("here/z", "here/x", "here/y")
    ]


def test_the_folder_of_the_output_is_left_to_the_run(load: Load) -> None:
    assert load("output: {folder: ./x}").output.folder == "./x"
    assert load("", "output.folder=../x").output.folder == "../x"


def test_a_recipe_behind_a_link_is_relative_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "mine.yaml").write_text(BASE.replace("org/base", "./base"))
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real" / "mine.yaml")
    recipe = load_recipe(tmp_path / "link.yaml")
    assert recipe.models.base == ModelRef(path=str(tmp_path / "real" / "base"))


# ------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("words", "look", "expected"),
    [
        (["weight=0.5"], lambda r: r.weight, 0.5),
        (["weight=0.5", "weight=0.25"], lambda r: r.weight, 0.25),
        (["weight=${verify.guidance_scale}"], lambda r: r.weight, 2.0),
        (["verify.steps=8"], lambda r: r.verify.steps, 8),
        (["verify.seeds=[3, 4]"], lambda r: r.verify.seeds, [3, 4]),
        (["verify.seeds=[3, 4]", "verify.seeds[1]=5"], lambda r: r.verify.seeds, [3, 5]),
        (["verify.timesteps=[999,499]"], lambda r: r.verify.timesteps, [999, 499]),
        (
            ["block_weights[down_blocks.0.*]=0.5"],
            lambda r: r.block_weights,
            {"down_blocks.0.*": 0.5},
        ),
        (["block_weights={a: 1, b: 0}"], lambda r: r.block_weights, {"a": 1.0, "b": 0.0}),
        (
            ["block_weights[*]=1", "block_weights[a.*]=0"],
            lambda r: r.block_weights,
            {"*": 1.0, "a.*": 0.0},
        ),
        (["block_weights[mid_block]=2"], lambda r: r.block_weights, {"mid_block": 2.0}),
        (["scheduler.config.beta=0.5"], lambda r: r.scheduler.config, {"beta": 0.5}),
        (["scheduler.config[a.b]=x"], lambda r: r.scheduler.config, {"a.b": "x"}),
        (["exclude=[conv_in.*]"], lambda r: r.exclude, ["conv_in.*"]),
        (["models.base=null"], lambda r: r.models.base, None),
        (
            ["models.target.revision=v1"],
            lambda r: r.models.target,
            ModelRef("org/target", revision="v1"),
        ),
        (
            ["models.target.sha256[unet/a.b]=" + "a" * 64],
            lambda r: r.models.target.sha256,
            {"unet/a.b": "a" * 64},
        ),
        (
            ["models.distilled.weight=0.5"],
            lambda r: distilled(r),
            DistilledRef("org/distilled", weight=0.5),
        ),
        (
            ["models.distilled[0].weight=0.5"],
            lambda r: distilled(r),
            DistilledRef("org/distilled", weight=0.5),
        ),
        (
            ["models.distilled={repo: a/b, weight: 2}"],
            lambda r: distilled(r),
            DistilledRef("a/b", weight=2.0),
        ),
        (
            ["models.distilled=[a/b, c/d@v1]"],
            lambda r: [m.repo for m in r.models.distilled],
            ["a/b", "c/d"],
        ),
        (["models[target]=a/b"], lambda r: r.models.target, ModelRef("a/b")),
        (["name=other"], lambda r: r.output.folder, "outputs/other"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, list) else "",
)
def test_overrides(
    load: Load, words: list[str], look: Callable[[Recipe], Any], expected: object
) -> None:
    assert look(load("", *words)) == expected


def test_an_override_replaces_only_what_it_names(load: Load) -> None:
    more = "verify: {steps: 8, seeds: [1, 2]}\nblock_weights: {a: 1, b: 2}"
    recipe = load(more, "verify.seeds[0]=9", "block_weights[b]=0")
    assert recipe.verify == VerifySpec(steps=8, seeds=[9, 2])
    assert recipe.block_weights == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("weight", "override 'weight' is not of the form key=value"),
        ("=5", "override '=5' is not of the form key=value"),
        ("", "override '' is not of the form key=value"),
        (".weight=1", "override '.weight=1' is not of the form"),
        ("weight.=1", "override 'weight.=1' is not of the form"),
        ("verify..steps=1", "override 'verify..steps=1' is not of the form"),
        ("verify.seeds[=1", "override 'verify.seeds[=1' is not of the form"),
        ("verify.seeds[]=1", "override 'verify.seeds[]=1' is not of the form"),
        ("block_weights[a.[01].b]=1", "override 'block_weights[a.[01].b]=1' is not of the form"),
        ("wieght=1", "wieght: unknown key, did you mean 'weight'?"),
        ("models.target.wieght=1", "models.target.wieght: unknown key"),
        (
            "verify.edits[0].image=a",
            "override 'verify.edits[0].image=a': there is no verify.edits[0]",
        ),
        ("models.distilled[1].weight=1", "override 'models.distilled[1].weight=1': there is no"),
        ("weight[0]=1", "override 'weight[0]=1': there is no weight[0]"),
        ("verify.seeds[-1]=1", "verify.seeds: must be a list such as"),
        ("verify.seeds[²]=1", "verify.seeds: must be a list such as"),
        ("weight.x=1", "weight: must be a single value"),
        ("block_weights.a.b=1", "block_weights.a: must be a single value, not {'b': 1}"),
        ("verify.seeds=0", "verify.seeds: must be a list such as"),
        ("verify.seeds=[1", "verify.seeds: '[1' is not a YAML value"),
        ("models=5", "models: must be a mapping"),
        ("weight=???", "weight: '???' is not a plain number"),
        ("name=???", "name: '???' is no value"),
        ("output.folder=???", "output.folder: '???' is no value"),
        ("method=sum", "method: 'sum' is not one of add_difference"),
    ],
)
def test_overrides_that_cannot_be(problems: Problems, word: str, problem: str) -> None:
    assert problems("", word)[0].startswith(problem)


def test_the_short_form_of_several_distilled_models_is_ambiguous(
    load: Load, problems: Problems
) -> None:
    models = "models: {distilled: [a/b, c/d], target: e/f}"
    assert problems(models, "models.distilled.weight=0.5", base=NAME) == (
        "override 'models.distilled.weight=0.5': say which one, as in models.distilled[0]",
    )
    recipe = load(models, "models.distilled[1].weight=0.5", base=NAME)
    assert [ref.weight for ref in recipe.models.distilled] == [1.0, 0.5]


# -------------------------------------------------------------------------------- interpolation


def test_a_plain_key_may_be_repeated(load: Load) -> None:
    recipe = load(
        """
weight: ${verify.guidance_scale}
scheduler: {config: {a: "${name}/${weight}", list: [1, 2], b: "${scheduler.config.list[1]}"}}
output: {folder: "${name}-${models.target.repo}"}
"""
    )
    assert recipe.weight == 2.0
    assert recipe.scheduler.config == {"a": "mine/2.0", "list": [1, 2], "b": 2}
    assert recipe.output.folder == "mine-org/target"


@pytest.mark.parametrize(
    "text",
    [
        *("${oc.env:SECRET}", "${oc.env:SECRET,x}", "x${oc.env:SECRET}x", "${oc.decode:1}"),
        *(
            "${oc.select:name}",
            "${oc.create:{}}",
            "${oc.dict.keys:models}",
            "${now:x}",
            "${name:x}",
        ),
        *("${oc.coerce:canary_of_recipes.X,1}", "${oc.${name}:SECRET}", "${${name}}", "${.name}"),
        *("${..name}", "${oc.env:${name}}", "${name}${oc.env:SECRET}", "$${oc.env:SECRET}"),
        *("$${name}{oc.env:SECRET}", "\\${oc.env:SECRET}", "${ oc.env:SECRET }"),
    ],
)
def test_resolvers_are_refused_and_never_run(
    problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SECRET", "canary-value")
    (tmp_path / "canary_of_recipes.py").write_text("X = int\n")
    monkeypatch.syspath_prepend(tmp_path)
    single = "'" + text + "'"
    found = [
        *problems(
            f"output: {{folder: {single}}}\nexclude: [{single}]\n"
            f"scheduler: {{config: {{a: {{b: [{single}]}}}}}}\n"
            f"verify: {{edits: [{{image: a, instruction: {single}}}]}}"
        ),
        *problems("", f"output.folder={text}"),
    ]
    fields = ["output.folder", "exclude[0]", "scheduler.config.a.b[0]"]
    fields = [*fields, "verify.edits[0].instruction", "output.folder"]
    assert sorted(line.split(": only plain ${key}")[0] for line in found) == sorted(fields)
    assert "canary-value" not in "\n".join(found)
    assert "canary_of_recipes" not in sys.modules


@pytest.mark.parametrize(
    "models",
    [
        "{distilled: '${oc.env:SECRET}', target: a/b}",
        "{distilled: a/b, target: '${oc.env:SECRET}'}",
        "{distilled: a/b, target: {repo: '${oc.env:SECRET}'}}",
        "{distilled: a/b, target: {path: x, sha256: {'${oc.env:SECRET}': y}}}",
        "{distilled: a/b, target: {path: x, sha256: {y: '${oc.env:SECRET}'}}}",
    ],
)
def test_resolvers_in_models_are_refused(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, models: str
) -> None:
    monkeypatch.setenv("SECRET", "canary-value")
    found = problems(f"models: {models}", base=NAME)
    assert len(found) == 1
    assert "interpolation (${oc" in found[0] or "only plain ${key} may be used" in found[0]


@pytest.mark.parametrize("text", ["${", "${}", "${name", "${a b}", "${a..b}", "${a[}"])
def test_half_an_interpolation_is_refused(load: Load, problems: Problems, text: str) -> None:
    with pytest.raises(RecipeError, match="not valid YAML|not valid:"):
        load(f"output: {{folder: '{text}'}}")
    (only,) = problems("", f"output.folder={text}")
    assert only.startswith("output.folder: ")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("out_dtype: ${nope}", "out_dtype: Interpolation key 'nope' not found"),
        ("out_dtype: ${out_dtype}", "out_dtype: Recursive interpolation detected"),
        ("out_dtype: ${method}\nmethod: ${out_dtype}", "method: Recursive interpolation detected"),
        ("out_dtype: ${models}", "out_dtype: While dereferencing interpolation"),
        ("weight: ${name}", "weight: While dereferencing interpolation '${name}': Value 'mine'"),
        ("verify: ${models}", "verify: must be a mapping of names to values, not '${models}'"),
        ("exclude: ${components}", "exclude: must be a list such as [a, b], not '${components}'"),
        ("verify: {edits: ['${models}']}", "verify.edits[0]: must be a mapping"),
    ],
)
def test_interpolations_that_lead_nowhere(problems: Problems, more: str, problem: str) -> None:
    (only,) = problems(more)
    assert only.startswith(problem)


def test_repeated_interpolation_cannot_fill_the_memory(load: Load, problems: Problems) -> None:
    # Each string repeats the one before it: ten of ten times would be 100 GB.
    def chain(steps: int, uses: int) -> str:
        again = [f'    a{i}: "{f"${{scheduler.config.a{i - 1}}}" * uses}"' for i in range(1, steps)]
        return "scheduler:\n  config:\n    a0: x\n" + "\n".join(again)

    assert load(chain(9, 2)).scheduler.config["a8"] == "x" * 2**8
    assert problems(chain(5, 5)) == ("${key} is used more than 16 times",)


# ----------------------------------------------------------------------------------- hard YAML


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty or not a mapping"),
        ("# only a comment\n", "empty or not a mapping"),
        ("- a\n- b\n", "empty or not a mapping"),
        ("just text", "empty or not a mapping"),
        ("5", "empty or not a mapping"),
        ("null", "empty or not a mapping"),
        (BASE + "weight: 1\nweight: 2\n", "in line 7: found duplicate key weight"),
        (BASE + "verify: {steps: 1, steps: 2}\n", "in line 6: found duplicate key steps"),
        ("\tname: x\n", "in line 1: found character"),
        (BASE + "exclude: [a\n", "not valid YAML in line"),
        (BASE + "a: b: c\n", "in line 6: mapping values are not allowed"),
        (BASE + "---\nname: x\n", "found another document"),
        ("name: \0", "characters are not allowed"),
        (BASE + "exclude: !!python/name:os.system\n", "could not determine a constructor"),
        (BASE + "exclude: [!!python/object/apply:os.system [x]]\n", "could not determine a"),
        (BASE + "exclude: !!python/tuple [a]\n", "could not determine a constructor"),
        (BASE + "exclude: [!mine x]\n", "could not determine a constructor for the tag '!mine'"),
        (BASE + "scheduler: {config: !!set {a, b}}\n", "not a supported primitive type"),
        (BASE + "scheduler: {config: {a: !!timestamp 2020-01-01}}\n", "not a supported primitive"),
        (BASE + "scheduler: {config: {a: !!timestamp x}}\n", "a YAML tag with a wrong value"),
        (BASE + "scheduler: {config: {a: !!bool x}}\n", "a YAML tag with a wrong value"),
        (BASE + "weight: !!int abc\n", "invalid literal for int"),
        (BASE + "weight: !!float abc\n", "could not convert string to float"),
        (BASE + f"weight: {'9' * 5000}\n", "not valid YAML"),
        (BASE + "exclude: &a [*a]\n", "recursive aliases are not supported"),
        (BASE + "scheduler: {config: &a {b: *a}}\n", "recursive aliases are not supported"),
        (BASE + "exclude: [*nope]\n", "undefined alias"),
        (BASE + "exclude: " + "[" * 30 + "]" * 30 + "\n", "more than 16 levels deep"),
        (BASE + "exclude: " + "[" * 300 + "]" * 300 + "\n", "too deep|levels deep"),
        (BASE + "exclude: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
        (BASE + "block_weights: {null: 1}\n", "Incompatible key type"),
        (BASE + "block_weights: {[a]: 1}\n", "found unhashable key"),
    ],
    ids=lambda value: repr(value[-40:]) if value.startswith((BASE, "-", "#")) else "",
)
def test_text_that_is_no_recipe(load: Load, text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        load(base=text)
    assert caught.value.exit_code == 3


def test_an_alias_bomb_is_refused_at_once(load: Load) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    started = time.monotonic()
    with pytest.raises(RecipeError, match="expansion exceeds the configured limit"):
        load("scheduler:\n  config:\n    " + "\n    ".join(lines))
    assert time.monotonic() - started < 10


def test_a_plain_alias_is_read(load: Load) -> None:
    recipe = load(
        "models: {base: &m {repo: a/b, revision: 012}, distilled: a/b, target: *m}", base=NAME
    )
    assert recipe.models.base == recipe.models.target == ModelRef("a/b", revision="012")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("<<: {weight: 2}", "recipe: YAML merge keys (<<) are not supported"),
        ("scheduler: {config: {<<: {a: 1}}}", "scheduler.config: YAML merge keys (<<) are not"),
        ("verify: {<<: [{steps: 1}, {steps: 2}]}", "verify: YAML merge keys (<<) are not"),
        ("block_weights: {0x1: 1, 1: 2}", "block_weights: two of its keys are the same: 0x1, 1"),
        (
            "block_weights: {on: 1, true: 2}",
            "block_weights: two of its keys are the same: on, true",
        ),
        ("block_weights: {1.5: 1, '1.5': 2}", "block_weights: two of its keys are the same: 1.5"),
    ],
)
def test_keys_that_would_vanish_are_refused(problems: Problems, more: str, problem: str) -> None:
    assert problems(more)[0].startswith(problem)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(BASE.encode("utf-16"))
    with pytest.raises(RecipeError, match=r"mine\.yaml cannot be read: .*utf-8"):
        load_recipe(path)


# ----------------------------------------------------------------------------- finding recipes


def test_bundled_names_and_paths_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_recipe("demo") == bundled_recipes()["demo"]
    (tmp_path / "demo").mkdir()
    assert find_recipe("demo") == bundled_recipes()["demo"]
    for name in ("mine.yaml", "other.yml", "plain"):
        (tmp_path / name).write_text(BASE)
        assert find_recipe(name) == Path(name)
        assert find_recipe(f"./{name}").samefile(tmp_path / name)
        assert find_recipe(f"~/{name}") == tmp_path / name
        assert load_recipe(name) == load_recipe(tmp_path / name)
    assert list(bundled_recipes()) == sorted(bundled_recipes(), key="{}.yaml".format)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("dem", r"no bundled recipe 'dem'\nhint: did you mean 'demo'\?"),
        ("zzzz", r"no bundled recipe 'zzzz'\nhint: there are: .*demo"),
        ("", "no bundled recipe ''"),
        (".", "no bundled recipe '.'"),
        ("demo.yaml", r"no recipe file demo\.yaml\nhint: `instruct-merge recipes`"),
        ("./demo", r"no bundled recipe './demo'|no recipe file ./demo"),
        ("nope/demo", "no recipe file nope/demo"),
        ("~/nope.yaml", "no recipe file ~/nope.yaml"),
        ("~nobody-of-this-name/x.yaml", "no recipe file ~nobody"),
        ("folder.yaml", r"no recipe file folder\.yaml"),
        ("x" * 300, "there is no recipe x{80}: File name too long"),
        ("x" * 300 + "/y.yaml", "there is no recipe x{80}: File name too long"),
    ],
)
def test_what_cannot_be_found_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=match):
        load_recipe(name)


# -------------------------------------------------------------------------------------- bundled

BUNDLED = sorted(bundled_folder().glob("*.yaml"))


def test_there_are_bundled_recipes() -> None:
    assert {"demo", "sd15-lcm-lora"} <= bundled_recipes().keys()
    assert set(bundled_recipes().values()) <= set(BUNDLED)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_recipes_are_valid_and_explain_themselves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    lines = path.read_text(encoding="utf-8").splitlines()
    description, run, change = lines[:3]
    assert re.fullmatch(r"# [A-Z].{20,}\.", description)
    assert describe_recipe(path) == description.removeprefix("# ")
    assert re.match(r"# Run:    \S", run)
    assert re.match(rf"# Change: instruct-merge run {re.escape(path.stem)} \S+=\S+", change)
    assert f"instruct-merge run {path.stem}" in run
    overrides = change.partition(path.stem)[2].split()
    changed = load_recipe(path, overrides)
    assert changed != recipe
    assert max(map(len, lines)) <= 100
    models = [recipe.models.target, recipe.models.base, *recipe.models.distilled]
    assert all(model.path or model.revision for model in models if model is not None)


# ----------------------------------------------------------------------------------------- fuzz

FIELDS = [*(field.name for field in dataclasses.fields(Recipe)), "wieght"]
WORDS = st.sampled_from(
    [
        *(
            "a/b",
            "./x",
            "~",
            "~nobody/x",
            "${name}",
            "${oc.env:HOME}",
            "???",
            "on",
            "017",
            "1_0",
            "",
        ),
        *(
            "x.safetensors",
            "repo",
            "path",
            "edits",
            "image",
            "instruction",
            "seeds",
            "config",
            "<<",
        ),
    ]
)
SCALARS = (
    WORDS | st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.binary(max_size=2)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), TREES, max_size=3),
    models=st.dictionaries(
        st.sampled_from(["base", "distilled", "target", "x"]), TREES, max_size=2
    ),
    words=st.lists(
        st.builds(
            "{}{}={}".format,
            st.sampled_from(FIELDS),
            st.sampled_from(["", ".x", "[0]", "[a.*]", ".target.path", ".seeds[0]", ".", "[²]"]),
            st.sampled_from(
                ["1", "a/b", "[1]", "{a: 1}", "${name}", "null", "x #y", "'", "!!int x"]
            ),
        ),
        max_size=2,
    ),
)
def test_any_tree_is_a_recipe_or_a_recipe_error(
    load: Load, changes: dict[str, Any], models: dict[str, Any], words: list[str]
) -> None:
    tree: dict[str, Any] = yaml.safe_load(BASE)
    tree["models"] |= models
    text = yaml.safe_dump({**tree, **changes})
    try:
        recipe = load("", *words, base=text)
    except RecipeError as error:
        lines = str(error).splitlines()
    else:
        lines = ["", "hint: "]
        # What is read can be written: the lock, the manifest and the digest are JSON and YAML.
        json.dumps(dataclasses.asdict(recipe), allow_nan=False)
    assert lines[-1].startswith("hint: ")


HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            f"{HUB}/a/b/resolve/main/c.safetensors",
            "is a URL; write {repo: a/b, file: c.safetensors}",
        ),
        (
            f"{HUB}/a/b/blob/v2/d/c.safetensors?download=true",
            "revision: v2, file: d/c.safetensors}",
        ),
        (f"{HUB}/a/b", "is a URL; write {repo: a/b}"),
        ("https://example.org/x.safetensors", "is a URL; download the file and give its path"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "path", "config"])
def test_a_url_is_no_model(tmp_path: Path, url: str, words: str, form: str) -> None:
    target: object = url if form == "plain" else {"path": "./a.safetensors", form: url}
    tree = {"name": "x", "models": {"distilled": "./l.safetensors", "target": target}}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match=r"models\.target: .*" + re.escape(words)):
        load_recipe(path)
