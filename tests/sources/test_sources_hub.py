"""Models from the Hub: the real client in processes of its own against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import HubServer

TOKEN = "hf_" + "canary" * 5 + "1234"

# What a public pipeline holds, each component in more forms than one.
TARGET_FILES = [
    *(".gitattributes", "README.md", "images/grid.png", "edit.ckpt", "edit-22000.safetensors"),
    *("feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"),
    *("safety_checker/config.json", "safety_checker/pytorch_model.bin"),
    *("safety_checker/model.safetensors", "text_encoder/config.json"),
    *("text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"),
    *("text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.fp16.bin"),
    *("text_encoder/flax_model.msgpack", "text_encoder/model.onnx"),
    *("tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.bin"),
    *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_flax_model.msgpack"),
    *("vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/notes/tiling.json"),
    *("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
]
NEEDED_OF_TARGET = {
    *("model_index.json", "feature_extractor/preprocessor_config.json"),
    *("scheduler/scheduler_config.json", "safety_checker/config.json"),
    *("safety_checker/model.safetensors", "text_encoder/config.json"),
    *("text_encoder/model.fp16.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json"),
    *("tokenizer/tokenizer_config.json", "unet/config.json"),
    *("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/notes/tiling.json"),
    "vae/diffusion_pytorch_model.fp16.safetensors",
}
INDEX = {
    "_class_name": "StableDiffusionInstructPix2PixPipeline",
    "_diffusers_version": "0.12.0.dev0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
REPOS = {
    "org/target": TARGET_FILES,
    # A pipeline of which only the UNet is wanted.
    "org/base": [
        *("README.md", "scheduler/scheduler_config.json", "unet/config.json", "v1-5.safetensors"),
        *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors"),
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    ],
    # A UNet at the root of its repository.
    "org/lcm": [
        *("README.md", "lcm.png", "config.json", "diffusion_pytorch_model.safetensors"),
        *("diffusion_pytorch_model.fp16.safetensors", "diffusion_flax_model.msgpack"),
    ],
    "org/lora": ["README.md", "images/a.png", "pytorch_lora_weights.safetensors"],
    # A pipeline of the time before safetensors.
    "org/pickled": [
        *("README.md", "unet/config.json", "unet/diffusion_pytorch_model.bin", "step.ckpt"),
        *("unet/diffusion_pytorch_model.fp16.bin", "unet/diffusion_flax_model.msgpack"),
    ],
    "org/several": ["4step_unet.safetensors", "8step_unet.safetensors", "4step_lora.safetensors"],
}

# Arguments: a recipe, and a list of lists of overrides; prints what each of them resolves to.
RESOLVE = """
import json, sys
from merge import MergeError, load_recipe, resolve_sources


def describe(model):
    parts = model.pipeline.components if model.pipeline else ()
    files = [*model.main_files, *(file for part in parts for file in part.files)]
    return {
        "label": model.label,
        "commit": model.commit,
        "variant": model.variant,
        "weights": [file.name for file in model.main_files],
        "config": model.config,
        "exports": {p.name: p.export_names for p in parts},
        "sha256": {file.name: file.expected_sha256 for file in files},
        "inside": all(file.path == model.root / file.name for file in files),
        "read": {file.name: file.path.read_text("latin-1")[:80] for file in files},
    }


def resolve(overrides):
    try:
        sources = resolve_sources(load_recipe(sys.argv[1], overrides))
    except MergeError as error:
        facts = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        return {"error": facts}
    return {model.role: describe(model) for model in sources.models}


print(json.dumps([resolve(overrides) for overrides in json.loads(sys.argv[2])]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    for repo, names in REPOS.items():
        for name in names:
            path = root / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = (
                json.dumps({"from": repo, "as": name})
                if name.endswith(".json")
                else f"{repo} {name}\n"
            )
            path.write_text(text)
    (root / "org/target/model_index.json").write_text(json.dumps(INDEX))
    with HubServer(root) as server:
        yield server


def write_recipe(folder: Path, **models: object) -> Path:
    target = {"repo": "org/target", "variant": "fp16"}
    tree = {"base": "org/base", "distilled": "org/lcm", "target": target, **models}
    path = folder / "hub.yaml"
    path.write_text(yaml.safe_dump({"name": "hub", "models": tree}))
    return path


def python(
    hub: HubServer, home: Path, *words: object, offline: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env={**hub.environment(home, offline=offline), **extra},
        timeout=120,
    )


def resolve_each(
    hub: HubServer, recipe: Path, *cases: list[str], offline: bool = False
) -> list[dict[str, Any]]:
    """Resolve once for each list of overrides, all in one process and with one cache."""
    words = ["-W", "error", "-c", RESOLVE, recipe, json.dumps(cases)]
    child = python(hub, recipe.parent / "home", *words, offline=offline)
    assert child.returncode == 0, child.stderr
    found: list[dict[str, Any]] = json.loads(child.stdout)
    return found


def resolve(hub: HubServer, recipe: Path, *overrides: str, offline: bool = False) -> dict[str, Any]:
    (found,) = resolve_each(hub, recipe, list(overrides), offline=offline)
    return found


# What is fetched -------------------------------------------------------------------------------


def test_exactly_the_needed_files_are_downloaded_once(hub: HubServer, tmp_path: Path) -> None:
    found = resolve(hub, write_recipe(tmp_path))
    assert hub.names("org/target") == NEEDED_OF_TARGET
    assert hub.names("org/base") == {
        *("scheduler/scheduler_config.json", "unet/config.json"),
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert hub.names("org/lcm") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert len(hub.downloads) == len(set(hub.downloads))
    # Everything of the one commit that the branch stood for in the beginning.
    assert {(d.repo, d.revision) for d in hub.downloads} == {
        (repo, hub.commit(repo)) for repo in ("org/target", "org/base", "org/lcm")
    }
    assert list(found) == ["target", "base", "distilled"]
    for role, repo in (("target", "org/target"), ("base", "org/base"), ("distilled", "org/lcm")):
        model = found[role]
        assert (model["label"], model["commit"]) == (repo, hub.commit(repo))
        assert model["config"]["from"] == repo
        assert model["config"]["as"] in ("config.json", "unet/config.json")
        assert model["inside"]
        for name, text in model["read"].items():
            served = (hub.root / repo / name).read_bytes()
            assert text == served.decode()[:80]
            is_large = name.endswith(".safetensors")
            assert model["sha256"][name] == (hashlib.sha256(served).hexdigest() if is_large else "")


def test_each_component_gets_the_variant_that_it_has(hub: HubServer, tmp_path: Path) -> None:
    fp16 = "unet/diffusion_pytorch_model.fp16.safetensors"
    found = resolve(hub, write_recipe(tmp_path), "models.base.variant=fp16")
    assert (found["base"]["variant"], found["base"]["weights"]) == ("fp16", [fp16])
    target = found["target"]
    assert target["variant"] == ""
    assert target["weights"] == ["unet/diffusion_pytorch_model.safetensors"]
    assert [name for names in target["exports"].values() for name in names] == [
        "feature_extractor/preprocessor_config.json",
        *("safety_checker/config.json", "safety_checker/model.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
        *("vae/config.json", "vae/notes/tiling.json", "vae/diffusion_pytorch_model.safetensors"),
    ]


def test_pickles_are_fetched_only_when_allowed(hub: HubServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base="org/pickled")
    file = {"repo": "org/pickled", "file": "step.ckpt"}
    refused, taken = resolve_each(hub, recipe, [], ["allow_pickle=true"])
    assert "unet has its weights only as a pickle" in refused["error"]["message"]
    assert "allow_pickle: true" in refused["error"]["hint"]
    weights = "unet/diffusion_pytorch_model.bin"
    assert taken["base"]["weights"] == [weights]
    assert hub.names("org/pickled") == {"unet/config.json", weights}
    served = (hub.root / "org/pickled" / weights).read_bytes()
    assert taken["base"]["sha256"][weights] == hashlib.sha256(served).hexdigest()
    # What has safetensors is taken as before.
    assert hub.names("org/target") == NEEDED_OF_TARGET
    recipe = write_recipe(tmp_path, base=file)
    refused, taken = resolve_each(hub, recipe, [], ["allow_pickle=true"])
    assert "step.ckpt is no .safetensors file but a pickle" in refused["error"]["message"]
    assert taken["base"]["weights"] == ["step.ckpt"]
    (offline,) = resolve_each(hub, recipe, ["allow_pickle=true"], offline=True)
    assert offline["base"]["weights"] == ["step.ckpt"]


def test_a_lora_repository_needs_one_file(hub: HubServer, tmp_path: Path) -> None:
    found = resolve(hub, write_recipe(tmp_path, base=None, distilled="org/lora@v1"))
    assert hub.names("org/lora") == {"pytorch_lora_weights.safetensors"}
    assert found["distilled"]["weights"] == ["pytorch_lora_weights.safetensors"]
    assert found["distilled"]["commit"] == hub.commit("org/lora")
    assert list(found) == ["target", "distilled"]


def test_one_of_several_files_and_a_subfolder(hub: HubServer, tmp_path: Path) -> None:
    several = {"repo": "org/several", "file": "8step_unet.safetensors"}
    base = {"repo": "org/base", "subfolder": "unet"}
    recipe = write_recipe(tmp_path, distilled=several, base=base)
    found, unclear = resolve_each(hub, recipe, [], ["models.distilled=org/several"])
    assert hub.names("org/several") == {"8step_unet.safetensors"}
    assert found["distilled"]["weights"] == ["8step_unet.safetensors"]
    assert found["base"]["weights"] == ["unet/diffusion_pytorch_model.safetensors"]
    assert "scheduler/scheduler_config.json" not in hub.names("org/base")
    error = unclear["error"]
    assert error["type"] == "SourceError"
    assert "org/several has several weight files: 4step_lora, 4step_unet" in error["message"]
    assert "`file:`" in error["hint"]


def test_a_broken_connection_is_taken_up_again(hub: HubServer, tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    hub.cut.add(("org/lcm", name))
    found = resolve(hub, write_recipe(tmp_path))["distilled"]
    assert [d.name for d in hub.downloads if d.repo == "org/lcm"].count(name) == 2
    assert found["read"][name] == (hub.root / "org/lcm" / name).read_text()


# Offline ---------------------------------------------------------------------------------------


def without_digests(found: dict[str, Any]) -> dict[str, Any]:
    return {role: {**model, "sha256": sorted(model["sha256"])} for role, model in found.items()}


def test_offline_the_cache_gives_the_same_files(hub: HubServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, distilled="org/lcm@v1")
    online, again = resolve_each(hub, recipe, [], [])
    assert online == again
    assert len(hub.downloads) == len(set(hub.downloads))
    hub.requests.clear()
    # A lock names commits, under which the cache has the files too.
    commits = [f"models.{role}.revision={model['commit']}" for role, model in online.items()]
    cases = [], commits, ["models.base.revision=v1"]
    offline, locked, other = resolve_each(hub, recipe, *cases, offline=True)
    assert without_digests(offline) == without_digests(online)
    assert without_digests(locked) == without_digests(online)
    # Another branch may stand for another commit.
    assert other["error"]["type"] == "OfflineError"
    assert "org/base at v1 is not in the cache" in other["error"]["message"]
    assert hub.requests == []


def test_offline_without_the_model_says_what_to_type(hub: HubServer, tmp_path: Path) -> None:
    cases = ["models.base=org/base@v1"], []
    branch, plain = resolve_each(hub, write_recipe(tmp_path), *cases, offline=True)
    error = branch["error"]
    assert error["type"] == "OfflineError"
    assert error["message"].startswith(
        "models.base: org/base at v1 is not in the cache, and HF_HUB"
    )
    assert error["hint"] == "on a machine with a network run `hf download org/base --revision v1`"
    assert plain["error"]["hint"] == "on a machine with a network run `hf download org/base`"
    assert hub.requests == []


DIFFUSERS_DOWNLOAD = """
import huggingface_hub

# As DiffusionPipeline.from_pretrained asks for a pipeline, and a model class for a folder.
huggingface_hub.snapshot_download(
    "org/target", allow_patterns=["model_index.json", "*/*.json", "tokenizer/*", "*.safetensors"],
    ignore_patterns=["edit-22000*", "*.fp16.*"],
)
huggingface_hub.snapshot_download("org/base", allow_patterns=["unet/*"])
huggingface_hub.snapshot_download("org/lcm")
"""


def test_offline_the_downloads_of_other_programs_are_found(hub: HubServer, tmp_path: Path) -> None:
    child = python(hub, tmp_path / "home", "-c", DIFFUSERS_DOWNLOAD)
    assert child.returncode == 0, child.stderr
    found = resolve(hub, write_recipe(tmp_path), "models.target.variant=null", offline=True)
    assert found["target"]["exports"]["vae"][-1] == "vae/diffusion_pytorch_model.safetensors"
    assert found["base"]["weights"] == ["unet/diffusion_pytorch_model.safetensors"]
    assert found["distilled"]["commit"] == hub.commit("org/lcm")


@pytest.mark.parametrize(
    "name",
    [
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "tokenizer/vocab.json",
        "unet/config.json",
    ],
)
def test_offline_a_download_that_broke_off_is_not_taken_for_all(
    hub: HubServer, tmp_path: Path, name: str
) -> None:
    hub.refused["org/target", name] = 530
    recipe = write_recipe(tmp_path)
    assert "org/target" in resolve(hub, recipe)["error"]["message"]
    assert name not in hub.names("org/target")
    assert NEEDED_OF_TARGET & hub.names("org/target")
    error = resolve(hub, recipe, offline=True)["error"]
    assert error["type"] == "OfflineError"
    assert error["message"].startswith("models.target: ")
    assert "hf download org/target" in error["hint"]


# Failures --------------------------------------------------------------------------------------


def test_what_the_hub_does_not_have(hub: HubServer, tmp_path: Path) -> None:
    cases = {
        "models.base=org/none": ("there is no model org/none on the Hub", "hf auth login"),
        "models.base=org/base@v9": ("org/base has no revision v9", "check the path or the Hub id"),
        "models.base.subfolder=nothing": ("it has no folder nothing", "check the path"),
        "models.base.file=no.safetensors": ("org/base has no file no.safetensors", "check the"),
    }
    results = resolve_each(hub, write_recipe(tmp_path), *([word] for word in cases))
    for (message, hint), result in zip(cases.values(), results, strict=True):
        error = result["error"]
        assert error["type"] == "SourceNotFoundError"
        assert error["message"].startswith(f"models.base: {message}")
        assert hint in error["hint"]


def test_names_that_lead_elsewhere_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.listed["org/target"] = ["vae/../../../../evil.json"]
    cases = ["models.base=org/a--b"], []
    dashes, climbing = resolve_each(hub, write_recipe(tmp_path), *cases)
    assert dashes["error"]["type"] == "SourceError"
    assert "models.base: the Hub cannot be asked for org/a--b: " in dashes["error"]["message"]
    assert climbing["error"]["type"] == "SourceError"
    assert "evil.json" in climbing["error"]["message"]
    assert not list(tmp_path.rglob("*evil*"))


def test_a_gated_repository_names_the_page_with_its_terms(hub: HubServer, tmp_path: Path) -> None:
    hub.gated.add("org/base")
    error = resolve(hub, write_recipe(tmp_path))["error"]
    assert error == {
        "type": "SourceNotFoundError",
        "message": "models.base: org/base is gated and this account has no access",
        "hint": "accept its terms at https://huggingface.co/org/base, then `hf auth login`",
    }


def test_a_hub_that_does_not_answer(hub: HubServer, tmp_path: Path) -> None:
    hub.stop()
    error = resolve(hub, write_recipe(tmp_path))["error"]
    assert error["type"] == "OfflineError"
    assert error["message"].startswith("models.base: the Hub cannot be reached for org/base: ")
    assert "HF_HUB_OFFLINE=1" in error["hint"]


def test_a_hub_that_fails_in_the_middle_is_not_called_offline(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.refused["org/base", "unet/diffusion_pytorch_model.safetensors"] = 530
    error = resolve(hub, write_recipe(tmp_path))["error"]
    assert error["type"] == "OfflineError"
    assert "HF_HUB_OFFLINE forbids" not in error["message"]
    assert error["message"].startswith(
        f"models.base: the Hub cannot be reached for org/base at {hub.commit('org/base')}: "
    )
    assert "check the network" in error["hint"]


def test_a_failure_of_the_default_way_to_download_is_named(hub: HubServer, tmp_path: Path) -> None:
    # An empty Xet store in a folder: refused at once, and not after minutes of trying again.
    hub.xet_url = f"local://{tmp_path}/store"
    words = ["-c", RESOLVE, write_recipe(tmp_path), "[[]]"]
    child = python(hub, tmp_path / "home", *words, HF_HUB_DISABLE_XET="0")
    assert child.returncode == 0, child.stderr
    error = json.loads(child.stdout)[0]["error"]
    assert error["type"] == "OfflineError"
    assert error["message"].startswith("models.base: the Hub cannot be reached for org/base at ")
    # Without Xet the same file would have come from the Hub itself.
    assert "unet/config.json" in hub.names("org/base")
    assert "unet/diffusion_pytorch_model.safetensors" not in hub.names("org/base")


def test_a_cache_that_cannot_be_written_is_no_network_fault(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file where the cache's folder should be")
    error = resolve(hub, write_recipe(tmp_path))["error"]
    assert error["type"] == "SourceError"
    assert "cannot be reached" not in error["message"]
    assert "models.base: cannot keep org/base at" in error["message"]
    assert "HF_HOME" in error["hint"]


def test_a_digest_of_the_recipe_is_compared_with_the_hubs(hub: HubServer, tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    cases = [[f"models.base.sha256[{key}]={'1' * 64}"] for key in (name, "config.json")]
    other, unused = resolve_each(hub, write_recipe(tmp_path), *cases)
    # Known from the listing: nothing has to be downloaded to see it.
    assert f"{name} has SHA-256 " in other["error"]["message"]
    assert f"and {'1' * 64} is expected" in other["error"]["message"]
    assert not [asked for asked in hub.downloads if asked.name == name]
    message = "models.base: sha256 names files that are not used: config.json"
    assert unused["error"]["message"] == message


# Whole runs ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_hub(tiny_sd15: Path, tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    for role in ("target", "base", "distilled"):
        shutil.copytree(tiny_sd15 / role, root / "tiny" / role)
    with HubServer(root) as server:
        yield server


def tiny_recipe(folder: Path) -> Path:
    return write_recipe(folder, base="tiny/base", distilled="tiny/distilled", target="tiny/target")


def test_a_run_records_commits_and_digests_and_no_token(
    tiny_hub: HubServer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["-m", "merge", "run", tiny_recipe(tmp_path), "--out", out, "--no-verify", "-v"]
    child = python(tiny_hub, tmp_path / "home", *words, HF_TOKEN=TOKEN)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == str(out)
    # The token was there to be leaked: the client sent it.
    assert tiny_hub.authorizations == {f"Bearer {TOKEN}"}
    assert TOKEN not in child.stdout + child.stderr
    for path in out.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    manifest = json.loads((out / "merge_manifest.json").read_text())
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert manifest["inputs"] == lock["models"]
    models = lock["recipe"]["models"]
    assert lock["models"].keys() == {"target", "base", "distilled"}
    for role, ref in (
        ("target", models["target"]),
        ("base", models["base"]),
        ("distilled", models["distilled"][0]),
    ):
        repo = f"tiny/{role}"
        commit = tiny_hub.commit(repo)
        assert len(commit) == 40
        assert (ref["repo"], ref["revision"]) == (repo, commit)
        record = lock["models"][role]
        assert (record["repo"], record["commit"]) == (repo, commit)
        assert any(name.endswith("diffusion_pytorch_model.safetensors") for name in record["files"])
        for name, file in record["files"].items():
            data = (tiny_hub.root / repo / name).read_bytes()
            assert file == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for text in (json.dumps(manifest), json.dumps(lock)):
        assert str(tmp_path) not in text
        assert tiny_hub.url not in text


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("distilled", "diffusion_pytorch_model.safetensors"),
        ("target", "vae/diffusion_pytorch_model.safetensors"),
    ],
    ids=["merged", "copied"],
)
def test_bytes_that_differ_from_the_stated_digest_end_the_run(
    tiny_hub: HubServer, tmp_path: Path, role: str, name: str
) -> None:
    repo = f"tiny/{role}"
    tiny_hub.wrong_sha256[repo, name] = "0" * 64
    actual = hashlib.sha256((tiny_hub.root / repo / name).read_bytes()).hexdigest()
    out = tmp_path / "out"
    words = ["-m", "merge", "run", tiny_recipe(tmp_path), "--out", out, "--no-verify", "-q"]
    child = python(tiny_hub, tmp_path / "home", *words)
    assert child.returncode == 4
    assert child.stderr.splitlines() == [
        f"error: models.{role}: {name} has SHA-256 {actual}, and {'0' * 64} is expected",
        "hint: it was taken out of the cache: run again, without a mirror if it comes back",
    ]
    assert not list(tmp_path.glob("out*"))
    # Neither the file nor the bytes under the name of their digest are left.
    assert not list((tmp_path / "home").rglob(actual))
