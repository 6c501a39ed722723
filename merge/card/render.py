"""The card as Markdown: `card.md` beside this file, filled in from the records."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merge.card.escape import code, fenced, one_line, prose
from merge.card.facts import HUB_ID, CardFacts, read_facts
from merge.card.fields import RecordFields
from merge.card.metadata import CardLicence, front_matter
from merge.errors import CheckpointError
from merge.methods.model import Method
from merge.methods.table import METHODS
from merge.plan.render import format_bytes
from merge.records.folder import LOCK_NAME, MANIFEST_NAME

if TYPE_CHECKING:
    import jinja2

CARD_NAME = "README.md"
# The first line after the front matter. A card without it is somebody's own and is not replaced.
CARD_MARKER = "<!-- made by instruct-merge -->"
# Where a card is that is for no repository.
PLACEHOLDER = "path/to/this/folder"
# Nothing that Markdown takes for markup or a link.
_PLAIN_LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,:-]*\.?")
_PLAIN_ID = re.compile(r"[a-z0-9][a-z0-9.-]*\+{0,2}")


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
    method = METHODS.get(facts.recipe.text("method"))
    counts = facts.manifest.table("counts")
    files = facts.manifest.tree["files"]
    text = _template().render(
        facts=facts,
        recipe=facts.recipe,
        report=facts.report,
        family=facts.family,
        main=facts.family.main,
        is_lcm=facts.scheduler == "LCMScheduler",
        front_matter=front_matter(facts, licence),
        marker=CARD_MARKER,
        repo_id=repo_id,
        place=repo_id or PLACEHOLDER,
        download=f"hf download {repo_id} --local-dir FOLDER\n" if repo_id else "",
        verdict=_verdict(facts, facts.report) if facts.report else "",
        method=method,
        params=_params(facts.recipe, method),
        counts={key: counts.count(key) for key in sorted(counts.tree)},
        left_out=len(facts.manifest.tables("left_out")),
        notes=_notes_of_parents(facts, licence.notes if licence else ()),
        weight_files=[
            (name, RecordFields(files[name], f"{MANIFEST_NAME}: {name}"))
            for name in sorted(files)
            if name.endswith(".safetensors")
        ],
        licence=licence,
        licence_link=_licence_link(licence) if licence else "",
    )
    return f"{text.rstrip()}\n"


@functools.cache
def _template() -> jinja2.Template:
    # A merge writes its card when its buffers are free again: 4 MB that its peak has not.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # Markdown, not HTML: the filters write what is not trusted as references.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "code": code,
        "fenced": fenced,
        # A Python literal in double quotes, ASCII only.
        "literal": json.dumps,
        "number": "{:g}".format,
        "plain": _plain,
        "prose": prose,
        "range": _range,
        "yaml": _yaml,
    }
    return environment.get_template("card.md")


def _verdict(facts: CardFacts, report: RecordFields) -> str:
    failed = sum(check.failed for check in facts.checks if not check.only_warns)
    total = sum(len(check.values) for check in facts.checks)
    word, text = "**Failed**", f"{failed} of {total} checks failed"
    if report.flag("passed"):
        word = "**Warning**" if report.texts("warnings") else "**Passed**"
        text = f"{total} checks passed"
    return f"{word}: {_plain(report.text('verdict', '') or text)}"


def _params(recipe: RecordFields, method: Method | None) -> list[tuple[str, str]]:
    """Return the method's parameters as they counted, with defaults where it is a known one."""
    given = recipe.table("params")
    defaults = {param.name: param.default for param in method.params} if method else {}
    params = {**defaults, **given.tree}
    fields = RecordFields(params, f"{LOCK_NAME}: params")
    shown = []
    for key, value in params.items():
        if not isinstance(value, bool):
            is_whole = isinstance(value, int)
            value = fields.count(key) if is_whole else f"{fields.number(key):.12g}"
        shown.append((str(key), str(value).lower()))
    return shown


def _notes_of_parents(facts: CardFacts, notes: Sequence[str]) -> dict[str, str]:
    """Return the notes that begin with a parent's name, by it; empty where none does."""
    found: dict[str, str] = {}
    for parent in facts.parents:
        prefix = f"{parent.name}:"
        own = (note for note in notes if note.startswith(prefix))
        found[parent.name] = " ".join(note.removeprefix(prefix).strip() for note in own)
    return found if any(found.values()) else {}


def _licence_link(licence: CardLicence) -> str:
    # A plain id needs no escaping, and reads badly with it.
    name = licence.name or licence.id
    name = name if _PLAIN_ID.fullmatch(name) else prose(name)
    link = one_line(licence.link, 2000)
    # A link's text is harmless; what it leads to has to be a page.
    is_page = link.startswith("https://") and not set(link) & set("<>()[]\"'`\\ |")
    return f"[{name}]({link})" if is_page else name


def _plain(text: str) -> str:
    """Return a sentence as it is where that is safe: escaped colons read badly."""
    return text if _PLAIN_LINE.fullmatch(text) else prose(text)


def _range(values: Sequence[float]) -> str:
    """Return the smallest and largest value, or the one that all are."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _yaml(tree: dict[str, Any]) -> str:
    try:
        return yaml.safe_dump(tree, sort_keys=False, width=100)
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{LOCK_NAME} cannot be shown: {error}") from error
