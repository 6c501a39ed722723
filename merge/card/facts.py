"""What the records of an export say, as far as its card tells it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from merge.card.fields import RecordFields
from merge.errors import CheckpointError, SourceNotFoundError
from merge.family.model import Family
from merge.family.registry import family_named
from merge.records.folder import LOCK_NAME, MANIFEST_NAME, REPORT_NAME, OutputRecords

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SINGLE_FILE = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
_PICTURE = re.compile(r"images/\d{2,}-\d+-(source|merged)\.png", re.ASCII)


@dataclass(frozen=True, slots=True)
class Parent:
    """A model that was merged.

    Attributes:
        role: `target`, `base`, `distilled`, or `distilled[1]` when there are several.
        name: Hub id, or the name of a local file or folder.
        commit: 40 hexadecimal digits, or empty for a local model.
        weight: Of a distilled model; None for the others.
    """

    role: str
    name: str
    commit: str
    weight: float | None

    @property
    def is_on_hub(self) -> bool:
        """Return True when others can fetch it."""
        return bool(self.commit)


@dataclass(frozen=True, slots=True)
class CheckFacts:
    """One kind of check, over all edits.

    Attributes:
        name: As in the report.
        values: What was measured.
        limits: Of the values, in their order.
        rule: `at least` or `at most`.
        failed: How many did not pass.
        only_warns: True where that is no failure of the model.
    """

    name: str
    values: tuple[float, ...]
    limits: tuple[float, ...]
    rule: str
    failed: int
    only_warns: bool


@dataclass(frozen=True, slots=True)
class EditFacts:
    """One edit of the report whose two pictures are in the folder.

    Attributes:
        instruction: As it was given.
        source: File in the folder.
        merged: File in the folder.
        settings: In words.
    """

    instruction: str
    source: str
    merged: str
    settings: str


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything that a card tells.

    Attributes:
        manifest: All of `merge_manifest.json`.
        recipe: The recipe of the lock.
        family: The architecture.
        parents: Target, base, then distilled in recipe order.
        scheduler: Class name.
        single_file: Name of the LDM/SGM file that is there, or empty.
        is_pipeline: False for a network alone.
        has_folder_weights: False where only the single file goes along with the configs.
        has_main_config: The config of the main component is there.
        report: None when nothing was verified.
        checks: Of the report, by kind.
        edits: Of the report, with pictures.
    """

    manifest: RecordFields
    recipe: RecordFields
    family: Family
    parents: tuple[Parent, ...]
    scheduler: str
    single_file: str
    is_pipeline: bool
    has_folder_weights: bool
    has_main_config: bool
    report: RecordFields | None
    checks: tuple[CheckFacts, ...]
    edits: tuple[EditFacts, ...]


def read_facts(folder: Path, names: Collection[str] | None = None) -> CardFacts:
    """Read the records of an export.

    Args:
        folder: The export.
        names: The files that go along with the card; default: those that are there.

    Raises:
        SourceNotFoundError: it has no manifest or no lock.
        CheckpointError: a record is broken.
    """

    def goes_along(name: str) -> bool:
        return (folder / name).is_file() if names is None else name in names

    records = OutputRecords(folder)
    if name := records.missing:
        raise SourceNotFoundError(
            f"{folder} has no {name}", hint="only outputs of `run` have a card"
        )
    manifest = RecordFields(records.manifest, MANIFEST_NAME)
    recipe = RecordFields(records.recipe, LOCK_NAME)
    architecture = manifest.text("architecture")
    family = family_named(architecture)
    if family is None:
        raise CheckpointError(f"{MANIFEST_NAME}: there is no architecture {architecture!r}")
    singles = filter(_SINGLE_FILE.fullmatch, sorted(manifest.tree["files"]))
    report = _read_report(records, manifest)
    return CardFacts(
        manifest=manifest,
        recipe=recipe,
        family=family,
        parents=_parents(manifest.table("inputs"), recipe),
        scheduler=recipe.table("scheduler").text("class_name", "LCMScheduler"),
        single_file=next(filter(goes_along, singles), ""),
        is_pipeline=goes_along("model_index.json"),
        has_folder_weights=goes_along(family.main.file_name),
        has_main_config=goes_along(family.main.config_name),
        report=report,
        checks=_checks(report.tables("checks")) if report else (),
        edits=_edits(folder, report.tables("edits")) if report else (),
    )


def _parents(inputs: RecordFields, recipe: RecordFields) -> tuple[Parent, ...]:
    distilled = recipe.table("models").tables("distilled")
    weights = {
        "distilled" if len(distilled) == 1 else f"distilled[{index}]": ref.number("weight", 1.0)
        for index, ref in enumerate(distilled)
    }
    order = {role: index for index, role in enumerate(("target", "base", *weights))}
    roles = sorted(inputs.tree, key=lambda role: (order.get(role, len(order)), str(role)))
    return tuple(_parent(role, inputs.table(role), weights.get(role)) for role in roles)


def _parent(role: str, record: RecordFields, weight: float | None) -> Parent:
    if "repo" not in record:
        return Parent(role, record.text("name"), "", weight)
    repo, commit = record.text("repo"), record.text("commit")
    if not HUB_ID.fullmatch(repo) or not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"{MANIFEST_NAME}: {repo!r} at {commit!r} is no model of the Hub")
    return Parent(role, repo, commit, weight)


def _read_report(records: OutputRecords, manifest: RecordFields) -> RecordFields | None:
    """Return the report, or None where there is none; that of another model is refused."""
    tree = records.report
    if tree is None:
        return None
    report = RecordFields(tree, REPORT_NAME)
    digest = report.table("summary").text("recipe_digest", "")
    if digest and digest != manifest.text("recipe_digest", digest):
        raise CheckpointError(
            f"{records.folder / REPORT_NAME} is the report of another model: "
            f"it has recipe digest {digest[:64]}",
            hint="verify the folder again",
        )
    return report


def _checks(checks: tuple[RecordFields, ...]) -> tuple[CheckFacts, ...]:
    kinds: dict[str, list[RecordFields]] = {}
    for check in checks:
        kinds.setdefault(check.text("name"), []).append(check)
    return tuple(
        CheckFacts(
            name,
            tuple(check.measure("value") for check in kind),
            tuple(check.measure("limit") for check in kind),
            kind[0].text("rule", ""),
            sum(not check.flag("passed") for check in kind),
            kind[0].text("severity", "") == "warned",
        )
        for name, kind in kinds.items()
    )


def _edits(folder: Path, edits: tuple[RecordFields, ...]) -> tuple[EditFacts, ...]:
    """Return the edits both of whose pictures are there."""
    shown = []
    for edit in edits:
        found = {}
        for name in edit.texts("files"):
            match = _PICTURE.fullmatch(name)
            if match and (folder / name).is_file():
                found[match[1]] = name
        if len(found) == 2:
            instruction, settings = edit.text("instruction"), _settings(edit)
            shown.append(EditFacts(instruction, found["source"], found["merged"], settings))
    return tuple(shown)


def _settings(edit: RecordFields) -> str:
    settings = edit.table("settings")
    timesteps = settings.counts("timesteps")
    at = f" at {' '.join(map(str, timesteps))}" if timesteps else ""
    return (
        f"{settings.count('steps')} steps{at}, guidance {settings.number('guidance_scale'):g}, "
        f"image guidance {settings.number('image_guidance_scale'):g}, "
        f"{settings.count('resolution')} px, seed {edit.count('seed')}"
    )
