"""Tokens and home folders: found, replaced, and refused where they could be repeated."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge import load_recipe
from merge.disclosure.secrets import find_secrets, find_tokens, known_tokens, redact
from merge.errors import RecipeError

CANARY = "hf_" + "Canary" * 5 + "1234"
# Put together here, so that no scanner takes this file for a leak.
TOKENS = {
    "Hugging Face token": ["hf_" + "a1B2" * 9, "api_org_" + "x" * 34],
    "GitHub token": ["ghp_" + "a" * 36, "ghs_" + "b" * 36, "github_pat_" + "c1_" * 20],
    "AWS key": ["AKIA" + "ABCD1234EFGH5678"],
    "API key": ["sk-" + "proj-" + "d" * 30],
    "Slack token": ["xoxb-" + "1234567890-" + "e" * 12],
    "private key": ["-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----"],
    "authorization header": ["Bearer " + "f" * 24, "authorization: bearer " + "A.b-" * 10],
    "password in a URL": ["https://anna:pa55word@example.org/x"],
}
HOMES = [
    "/home/anna/models",
    "see /Users/anna.b/x",
    r"C:\Users\Anna\x",
    "C:\\\\Users\\\\anna",
    "/root/x",
]
HARMLESS = [
    *(
        "hf_hub_download",
        "hf_short",
        "a-sk-etch",
        "the bearer of news",
        "https://huggingface.co/a/b",
    ),
    *("outputs/home/x", "/homepage/x", "org/root/x", "git+https://huggingface.co/a@" + "a" * 40),
    *("sha256: " + "ab" * 32, "mailto:anna@example.org", "http://127.0.0.1:8080/x@main"),
]


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, ts in TOKENS.items() for t in ts])
def test_every_kind_of_token_is_found_and_replaced(kind: str, text: str) -> None:
    whole = f"first line\nsome: '{text}' and more"
    assert [(f.kind, f.line) for f in find_tokens(whole)] == [(kind, 2)]
    left = redact(whole)
    assert find_tokens(left) == []
    assert left.startswith("first line\nsome: '")
    assert left.endswith("and more")
    assert text.split()[-1] not in left


@pytest.mark.parametrize("text", HOMES)
def test_home_folders_are_found_and_left_in_messages(text: str) -> None:
    (finding,) = find_secrets(f"a\nb\n{text}")
    assert (finding.kind, finding.line) == ("home folder", 3)
    assert find_tokens(text) == []
    assert redact(text) == text


def test_the_home_folder_of_this_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/anna")
    assert [f.kind for f in find_secrets("in /srv/people/anna/models")] == ["home folder"]
    assert find_secrets("in /srv/people/annabel/models") == []


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_no_secret(text: str) -> None:
    assert find_secrets(text) == []
    assert redact(text) == text


def test_known_tokens_are_found_in_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "odd shape!")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "short")
    known = known_tokens()
    assert "odd shape!" in known
    assert "short" not in known
    text = "x\nan odd shape! here"
    assert [(f.kind, f.line) for f in find_tokens(text, known)] == [("access token", 2)]
    assert redact(text, known) == "x\nan *** here"


@settings(max_examples=400)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([token for tokens in TOKENS.values() for token in tokens]),
            st.text(string.ascii_letters + string.digits + "_-:/@ \n.", max_size=40),
        )
    )
)
def test_nothing_is_left_after_replacing(parts: list[str]) -> None:
    left = redact("".join(parts))
    assert find_tokens(left) == []
    assert redact(left) == left


def test_a_token_that_touches_another_is_replaced_too() -> None:
    text = TOKENS["AWS key"][0] + TOKENS["authorization header"][0]
    assert find_tokens(redact(text)) == []


def test_megabytes_are_searched_in_seconds() -> None:
    text = ("hf_" + "a" * 29 + " sk- xox https://a:b " + "/home" * 20 + "x" * 500 + "\n") * 8000
    started = time.perf_counter()
    assert find_tokens(text) == []
    # Some 5 MB; a pattern that backtracks would take minutes. Generous: machines are busy.
    assert time.perf_counter() - started < 60


def test_a_recipe_that_holds_a_token_is_refused_without_repeating_it(tmp_path: Path) -> None:
    path = tmp_path / "leaky.yaml"
    path.write_text(f"name: leaky\nmodels:\n  target: org/name@{CANARY}\n")
    with pytest.raises(RecipeError, match=r"leaky\.yaml holds what looks like a secret") as caught:
        load_recipe(path)
    assert "line 3" in caught.value.message
    assert CANARY not in str(caught.value)
    with pytest.raises(RecipeError, match="an override holds what looks like a secret") as caught:
        load_recipe("sdxl-turbo", [f"models.target.revision={CANARY}"])
    assert CANARY not in str(caught.value)


def test_the_command_line_repeats_no_token(tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_TOKEN": "an-odd/token", "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-m", "merge", *words]
        child = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
        for text in (child.stdout, child.stderr):
            assert CANARY not in text
            assert "an-odd/token" not in text
        return child

    typed = command("publish", "x", "--repo-id", "a/b", "--token", CANARY)
    assert typed.returncode == 2
    assert typed.stderr.splitlines()[-1].startswith("hint: a token comes from HF_TOKEN or")
    assert command("run", f"{CANARY}.yaml").returncode == 3
    # The environment's token is of no known pattern and part of what the error would say.
    missing = command("run", "an-odd/token/x.yaml")
    assert (missing.returncode, "***/x.yaml" in missing.stderr) == (3, True)
    debug = command("run", "an-odd/token/x.yaml", "--debug")
    assert debug.returncode == 3
    assert "Traceback" in debug.stderr
    assert "RecipeError" in debug.stderr
    override = command("run", "demo", f"weight={CANARY}")
    assert (override.returncode, "hf_" in override.stderr) == (3, False)
    assert command("env").returncode == 0
