"""The licence of an export, from those of its parents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.disclosure.licences import Licence, decide_licence, is_stricter, parse_licence
from merge.errors import MergeError, PublishError
from merge.publication.card import licence_of
from merge.sources.hub_errors import hub_errors


@dataclass(frozen=True, slots=True)
class Decided:
    """A licence and what comes with it.

    Attributes:
        licence: Of the export.
        notes: What the publisher must do or know.
    """

    licence: Licence
    notes: tuple[str, ...]


def decide(
    manifest: Mapping[str, Any], stated: str | None, local: Mapping[str, str] | None = None
) -> Decided:
    """Decide the licence of an export: the most restrictive of its parents', or the stated one.

    Parents that the tool does not know are asked for on the Hub, as far as it can be reached.

    Args:
        manifest: Of the export.
        stated: What the publisher says.
        local: Role to the licence that a local parent's own card states.

    Raises:
        PublishError: a parent forbids derivatives, or the licence cannot be decided.
    """
    try:
        chosen = parse_licence(stated) if stated is not None else None
    except ValueError as error:
        hint = "https://huggingface.co/docs/hub/repositories-licenses lists them"
        raise PublishError(f"--license: {error}", hint=hint) from error
    roles = manifest.get("inputs", {})
    parents = [
        (str(model.get("repo") or model.get("name")), model.get("repo"), (local or {}).get(role))
        for role, model in roles.items()
    ]
    decision = decide_licence(parents)
    if decision.unknown and not decision.blocked:
        commits = {model.get("repo"): model.get("commit") for model in roles.values()}
        asked = [
            (label, repo, _ask(repo, commits[repo]) if repo and label in decision.unknown else own)
            for label, repo, own in parents
        ]
        decision = decide_licence(asked)
    if decision.blocked:
        raise PublishError(
            f"this merge may not be published: {decision.blocked}",
            hint="keep it for yourself, or merge another distilled model",
        )
    if chosen and decision.licence and not is_stricter(chosen, decision.licence):
        decided = decision.licence.name or decision.licence.id
        raise PublishError(
            f"--license {stated} allows more than {decided}, which the parents' licences ask for",
            hint="leave --license out to publish under that of the parents",
        )
    licence = chosen or decision.licence
    if licence is None:
        names = ", ".join(decision.unknown)
        reason = f"the licence of {names} is not known" if names else " ".join(decision.notes)
        raise PublishError(
            f"which licence the merge is under cannot be decided: {reason}",
            hint="read the parents' licences and say it with --license ID",
        )
    notes = tuple(n for n in decision.notes if chosen is None or "state what governs" not in n)
    return Decided(licence, notes)


def _ask(repo: str, commit: str | None) -> str | None:
    """Return the licence that a model's own card states, if the Hub tells."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(repo, commit):
            card = HfApi().model_info(repo, revision=commit).card_data
    except MergeError:
        return None
    return licence_of(vars(card)) if card is not None else None
