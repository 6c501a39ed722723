"""The licence of a merge: a row for each line of the table, in any order, and the recipes' own."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.disclosure.licences import Licence, LicenceDecision, decide_licence, parse_licence
from merge.recipe.bundled import bundled_recipes
from merge.recipe.load import load_recipe
from merge.recipe.schema import Recipe

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
IP2P = "timbrooks/instruct-pix2pix"
XL = "stabilityai/stable-diffusion-xl-base-1.0"
IP2P_XL = "diffusers/sdxl-instructpix2pix-768"
SAI = Licence(
    "other",
    "sai-nc-community",
    "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md",
)
COSXL = Licence("other", "cosxl-nc-community", "https://huggingface.co/stabilityai/cosxl")


def decide(*repos: str) -> LicenceDecision:
    """Decide for repositories that state nothing."""
    return decide_licence([(repo, repo, None) for repo in repos])


@pytest.mark.parametrize(
    ("repos", "licence"),
    [
        ((IP2P, "latent-consistency/lcm-lora-sdv1-5"), Licence("creativeml-openrail-m")),
        ((IP2P, SD15), Licence("creativeml-openrail-m")),
        ((IP2P, "runwayml/stable-diffusion-v1-5"), Licence("creativeml-openrail-m")),
        (
            ("osunlp/InstructPix2Pix-MagicBrush", "latent-consistency/lcm-lora-sdv1-5"),
            Licence("creativeml-openrail-m"),
        ),
        ((IP2P_XL, XL, "latent-consistency/lcm-sdxl"), Licence("openrail++")),
        ((IP2P_XL, "latent-consistency/lcm-lora-sdxl"), Licence("openrail++")),
        ((IP2P_XL, XL, "ByteDance/SDXL-Lightning"), Licence("openrail++")),
        ((IP2P_XL, XL, "stabilityai/sdxl-turbo"), SAI),
        ((IP2P, "stabilityai/sd-turbo"), SAI),
        (("stabilityai/cosxl", XL, "latent-consistency/lcm-sdxl"), COSXL),
        (("TIGER-Lab/cosxl", XL), COSXL),
        ((IP2P_XL, XL, "tianweiy/DMD2"), Licence("cc-by-nc-4.0")),
        ((IP2P, "jasperai/flash-sd"), Licence("cc-by-nc-4.0")),
        ((IP2P, "SimianLuo/LCM_Dreamshaper_v7"), Licence("creativeml-openrail-m")),
        ((IP2P, "h1t/TCD-SD15-LoRA"), Licence("creativeml-openrail-m")),
        ((IP2P_XL, "h1t/TCD-SDXL-LoRA"), Licence("openrail++")),
        (
            (IP2P, "SherryXTChen/InstructCLIP-InstructPix2Pix"),
            Licence("creativeml-openrail-m"),
        ),
    ],
)
def test_the_most_restrictive_parent_governs(repos: tuple[str, ...], licence: Licence) -> None:
    decision = decide(*repos)
    assert decision.licence == licence
    assert (decision.unknown, decision.blocked) == ((), "")
    rails = [note for note in decision.notes if "Attachment A" in note]
    assert len(rails) == 1
    assert "a copy of the licence" in rails[0]
    limited = any("no commercial use" in note for note in decision.notes)
    assert limited == (licence not in (Licence("openrail++"), Licence("creativeml-openrail-m")))


def test_restrictions_of_openrail_stay_under_a_stricter_licence() -> None:
    notes = decide(IP2P_XL, XL, "tianweiy/DMD2").notes
    assert notes == (
        "pass on the use-based restrictions (Attachment A) and a copy of the licence: openrail++",
        "no commercial use beyond what the licence itself allows: cc-by-nc-4.0",
        "name the authors, and say that the weights were changed: cc-by-nc-4.0",
    )


@pytest.mark.parametrize("repo", ["ByteDance/Hyper-SD", "wangfuyun/PCM_Weights"])
@pytest.mark.parametrize("stated", [None, "openrail++", "mit"])
def test_unclear_ones_must_be_stated(repo: str, stated: str | None) -> None:
    decision = decide_licence([("target", IP2P, "mit"), ("distilled", repo, stated)])
    assert decision.licence is None
    assert decision.unknown == ("distilled",)
    assert decision.blocked == ""
    assert decision.notes[0].startswith("the licence of distilled is not known")


@pytest.mark.parametrize(
    ("repo", "stated", "name"),
    [
        ("jasperai/flash-sdxl", None, "cc-by-nc-nd-4.0"),
        ("JasperAI/Flash-SDXL", "mit", "cc-by-nc-nd-4.0"),
        ("someone/unet", "cc-by-nd-4.0", "cc-by-nd-4.0"),
        ("someone/unet", "cc-by-nc-nd-3.0", "cc-by-nc-nd-3.0"),
        (None, "cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0"),
    ],
)
def test_no_derivatives_blocks(repo: str | None, stated: str | None, name: str) -> None:
    decision = decide_licence([("target", IP2P_XL, None), ("distilled", repo, stated)])
    assert decision.blocked == f"{name} of distilled allows no derivatives, and a merge is one"
    unknown_too = decide_licence([("distilled", repo, stated), ("base", None, None)])
    assert unknown_too.blocked == decision.blocked
    assert unknown_too.licence is None


@pytest.mark.parametrize(
    ("names", "licence"),
    [
        (("mit",), "mit"),
        (("mit", "apache-2.0"), "apache-2.0"),
        (("MIT", "openrail++"), "openrail++"),
        (("openrail", "apache-2.0"), "openrail"),
        (("openrail++", "creativeml-openrail-m"), "creativeml-openrail-m"),
        (("cc-by-4.0", "cc-by-sa-4.0"), "cc-by-sa-4.0"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), "cc-by-nc-sa-4.0"),
        (("cc-by-sa-4.0", "creativeml-openrail-m"), None),
        (("cc-by-sa-4.0", "cc-by-nc-4.0"), None),
    ],
)
def test_stated_licences_rank(names: tuple[str, ...], licence: str | None) -> None:
    decision = decide_licence([(n, f"someone/unet-{i}", n) for i, n in enumerate(names)])
    assert decision.licence == (None if licence is None else Licence(licence))
    assert (decision.unknown, decision.blocked) == ((), "")


def test_two_that_do_not_contain_each_other_are_both_named() -> None:
    decision = decide("tianweiy/DMD2", "stabilityai/sdxl-turbo", IP2P_XL)
    assert decision.licence is None
    assert decision.unknown == ()
    assert decision.notes[0] == (
        "cc-by-nc-4.0 (tianweiy/DMD2) and sai-nc-community (stabilityai/sdxl-turbo) do not contain "
        "each other: state what governs the merge"
    )
    assert decide("stabilityai/sdxl-turbo", "stabilityai/cosxl").licence is None
    assert decide("stabilityai/sdxl-turbo", "stabilityai/sd-turbo").licence == SAI


def test_the_table_wins_over_the_card() -> None:
    assert decide_licence([("target", IP2P.upper(), "mit")]).licence == Licence(
        "creativeml-openrail-m"
    )


@pytest.mark.parametrize("stated", [None, "", "other", "unknown", "gpl-3.0", "creativeml"])
@pytest.mark.parametrize("repo", [None, "someone/unet"])
def test_what_has_no_rank_is_unknown(repo: str | None, stated: str | None) -> None:
    decision = decide_licence([("b", repo, stated), ("a", repo, stated), ("t", IP2P, None)])
    assert decision.licence is None
    assert decision.unknown == ("a", "b")


def test_permissive_parents_come_with_a_warning() -> None:
    decision = decide_licence([("target", "someone/editor", "mit")])
    assert decision.licence == Licence("mit")
    assert "OpenRAIL" in decision.notes[0]


def test_no_parents_decide_nothing() -> None:
    assert decide_licence([]) == LicenceDecision(None, (), "", ())


REPOS = [
    *(IP2P, SD15, XL, IP2P_XL, "tianweiy/DMD2", "stabilityai/sdxl-turbo", "stabilityai/sd-turbo"),
    *("stabilityai/cosxl", "jasperai/flash-sdxl", "ByteDance/Hyper-SD", "someone/unet", None),
]
STATED = [None, "mit", "apache-2.0", "openrail", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0"]
PARENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(REPOS), st.sampled_from(STATED)), max_size=5
)


@given(PARENTS)
def test_the_order_of_parents_does_not_matter(
    parents: list[tuple[str, str | None, str | None]],
) -> None:
    decisions = {decide_licence(order) for order in itertools.permutations(parents)}
    assert len(decisions) == 1


@given(PARENTS, PARENTS)
def test_another_parent_never_loosens(
    parents: list[tuple[str, str | None, str | None]],
    more: list[tuple[str, str | None, str | None]],
) -> None:
    before, after = decide_licence(parents), decide_licence([*parents, *more])
    assert set(before.unknown) <= set(after.unknown)
    assert not before.blocked or after.blocked
    if parents and before.licence is None and after.licence is not None:
        # Only by a licence that contains those that could not be decided between.
        assert before.unknown == ()


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("mit", Licence("mit")),
        ("creativeml-openrail-m", Licence("creativeml-openrail-m")),
        ("openrail++", Licence("openrail++")),
        ("cc-by-nc-4.0", Licence("cc-by-nc-4.0")),
        ("sai-nc-community", SAI),
        ("cosxl-nc-community", COSXL),
        ("some.new+id-1", Licence("some.new+id-1")),
    ],
)
def test_ids_of_users_are_parsed(text: str, licence: Licence) -> None:
    assert parse_licence(text) == licence


@pytest.mark.parametrize("text", ["", " ", "MIT", "mit\n", "the MIT licence", "a/b", "a_b", "--"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no licence id"):
        parse_licence(text)


# -------------------------------------------------------------------------------------- recipes


def parents_of(recipe: Recipe) -> list[tuple[str, str | None, str | None]]:
    models = recipe.models
    named = [("target", models.target), ("base", models.base)]
    named += [(f"distilled[{index}]", ref) for index, ref in enumerate(models.distilled)]
    return [(role, ref.repo, None) for role, ref in named if ref is not None]


@pytest.mark.parametrize("name", bundled_recipes())
def test_comments_of_bundled_recipes_say_what_is_decided(name: str) -> None:
    text = bundled_recipes()[name].read_text(encoding="utf-8")
    pattern = r"^# Licence: ([a-z0-9.+-]+?)(?=[,:.]?\s)(.*?)^# Unconfirmed"
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    assert match is not None
    decision = decide_licence(parents_of(load_recipe(name)))
    assert decision.blocked == ""
    licence = decision.licence
    if name.startswith("demo"):
        # Local files, of which only this repository can tell.
        assert licence is None
        assert match[1] == "apache-2.0"
    elif licence is None:
        assert match[1] == "unclear"
        assert "--license" in match[2]
        assert decision.unknown == ("distilled[0]",)
    else:
        assert match[1] == (licence.name or licence.id)
        words = " ".join(match[2].replace("#", " ").split())
        assert ("Attachment A" in words) == any("Attachment A" in note for note in decision.notes)
        limited = any("no commercial use" in note for note in decision.notes)
        assert limited == ("no commercial use" in words)
