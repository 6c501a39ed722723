"""The checks of a recipe's values that need no file: ranges, choices, combinations."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from merge.family.registry import mergeable_names
from merge.methods.table import METHODS
from merge.recipe.schema import DistilledRef, ModelRef, Recipe, VerifySpec

MAX_FLOAT32 = 3.4028234663852886e38
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIANT = re.compile(r"[A-Za-z0-9_-]+")
_HUB_URL = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/?#]+)"
    r"(?:/(?:resolve|blob|raw|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?"
)
# What git takes for the name of a branch, tag or commit.
_REVISION = re.compile(r"(?![-/.])(?!.*(?:\.\.|//|@\{))[^\x00-\x20\x7f~^:?*\[\\]+(?<![/.])")

CHANNEL_RULES = ("skip", "first", "error")
OUT_DTYPES = ("float16", "bfloat16", "float32", "keep")
OVERFLOW_RULES = ("error", "clamp", "keep_target")
GUIDANCE_RULES = ("drop", "bake", "error")
TIMESTEPS_RULE = "must fall strictly, within 999 to 0"


def validate(recipe: Recipe) -> list[str]:
    """Return a line for each value that is out of range, in the order of the schema."""
    return [
        *_check_names(recipe),
        *_check_models(recipe),
        *_check_rules(recipe),
        *_check_output(recipe),
        *_check_verify(recipe.verify),
    ]


def _choice(field: str, value: str, allowed: Sequence[str]) -> Iterator[str]:
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        yield f"{field}: {value!r} is not one of {', '.join(allowed)}{hint}"


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the candidate most like it, if any."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _finite(field: str, value: float) -> Iterator[str]:
    if not math.isfinite(value):
        yield f"{field}: {value} is not a finite number"
    elif abs(value) > MAX_FLOAT32:
        yield f"{field}: {value:g} does not fit float32"


def _check_names(recipe: Recipe) -> Iterator[str]:
    if not _NAME.fullmatch(recipe.name):
        yield f"name: {recipe.name!r} must be lower-case letters, digits, `.`, `_` and `-`"
    yield from _choice("method", recipe.method, tuple(METHODS))
    if recipe.method in METHODS:
        yield from METHODS[recipe.method].problems(recipe.params)
    yield from _finite("weight", recipe.weight)


def _check_models(recipe: Recipe) -> Iterator[str]:
    models = recipe.models
    if models.base is not None:
        yield from _check_model("models.base", models.base)
    if not models.distilled:
        yield "models.distilled: name at least one model"
    for index, ref in enumerate(models.distilled):
        field = "models.distilled" if len(models.distilled) == 1 else f"models.distilled[{index}]"
        yield from _check_model(field, ref)
        yield from _finite(f"{field}.weight", ref.weight)
        yield from _finite(f"weight times {field}.weight", recipe.weight * ref.weight)
    yield from _check_model("models.target", models.target)


def _check_model(field: str, ref: ModelRef | DistilledRef) -> Iterator[str]:
    if (ref.repo is None) == (ref.path is None):
        yield f"{field}: give either repo or path"
    urls = [text for text in (ref.repo, ref.path, ref.config) if text and "://" in text]
    if urls:
        yield from (f"{field}: {_url_problem(url)}" for url in urls)
        return
    if ref.repo is not None and not _REPO.fullmatch(ref.repo):
        yield (
            f"{field}: {ref.repo!r} is no Hub id of the form org/name "
            "(a local path starts with `.`, `/` or `~`)"
        )
    if ref.path is not None and (ref.revision is not None or ref.file is not None):
        yield f"{field}: revision and file belong to repo, not to path"
    for name in ("subfolder", "file"):
        value = getattr(ref, name)
        if value is not None and not _is_inside(value):
            yield f"{field}.{name}: {value!r} must stay inside the model"
    if ref.revision is not None and not _REVISION.fullmatch(ref.revision):
        yield f"{field}.revision: {ref.revision!r} is no branch, tag or commit"
    if ref.variant is not None and not _VARIANT.fullmatch(ref.variant):
        yield f"{field}.variant: {ref.variant!r} must be letters, digits, `_` and `-`"
    if ref.ema not in ("auto", True, False) or not isinstance(ref.ema, str | bool):
        yield f"{field}.ema: {ref.ema!r} is not one of auto, true, false"
    for name, digest in ref.sha256.items():
        if not _SHA256.fullmatch(digest):
            yield f"{field}.sha256[{name}]: must be 64 lower-case hexadecimal digits"


def _url_problem(url: str) -> str:
    """Say that a URL is no model, and how its file is written where it is one of the Hub."""
    match = _HUB_URL.match(url)
    if match is None:
        return f"{url!r} is a URL; download the file and give its path, or name a Hub id"
    parts = [f"repo: {match['repo']}"]
    if match["revision"] not in (None, "main"):
        parts.append(f"revision: {match['revision']}")
    if match["file"]:
        parts.append(f"file: {match['file']}")
    return f"{url!r} is a URL; write {{{', '.join(parts)}}}"


def _is_inside(text: str) -> bool:
    parts = text.replace("\\", "/").split("/")
    return bool(text) and ".." not in parts and "" not in parts[:-1] and ":" not in text


def _check_rules(recipe: Recipe) -> Iterator[str]:
    components = recipe.components
    if components is not None:
        for name in components:
            yield from _choice("components", name, mergeable_names())
        if not components or len(set(components)) < len(components):
            yield f"components: {components} - name what is merged, each once"
    yield from _choice("channel_rule", recipe.channel_rule, CHANNEL_RULES)
    for pattern, weight in recipe.block_weights.items():
        yield from _finite(f"block_weights[{pattern}]", weight)
    if any(not pattern for pattern in [*recipe.block_weights, *recipe.exclude]):
        yield "block_weights, exclude: an empty pattern matches nothing"
    yield from _choice("guidance_embedding", recipe.guidance_embedding, GUIDANCE_RULES)
    if recipe.guidance_embedding != "bake":
        if recipe.bake_guidance is not None:
            yield "bake_guidance: it belongs to guidance_embedding: bake"
    elif recipe.bake_guidance is None:
        yield "guidance_embedding: bake needs bake_guidance, the guidance scale that it fixes"
    elif not (math.isfinite(recipe.bake_guidance) and 0 <= recipe.bake_guidance <= 100):
        yield f"bake_guidance: {recipe.bake_guidance} is not within 0 to 100"
    yield from _choice("compute_dtype", recipe.compute_dtype, ("float32",))
    yield from _choice("out_dtype", recipe.out_dtype, OUT_DTYPES)
    yield from _choice("on_overflow", recipe.on_overflow, OVERFLOW_RULES)


def _check_output(recipe: Recipe) -> Iterator[str]:
    if not _IDENTIFIER.fullmatch(recipe.scheduler.class_name):
        yield f"scheduler.class_name: {recipe.scheduler.class_name!r} is no class name"
    for name, value in recipe.scheduler.config.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            yield f"scheduler.config.{name}: it cannot be written as JSON: {error}"
    if not recipe.output.folder or "\0" in recipe.output.folder:
        yield f"output.folder: {recipe.output.folder!r} is no path"
    if recipe.output.other_dtype != "keep":
        yield "output.other_dtype: only keep is available in this version"


def are_timesteps(timesteps: Sequence[int]) -> bool:
    """Return True for explicit timesteps that keep `TIMESTEPS_RULE`."""
    is_falling = all(a > b for a, b in itertools.pairwise(timesteps))
    return bool(timesteps) and is_falling and all(0 <= step < 1000 for step in timesteps)


def timesteps_problems(where: str, timesteps: Sequence[int] | None) -> Iterator[str]:
    """Say what is wrong with explicit timesteps, which fall from one to the next."""
    if timesteps is not None and not are_timesteps(timesteps):
        yield f"{where}: {list(timesteps)} {TIMESTEPS_RULE}"


def _check_verify(verify: VerifySpec) -> Iterator[str]:
    limit = verify.original_inference_steps
    if not 1 <= limit <= 1000:
        yield f"verify.original_inference_steps: {limit} is not within 1 to 1000"
    elif not 1 <= verify.steps <= limit:
        yield f"verify.steps: {verify.steps} is not within 1 to original_inference_steps ({limit})"
    for where, spec in (("verify", verify), ("verify.compare", verify.compare)):
        for name in ("guidance_scale", "image_guidance_scale"):
            value = getattr(spec, name)
            if not (math.isfinite(value) and value >= 0):
                yield f"{where}.{name}: {value} is not a finite number of at least 0"
    if not 1 <= verify.compare.steps <= 1000:
        yield f"verify.compare.steps: {verify.compare.steps} is not within 1 to 1000"
    if not 8 <= verify.resolution <= 8192:
        yield f"verify.resolution: {verify.resolution} is not within 8 to 8192 pixels"
    yield from timesteps_problems("verify.timesteps", verify.timesteps)
    if not verify.seeds:
        yield "verify.seeds: name at least one seed"
    seeds = [*verify.seeds, *(edit.seed for edit in verify.edits if edit.seed is not None)]
    for seed in seeds:
        if not 0 <= seed < 2**63:
            yield f"verify.seeds: {seed} is not within 0 to 2^63 - 1"
    for index, edit in enumerate(verify.edits):
        where = f"verify.edits[{index}]"
        if edit.steps is not None and not 1 <= edit.steps <= limit:
            yield f"{where}.steps: {edit.steps} is not within 1 to {limit}"
        if edit.steps is not None and edit.timesteps is not None:
            yield f"{where}: name steps or timesteps, not both"
        yield from timesteps_problems(f"{where}.timesteps", edit.timesteps)
        if not edit.instruction.strip():
            yield f"{where}.instruction: it is empty"
        if not (math.isfinite(edit.expected_limit) and edit.expected_limit >= 0):
            value = edit.expected_limit
            yield f"{where}.expected_limit: {value} is not a number of at least 0"
