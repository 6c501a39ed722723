"""The licence of a merged model: the most restrictive of its parents' governs. No legal advice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Any version of a Creative Commons licence without derivatives: cc-by-nd-4.0, cc-by-nc-nd-3.0 ...
_NO_DERIVATIVES = re.compile(r".+-nd(-.+)?")
_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Licence:
    """What goes into a model card.

    Attributes:
        id: The Hub's licence id, such as `creativeml-openrail-m`; `other` for one it has no id for.
        name: `license_name`, when the id is `other`.
        link: `license_link`, when the id is `other`.
    """

    id: str
    name: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class LicenceDecision:
    """What the parents' licences mean for a merge of them.

    Attributes:
        licence: Of the result; None when the user must state it.
        unknown: Labels of the parents whose licence nobody knows, sorted.
        blocked: Why the result may not be published; empty when it may.
        notes: What the publisher must do or know, one sentence each.
    """

    licence: Licence | None
    unknown: tuple[str, ...]
    blocked: str
    notes: tuple[str, ...]


# Licences that the Hub has no id for.
_OTHERS = {
    "cosxl-nc-community": Licence("other", "cosxl-nc-community", f"{_HUB}/stabilityai/cosxl"),
    "sai-nc-community": Licence(
        "other", "sai-nc-community", f"{_HUB}/stabilityai/sdxl-turbo/blob/main/LICENSE.md"
    ),
}
# From loose to strict, each containing what the one before it asks for. Attribution alone does not
# restrict what licence a derivative has, so it stands below the OpenRAIL family; within that, SD1.5
# with an LCM-LoRA (openrail++) goes by SD1.5's own licence.
_PERMISSIVE = ("cc0-1.0", "mit", "apache-2.0", "cc-by-4.0")
_OPENRAIL = ("openrail", "openrail++", "creativeml-openrail-m")
_OPEN = (*_PERMISSIVE, *_OPENRAIL)
# Licence to those that it contains besides itself. Two licences that do not contain each other
# cannot be decided between by a program. Share-alike ones forbid terms on top, which OpenRAIL's
# restrictions on use are, so they contain no OpenRAIL licence.
_CONTAINS: dict[str, tuple[str, ...]] = {
    **{name: _OPEN[:rank] for rank, name in enumerate(_OPEN)},
    "cc-by-sa-4.0": _PERMISSIVE,
    "cc-by-nc-4.0": _OPEN,
    "cc-by-nc-sa-4.0": (*_PERMISSIVE, "cc-by-nc-4.0"),
    "cc-by-nd-4.0": _OPEN,
    "cc-by-nc-nd-4.0": (*_OPEN, "cc-by-nc-4.0", "cc-by-nd-4.0"),
    "cosxl-nc-community": _OPEN,
    "sai-nc-community": _OPEN,
}
_NON_COMMERCIAL = re.compile(r".+-nc(-.+)?")

_SD15 = "creativeml-openrail-m"
# Lower-case repository to what governs its weights; None: unclear, so that the user must say.
# These win over the card: InstructPix2Pix's says MIT, and its weights descend from SD1.5, whose
# restrictions its own LICENSE passes on.
_REPOSITORIES: dict[str, str | None] = {
    "timbrooks/instruct-pix2pix": _SD15,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
    "runwayml/stable-diffusion-v1-5": _SD15,  # the same before its owner left the Hub
    "osunlp/instructpix2pix-magicbrush": _SD15,
    "vinesmsuic/magicbrush-jul7": _SD15,
    "vinesmsuic/magicbrush-paper": _SD15,
    "vinesmsuic/magicbrush-ema": _SD15,
    "latent-consistency/lcm-lora-sdv1-5": "openrail++",
    "latent-consistency/lcm-lora-sdxl": "openrail++",
    "latent-consistency/lcm-sdxl": "openrail++",
    "diffusers/sdxl-instructpix2pix-768": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "bytedance/sdxl-lightning": "openrail++",
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "stabilityai/sd-turbo": "sai-nc-community",
    "stabilityai/cosxl": "cosxl-nc-community",
    "tiger-lab/cosxl": "cosxl-nc-community",  # a mirror
    "tianweiy/dmd2": "cc-by-nc-4.0",
    "jasperai/flash-sd": "cc-by-nc-4.0",
    "jasperai/flash-sdxl": "cc-by-nc-nd-4.0",
    "bytedance/hyper-sd": None,  # its tag was removed in August 2024
    "wangfuyun/pcm_weights": None,  # it never had one
    "simianluo/lcm_dreamshaper_v7": "mit",
    "h1t/tcd-sd15-lora": "mit",
    "h1t/tcd-sdxl-lora": "mit",
    "sherryxtchen/instructclip-instructpix2pix": "apache-2.0",
}


def decide_licence(parents: Sequence[tuple[str, str | None, str | None]]) -> LicenceDecision:
    """Decide the licence of a merge: that of the parent which contains all the others'.

    Args:
        parents: Label, repository or None for a local file, and the licence id that the Hub states
            for it or None; in any order.
    """
    known: dict[str, set[str]] = {}
    unknown = set()
    for label, repo, stated in parents:
        if (name := _licence_of(repo, stated)) is None:
            unknown.add(label)
        else:
            known.setdefault(name, set()).add(label)
    forbidding = sorted(name for name in known if _NO_DERIVATIVES.fullmatch(name))
    blocked = "; ".join(
        f"{name} of {', '.join(sorted(known[name]))} allows no derivatives, and a merge is one"
        for name in forbidding
    )
    strictest = [name for name in sorted(known) if all(_contains(name, other) for other in known)]
    licence = _licence(strictest[0]) if strictest and not unknown else None
    return LicenceDecision(licence, tuple(sorted(unknown)), blocked, _notes(known, unknown))


def is_stricter(stated: Licence, decided: Licence) -> bool:
    """Return True when a licence contains another, or nothing is known of it that says otherwise.

    Args:
        stated: What the publisher says.
        decided: What follows from the parents.
    """
    name, other = stated.name or stated.id, decided.name or decided.id
    return _contains(name, other) or name not in _CONTAINS


def parse_licence(text: str) -> Licence:
    """Return the licence of an id, as the user states it.

    Args:
        text: A licence id of the Hub, or a name that this tool knows and the Hub has no id for.

    Raises:
        ValueError: the text is no licence id.
    """
    if not _ID.fullmatch(text):
        raise ValueError(
            f"{text!r} is no licence id: lower-case letters, digits, `.`, `+` and `-`, "
            "such as creativeml-openrail-m"
        )
    return _licence(text)


def _licence(name: str) -> Licence:
    return _OTHERS.get(name, Licence(name))


def _licence_of(repo: str | None, stated: str | None) -> str | None:
    """Return the name of what governs a parent, or None."""
    if repo is not None and repo.lower() in _REPOSITORIES:
        return _REPOSITORIES[repo.lower()]
    name = (stated or "").strip().lower()
    return name if name in _CONTAINS or _NO_DERIVATIVES.fullmatch(name) else None


def _contains(name: str, other: str) -> bool:
    return name == other or other in _CONTAINS.get(name, ())


def _notes(known: dict[str, set[str]], unknown: set[str]) -> tuple[str, ...]:
    notes = []
    if unknown:
        notes.append(
            f"the licence of {', '.join(sorted(unknown))} is not known: read it and state what "
            "governs the merge"
        )
    # Of all the parents that no other parent contains; more than one cannot be decided between.
    highest = [
        name
        for name in sorted(known)
        if not any(other != name and _contains(other, name) for other in known)
    ]
    if len(highest) > 1:
        names = " and ".join(f"{name} ({', '.join(sorted(known[name]))})" for name in highest)
        notes.append(f"{names} do not contain each other: state what governs the merge")
    if rails := [name for name in _OPENRAIL if name in known]:
        notes.append(
            "pass on the use-based restrictions (Attachment A) and a copy of the licence: "
            + ", ".join(rails)
        )
    if limited := [name for name in sorted(known) if _NON_COMMERCIAL.fullmatch(name)]:
        notes.append(
            f"no commercial use beyond what the licence itself allows: {', '.join(limited)}"
        )
    if named := [name for name in sorted(known) if name.startswith("cc-by")]:
        notes.append(f"name the authors, and say that the weights were changed: {', '.join(named)}")
    if known and not unknown and set(known) <= set(_PERMISSIVE):
        notes.append(
            "every parent states a permissive licence; weights of Stable Diffusion models usually "
            "descend from some under an OpenRAIL licence, whose restrictions on use stay"
        )
    return tuple(notes)
