"""The card as Markdown, section by section."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml

from merge.card.escape import code, fenced, one_line, prose
from merge.card.facts import (
    HUB_ID,
    CardFacts,
    CheckFacts,
    EditFacts,
    Parent,
    ReportFacts,
    read_facts,
)
from merge.card.fields import Fields
from merge.card.metadata import CardLicence, front_matter
from merge.card.use import use_section
from merge.errors import CheckpointError
from merge.methods.model import Method
from merge.methods.table import METHODS
from merge.plan.render import format_bytes
from merge.records.folder import LOCK_NAME, MANIFEST_NAME

CARD_NAME = "README.md"
# The first line after the front matter. A card without it is somebody's own and is not replaced.
CARD_MARKER = "<!-- made by instruct-merge -->"
# Nothing that Markdown takes for markup or a link.
_PLAIN_LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,:-]*\.?")
_PLAIN_ID = re.compile(r"[a-z0-9][a-z0-9.-]*\+{0,2}")
_MAX_EDITS = 6
_MAX_ROWS = 100


def render_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    licence: CardLicence | None = None,
    names: Collection[str] | None = None,
) -> str:
    """Return the card of an export as Markdown.

    Args:
        folder: With `merge_manifest.json` and `recipe.lock.yaml`; `report.json` and `images/` are
            shown where they are there.
        repo_id: Hub id that the card is for; without one its lines have a placeholder.
        licence: Of the merged model, when it is known.
        names: The files that go along with the card; default: those that are there.

    Raises:
        SourceNotFoundError: the folder has no manifest or no lock.
        CheckpointError: a record of the folder is broken.
        ValueError: `repo_id` is no Hub id.
    """
    if repo_id is not None and not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no Hub id such as org/name")
    facts = read_facts(folder, names)
    sections = (
        f"{front_matter(facts, licence)}\n{CARD_MARKER}",
        _what_it_is(facts),
        _pictures(facts),
        _verification(facts),
        use_section(facts, repo_id),
        _formula(facts),
        _parents(facts, licence),
        _repeating(facts, repo_id),
        _limits(facts),
        _licence(licence),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _what_it_is(facts: CardFacts) -> str:
    what = "model" if facts.is_pipeline else facts.family.main.title
    return (
        f"# {prose(facts.recipe.text('name'))}\n\n"
        f"An InstructPix2Pix {what} that edits pictures from an instruction in few steps, merged "
        "without training: the few-step skill of a distilled model, which is its difference from "
        "the base that it was distilled from, is added to a model that edits. It needs none of "
        "its parents."
    )


def _formula(facts: CardFacts) -> str:
    recipe = facts.recipe
    name = recipe.text("method")
    method = METHODS.get(name)
    formula = f": `{method.formula}`" if method else ""
    lines = [
        "## How it was merged",
        "",
        f"Method {code(name)}{formula}",
        "",
        "| setting | value |",
        "|---|---|",
        f"| weight | {recipe.number('weight'):g} |",
    ]
    lines += [f"| {prose(key)} | {code(value)} |" for key, value in _params(recipe, method)]
    lines += [
        f"| weight of {prose(parent.role)} | {parent.weight:g}, times the weight above |"
        for parent in facts.parents
        if parent.weight is not None and parent.weight != 1
    ]
    weights = recipe.table("block_weights").numbers()
    lines += [f"| weight of {code(glob)} | {value:g} |" for glob, value in weights.items()]
    components = recipe.texts("components") or [facts.family.main.name]
    exclude = recipe.texts("exclude")
    if exclude:
        lines.append(f"| kept from the target | {', '.join(map(code, exclude))} |")
    lines += [
        f"| components | {', '.join(map(code, components))} |",
        f"| first convolution, 8 channels on 4 | {code(recipe.text('channel_rule', 'skip'))} |",
        f"| guidance embedding | {code(recipe.text('guidance_embedding', 'drop'))} |",
    ]
    if "bake_guidance" in recipe:
        lines.append(f"| guidance scale that is baked in | {recipe.number('bake_guidance'):g} |")
    lines.append(
        f"| computed in, stored in | {code(recipe.text('compute_dtype', 'float32'))}, "
        f"{code(recipe.text('out_dtype', 'float16'))} |"
    )
    return "\n".join([*lines, "", *_counts(facts)])


def _params(recipe: Fields, method: Method | None) -> list[tuple[str, str]]:
    """Return the method's parameters as they counted, with defaults where it is a known one."""
    given = recipe.table("params")
    defaults = {param.name: param.default for param in method.params} if method else {}
    params = {**defaults, **given.tree}
    fields = Fields(params, f"{LOCK_NAME}: params")
    shown = []
    for key, value in params.items():
        if not isinstance(value, bool):
            is_whole = isinstance(value, int)
            value = fields.count(key) if is_whole else f"{fields.number(key):.12g}"
        shown.append((str(key), str(value).lower()))
    return shown


def _counts(facts: CardFacts) -> list[str]:
    table = facts.manifest.table("counts")
    counts = {key: table.count(key) for key in sorted(table.tree)}
    shown = ", ".join(f"{count} {prose(action)}" for action, count in counts.items() if count)
    left_out = len(facts.manifest.tables("left_out"))
    lines = [f"Of {sum(counts.values())} tensors: {shown or 'none'}."] if counts else []
    if left_out:
        lines.append(f"{left_out} of the parents' tensors are left out; the manifest says why.")
    if any(parent.role == "base" for parent in facts.parents):
        return lines
    return [*lines, "The difference of a LoRA is `(alpha / rank) * up @ down`; it needs no base."]


def _parents(facts: CardFacts, licence: CardLicence | None) -> str:
    notes = {
        parent.name: " ".join(_note_of(parent, note) for note in licence.notes).strip()
        for parent in facts.parents
        if licence is not None
    }
    has_notes = any(notes.values())
    lines = ["## Parents", "", "| role | model | commit |", "|---|---|---|"]
    if has_notes:
        lines[2:] = ["| role | model | commit | licence |", "|---|---|---|---|"]
    for parent in facts.parents:
        name = code(parent.name)
        if parent.is_on_hub:
            name = f"[{parent.name}](https://huggingface.co/{parent.name})"
        commit = f"`{parent.commit}`" if parent.commit else "a local file or folder"
        note = f" {prose(notes[parent.name])} |" if has_notes else ""
        lines.append(f"| {prose(parent.role)} | {name} | {commit} |{note}")
    return "\n".join(lines)


def _note_of(parent: Parent, note: str) -> str:
    prefix = f"{parent.name}:"
    return note[len(prefix) :].strip() if note.startswith(prefix) else ""


def _pictures(facts: CardFacts) -> str:
    if facts.report is None or not facts.report.edits:
        return ""
    lines = ["| source | merged | instruction and settings |", "|---|---|---|"]
    lines += map(_picture_row, facts.report.edits[:_MAX_EDITS])
    return "\n".join(lines)


def _picture_row(edit: EditFacts) -> str:
    at = f" at {' '.join(map(str, edit.timesteps))}" if edit.timesteps else ""
    settings = (
        f"{edit.steps} steps{at}, guidance {edit.guidance_scale:g}, image guidance "
        f"{edit.image_guidance_scale:g}, {edit.resolution} px, seed {edit.seed}"
    )
    return (
        f"| ![source]({edit.source}) | ![merged]({edit.merged}) "
        f"| {prose(edit.instruction)}: {settings} |"
    )


def _verification(facts: CardFacts) -> str:
    report = facts.report
    if report is None:
        return (
            "## Verification\n\nNot verified by an edit. `instruct-merge verify FOLDER` checks "
            "the files, edits pictures and writes the report."
        )
    lines = [
        f"## Verification\n\n{_verdict(report)} (`report.json`, `report.html`).",
        "",
        *([_plain(report.not_judged), ""] if report.not_judged else []),
        *(f"- Warning: {prose(line)}" for line in report.warnings[:_MAX_ROWS]),
        *([""] if report.warnings else []),
        "| check | measured | limit | result |",
        "|---|---|---|---|",
    ]
    lines += map(_check_row, report.checks[:_MAX_ROWS])
    if report.notes:
        lines += ["", *(f"- {prose(note)}" for note in report.notes[:_MAX_ROWS])]
    return "\n".join(lines)


def _verdict(report: ReportFacts) -> str:
    failed = sum(check.failed for check in report.checks if not check.only_warns)
    total = sum(len(check.values) for check in report.checks)
    word, text = "**Failed**", f"{failed} of {total} checks failed"
    if report.passed:
        word = "**Warning**" if report.warnings else "**Passed**"
        text = f"{total} checks passed"
    return f"{word}: {_plain(report.verdict or text)}"


def _plain(text: str) -> str:
    """Return a sentence as it is where that is safe: escaped colons read badly."""
    return text if _PLAIN_LINE.fullmatch(text) else prose(text)


def _check_row(check: CheckFacts) -> str:
    values, limits = zip(*check.values, strict=True)
    word = "warned" if check.only_warns else "failed"
    result = f"{check.failed} of {len(values)} {word}" if check.failed else "passed"
    limit = f"{prose(check.rule)} {_range(limits)}".strip()
    return f"| {prose(check.name.replace('_', ' '))} | {_range(values)} | {limit} | {result} |"


def _range(values: Iterable[float]) -> str:
    """Return the smallest and largest value, or the one that all are."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return "not finite"
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _repeating(facts: CardFacts, repo_id: str | None) -> str:
    tool = facts.manifest.table("tool").text("version")
    digest = facts.manifest.text("recipe_digest")
    download = f"hf download {repo_id} --local-dir FOLDER\n" if repo_id else ""
    local = ""
    if not all(parent.is_on_hub for parent in facts.parents):
        local = (
            "\n\nParents that are no Hub repository are known by name and SHA-256 only; the lock "
            "looks for them beside itself."
        )
    text = f"""## Repeating it

Made by instruct-merge {code(tool)}, recipe digest {code(digest)}.
The same version makes the same bytes on any device:

```sh
{download}instruct-merge reproduce FOLDER       # merges again and compares every SHA-256
instruct-merge run FOLDER/recipe.lock.yaml    # merges again
```

`recipe.lock.yaml` names every input by its SHA-256, and by its commit where it is on the Hub;
`merge_manifest.json` names every output.{local}"""
    return "\n\n".join([text, _hashes(facts), _recipe(facts)])


def _hashes(facts: CardFacts) -> str:
    lines = ["| file | size | SHA-256 |", "|---|---|---|"]
    for name, tree in list(facts.weight_files.items())[:_MAX_ROWS]:
        record = Fields(tree, f"{MANIFEST_NAME}: {name}")
        size = format_bytes(record.count("size"))
        lines.append(f"| {code(name)} | {size} | {code(record.text('sha256'))} |")
    return "\n".join(lines)


def _recipe(facts: CardFacts) -> str:
    try:
        text = yaml.safe_dump(facts.recipe.tree, sort_keys=False, width=100)
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{LOCK_NAME} cannot be shown: {error}") from error
    return f"<details>\n<summary>Recipe</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def _limits(facts: CardFacts) -> str:
    side = facts.family.resolution
    only = " only" if facts.family.has_fixed_size else "; larger pictures may work"
    steps = "an LCM scheduler refuses" if facts.scheduler == "LCMScheduler" else "it does not need"
    return f"""## Limits

- `guidance_scale` 1 to 3 and `image_guidance_scale` 1: outside of that pictures break.
- The idea was found to work at {side} px{only}.
- Never leave the steps at the pipeline's default of 100, which {steps}.
- Nothing was trained: the model has the biases and failures of all its parents, and edits no better
  than its target does in many steps."""


def _licence(licence: CardLicence | None) -> str:
    if licence is None:
        return (
            "## Licence\n\nNone is stated here. A merge is under the licences of all its parents: "
            "read theirs before you pass it on."
        )
    # A plain id needs no escaping, and reads badly with it.
    name = licence.name or licence.id
    name = name if _PLAIN_ID.fullmatch(name) else prose(name)
    link = one_line(licence.link or "", 2000)
    # A link's text is harmless; what it leads to has to be a page.
    is_page = link.startswith("https://") and not set(link) & set("<>()[]\"'`\\ |")
    shown = f"[{name}]({link})" if is_page else name
    return "\n".join(
        [f"## Licence\n\n{shown}", "", *(f"- {prose(note)}" for note in licence.notes)]
    ).rstrip()
