"""The front matter of a card: what the Hub's filters and widgets read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from merge.card.escape import one_line
from merge.card.facts import CardFacts
from merge.disclosure.licences import Licence

_SCHEDULER_TAGS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}


@dataclass(frozen=True, slots=True)
class CardLicence(Licence):
    """The licence of a merged model, and what is to be said of it.

    Attributes:
        notes: Sentences for people. One that begins with the Hub id of a parent and a colon also
            stands beside that parent.
    """

    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, licence: Licence, notes: tuple[str, ...]) -> CardLicence:
        """Return a licence with its notes."""
        return cls(licence.id, licence.name, licence.link, notes)


def front_matter(facts: CardFacts, licence: CardLicence | None) -> str:
    """Return the YAML block with its two rules, no line break at the end.

    Source: https://huggingface.co/docs/hub/model-cards
    """
    tree: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "image-to-image"}
    parents = list(dict.fromkeys(parent.name for parent in facts.parents if parent.is_on_hub))
    if parents:
        tree |= {"base_model": parents, "base_model_relation": "merge"}
    tree["tags"] = _tags(facts)
    if licence is not None:
        tree["license"] = one_line(licence.id)
        for key, value in (("license_name", licence.name), ("license_link", licence.link)):
            if value:
                tree[key] = one_line(value, 2000)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---"


def _tags(facts: CardFacts) -> list[str]:
    tags = ["instruct-pix2pix", "merge", _SCHEDULER_TAGS.get(facts.scheduler, "few-step")]
    method = facts.recipe.text("method")
    if method != "add_difference":
        tags.append(one_line(method).replace("_", "-"))
    return list(dict.fromkeys([*tags, facts.family.tag, "image-to-image"]))
