"""Run the same commands with two versions of the code and compare every byte that comes out.

    python scripts/compare_versions.py BEFORE [AFTER]

Both are commits, or folders; AFTER is the working tree when it is left out. Compared are exit
codes, stdout, stderr, and every file of every output but those that tell of a single run. A
refactoring must leave all of them as they are. Inputs are made once: tiny pipelines of both
families, LoRAs of every form, single files, shards, pickles, and what must be refused.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Files that tell of a single run: times, devices, what was drawn.
SINGLE_RUN = {"run.json", "report.json", "report.html"}
_TIMES = re.compile(r"\d+\.\d+ s\b")
# Lines of a library's bars, and sizes of files that hold times.
_UNSTEADY = re.compile(
    r"^.*(?:it/s\]|\d  run\.json|\d  report\.\w+|\d  in all, .*)\n?", re.MULTILINE
)
_TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
_CONV = "down_blocks.0.resnets.0.conv1"
_TEXT = "text_model.encoder.layers.0.mlp.fc1"

Tensors = dict[str, Any]


# ------------------------------------------------------------------------------------------ inputs


def make_inputs(folder: Path) -> None:
    """Write every model that the commands read."""
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors.torch import load_file, save_file

    from scripts import make_tiny

    make_tiny.main([str(folder), "--arch", "all"])
    sd15, sdxl = folder / "sd15", folder / "sdxl"
    weights = "diffusion_pytorch_model.safetensors"
    base = load_file(sd15 / "base" / weights)
    random = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Any:
        return (torch.randn(shape, generator=random) * 0.2).half()

    shape, conv = base[f"{_TO_K}.weight"].shape, base[f"{_CONV}.weight"].shape
    (encoder,) = (sd15 / "target" / "text_encoder").glob("*.safetensors")
    text = next(v.shape for k, v in load_file(encoder).items() if k.endswith("0.mlp.fc1.weight"))
    for name, tensors in _adapters(drawn, shape, conv, text).items():
        save_file(tensors, folder / f"{name}.safetensors")
    peft = folder / "peft"
    peft.mkdir()
    pair = {f"base_model.model.{_TO_K}.lora_A.weight": drawn(4, shape[1])}
    pair[f"base_model.model.{_TO_K}.lora_B.weight"] = drawn(shape[0], 4)
    save_file(pair, peft / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    second = {key: value + drawn(*value.shape) * 0.05 for key, value in base.items()}
    _unet(folder / "second", second, sd15)
    _unet(folder / "lacking", dict(list(base.items())[1:]), sd15)
    _shards(folder / "shards", base, sd15)
    infinite = dict(second)
    infinite[f"{_TO_K}.weight"] = torch.full(shape, float("inf")).half()
    _unet(folder / "infinite", infinite, sd15)
    large = {key: value.float() * 4e4 for key, value in second.items()}
    _unet(folder / "large", large, sd15)
    shutil.copytree(sd15 / "target" / "unet", folder / "target_unet")
    pickled = folder / "pickled"
    pickled.mkdir()
    shutil.copy(sd15 / "base" / "config.json", pickled)
    torch.save(second, pickled / "diffusion_pytorch_model.bin")
    scaled = {key: value.float() for key, value in base.items()}
    for key in (f"{_TO_K}.weight", f"{_CONV}.weight"):
        scaled[key] = scaled[key].to(torch.float8_e4m3fn)
        scaled[key.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
    _unet(folder / "scaled", scaled, sd15)
    whole = folder / "encoders"
    shutil.copytree(sdxl / "target", whole)
    for name in ("text_encoder", "text_encoder_2"):
        (path,) = (whole / name).glob("*.safetensors")
        moved = {k: v + 0.01 if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(moved, path, {"format": "pt"})
    shutil.rmtree(whole / "unet")
    shutil.copytree(sdxl / "distilled", whole / "unet")
    plain = folder / "plain"
    shutil.copytree(sdxl / "target", plain)
    shutil.rmtree(plain / "unet")
    shutil.copytree(sdxl / "base", plain / "unet")


def _adapters(
    drawn: Any, linear: Sequence[int], conv: Sequence[int], text: Sequence[int]
) -> dict[str, Tensors]:
    """Return a LoRA of every form, by the shapes of three layers."""
    import torch

    (out, into), (rows, inner, *kernel) = linear, conv

    def kohya(path: str, prefix: str = "lora_unet_", **factors: Any) -> Tensors:
        words = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
        stem = prefix + path.replace(".", "_")
        return {f"{stem}.{words.get(role, role)}": value for role, value in factors.items()}

    def halves(columns: int) -> Tensors:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return {n: drawn(out, 2) if n.endswith("a") else drawn(2, columns) for n in names}

    alpha = torch.tensor(1.5)
    cores = {"hada_t1": drawn(2, 2, *kernel), "hada_t2": drawn(2, 2, *kernel)}
    sides = {f"hada_w{n}_{s}": drawn(2, rows if s == "a" else inner) for n in "12" for s in "ab"}
    up = {"up": drawn(out, 3), "alpha": alpha}
    dora = kohya(_TO_K, down=drawn(3, into), **up)
    encoder = {"down": drawn(2, text[1]), "up": drawn(text[0], 2), "alpha": alpha}
    return {
        "loha": kohya(_TO_K, **halves(into), alpha=alpha),
        "loha_cores": kohya(_CONV, **sides, **cores),
        "lokr": kohya(_TO_K, lokr_w1=drawn(2, 2), lokr_w2=drawn(out // 2, into // 2)),
        "locon": kohya(
            _CONV,
            down=drawn(2, inner, 1, 1),
            mid=drawn(2, 2, *kernel),
            up=drawn(rows, 2, 1, 1),
            alpha=alpha,
        ),
        "diff": kohya(_TO_K, diff=drawn(out, into)) | kohya(_CONV, diff_b=drawn(rows)),
        "dora": dora | kohya(_TO_K, dora_scale=drawn(out, 1).abs() + 0.5),
        "processor": {
            f"unet.{_TO_K[:-5]}.processor.to_k_lora.down.weight": drawn(3, into),
            f"unet.{_TO_K[:-5]}.processor.to_k_lora.up.weight": drawn(out, 3),
        },
        "conv_in": kohya("conv_in", down=drawn(2, 4, 3, 3), up=drawn(8, 2, 1, 1), alpha=alpha),
        "encoder": kohya(_TEXT, "lora_te_", **encoder),
        "stranger": kohya("up_blocks.9.x", down=drawn(2, 4), up=drawn(4, 2)),
        "twice": dora | {f"unet.{_TO_K}.lora_A.weight": drawn(3, into)},
    }


def _unet(folder: Path, tensors: Tensors, sd15: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copy(sd15 / "base" / "config.json", folder)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _shards(folder: Path, tensors: Tensors, sd15: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copy(sd15 / "base" / "config.json", folder)
    names = sorted(tensors)
    table = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        table |= dict.fromkeys(part, file)
    tree = {"metadata": {}, "weight_map": table}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(tree))


# ------------------------------------------------------------------------------------------- cases


def recipe(family: str = "sd15", **changes: Any) -> dict[str, Any]:
    """Return a recipe over a family's tiny models."""
    models = {
        "base": f"./{family}/base",
        "distilled": f"./{family}/distilled",
        "target": f"./{family}/target",
    }
    return {"name": "case", "models": {**models, **changes.pop("models", {})}, **changes}


def lora(file: str, family: str = "sd15", **changes: Any) -> dict[str, Any]:
    """Return a recipe with a LoRA in place of base and distilled."""
    models = {"base": None, "distilled": file, **changes.pop("models", {})}
    return recipe(family, models=models, **changes)


def recipes() -> dict[str, dict[str, Any]]:
    """Return every recipe by the name of its case."""
    two = {"distilled": [{"path": "./sd15/distilled"}, {"path": "./second", "weight": 0.5}]}
    mixed = {"distilled": [{"path": "./sd15/distilled"}, {"path": "./loha.safetensors"}]}
    params = {
        "ties": {"density": 0.3},
        "dare": {"density": 0.6, "seed": 11},
        "dare_ties": {"density": 0.6, "seed": 11, "normalize": True},
        "slerp": {"t": 0.3},
        "train_difference": {},
        "capped_difference": {"cap": 0.02},
    }
    encoders = {"base": "./plain", "distilled": "./encoders"}
    forms = ("loha", "loha_cores", "lokr", "locon", "diff", "processor", "conv_in", "encoder")
    return {
        "sd15": recipe(),
        "sdxl": recipe("sdxl", weight=0.5),
        "two": recipe(models=two),
        "mixed": recipe(models=mixed, weight=0.7),
        "bfloat16": recipe(out_dtype="bfloat16"),
        "keep": recipe(out_dtype="keep", name="keep.case"),
        "first": recipe(channel_rule="first"),
        "refuse-channels": recipe(channel_rule="error"),
        "bake": recipe("sdxl", guidance_embedding="bake", bake_guidance=3.0),
        "embedding-error": recipe("sdxl", guidance_embedding="error"),
        "bake-nothing": recipe(
            models={"distilled": "./second"}, guidance_embedding="bake", bake_guidance=3.0
        ),
        "blocks": recipe(block_weights={"IN01": 0.5, "M00": 0.0, "down_blocks.0.*": 0.25}),
        "blocks-unknown": recipe(block_weights={"IN99": 0.5, "nothing.*": 1.0}),
        "exclude": recipe(exclude=["conv_out.*", "mid_block.*"]),
        "exclude-nothing": recipe(exclude=["nowhere.*"]),
        "noop": recipe(weight=0.0, allow_noop=True),
        "noop-refused": recipe(weight=0.0),
        "same": recipe(models={"distilled": "./sd15/base"}),
        "negative": recipe(weight=-0.5),
        "overflow": recipe(models={"distilled": "./large"}),
        "clamp": recipe(models={"distilled": "./large"}, on_overflow="clamp"),
        "keep-target": recipe(models={"distilled": "./large"}, on_overflow="keep_target"),
        "infinite": recipe(models={"distilled": "./infinite"}),
        "encoders": recipe("sdxl", components=["unet", "text_encoder_2"], models=encoders),
        "encoder-alone": recipe("sdxl", components=["text_encoder"], models=encoders),
        "no-encoder": recipe("sdxl", components=["unet", "text_encoder"]),
        "single": recipe(output={"single_file": True}),
        "single-sdxl": recipe("sdxl", output={"single_file": True}),
        "unet-alone": recipe(models={"target": "./target_unet"}),
        "unet-single": recipe(models={"target": "./target_unet"}, output={"single_file": True}),
        "from-files": recipe(
            models={
                "target": {"path": "./file.safetensors", "config": "./sd15/target"},
                "base": "./shards",
            }
        ),
        "file-without-config": recipe(models={"target": "./file.safetensors"}),
        "sdxl-file": recipe(
            "sdxl", models={"target": {"path": "./xl.safetensors", "config": "./sdxl/target"}}
        ),
        "shards": recipe(models={"base": "./shards"}),
        "pickle": recipe(models={"distilled": "./pickled"}, allow_pickle=True),
        "pickle-refused": recipe(models={"distilled": "./pickled"}),
        "scaled": recipe(models={"base": "./scaled"}),
        "lacking": recipe(models={"base": "./lacking"}),
        "swapped": recipe(models={"base": "./sd15/target", "target": "./sd15/base"}),
        "family": recipe(models={"distilled": "./sdxl/distilled"}),
        "lora-as-target": recipe(models={"target": "./loha.safetensors"}),
        "no-base": recipe(models={"base": None}),
        "absent": recipe(models={"target": "./nowhere"}),
        "variant": recipe(
            models={"target": {"path": "./sd15/target", "variant": "fp16"}},
            scheduler={"class_name": "TCDScheduler", "config": {"beta_start": 0.001}},
        ),
        "v-prediction": recipe(scheduler={"config": {"prediction_type": "v_prediction"}}),
        "kohya": lora("./sd15/lora_kohya.safetensors", weight=0.8),
        "kohya-sdxl": lora("./sdxl/lora_kohya.safetensors", "sdxl"),
        "peft": lora("./sd15/lora_peft.safetensors"),
        "peft-config": lora("./peft"),
        "dora": lora("./dora.safetensors", models={"base": "./sd15/base"}),
        "dora-refused": lora("./dora.safetensors"),
        "encoder-lora": lora("./encoder.safetensors", components=["unet", "text_encoder"]),
        "lora-with-base": lora("./loha.safetensors", models={"base": "./sd15/base"}),
        "lora-sdxl-on-sd15": lora("./sdxl/lora_kohya.safetensors"),
        "stranger": lora("./stranger.safetensors"),
        "twice": lora("./twice.safetensors"),
        "unknown-key": recipe(wieght=1.0),
        "unknown-method": recipe(method="tiess"),
        "unknown-component": recipe(components=["unett"]),
        "no-component": recipe(components=[]),
        "bad-values": recipe(weight=float("nan"), out_dtype="fp16", exclude=[""]),
        **{form: lora(f"./{form}.safetensors", channel_rule="first") for form in forms},
        **{
            f"method-{name}": recipe(method=name, params=values, models=two, weight=0.8)
            for name, values in params.items()
        },
        **{f"lora-{name}": lora("./loha.safetensors", method=name) for name in ("ties", "slerp")},
        "lora-train_difference": lora("./loha.safetensors", method="train_difference"),
        "unknown-param": recipe(method="ties", params={"densty": 1}),
    }


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each case and its words; `out` is where outputs go."""
    yield "to-file", ["convert", "sd15/target", "file.safetensors"]
    yield "to-file-xl", ["convert", "sdxl/target", "xl.safetensors"]
    yield "to-folder", ["convert", "file.safetensors", "out/to-folder", "--config", "sd15/target"]
    yield "to-folder-xl", ["convert", "xl.safetensors", "out/xl", "--config", "sdxl/target"]
    yield "to-folder-wrong", ["convert", "xl.safetensors", "out/no", "--config", "sd15/target"]
    yield "convert-unet", ["convert", "target_unet", "no.safetensors"]
    for name in recipes():
        yield f"plan {name}", ["plan", f"{name}.yaml", "--json"]
        yield f"run {name}", ["run", f"{name}.yaml", "--out", f"out/{name}", "--no-verify"]
    for name in ("sd15", "sdxl", "blocks", "encoders", "kohya", "unet-alone"):
        yield f"plan {name} as text", ["plan", f"{name}.yaml"]
        yield f"files {name}", ["verify", f"out/{name}", "--files"]
        yield f"reproduce {name}", ["reproduce", f"out/{name}"]
    for name in ("sd15/target", "target_unet", "file.safetensors", "loha.safetensors", "shards"):
        yield f"show {name}", ["show", name, "--json"]
    for name in ("sd15", "sdxl", "unet-alone", "single"):
        yield f"show out {name}", ["show", f"out/{name}"]
        yield f"publish {name}", ["publish", f"out/{name}", "--repo-id", "a/b", "--dry-run"]
    for name in ("sd15", "sdxl", "encoders", "method-ties"):
        file = f"out/{name}.safetensors"
        yield f"extract {name}", ["extract-lora", f"{name}.yaml", file, "--rank", "2"]
        yield (
            f"extract {name} peft",
            [
                *("extract-lora", f"{name}.yaml", f"out/{name}-peft.safetensors"),
                *("--energy", "0.5", "--form", "peft", "--json"),
            ],
        )
    yield "resume", ["run", "sd15.yaml", "--out", "out/sd15", "--no-verify"]
    yield "overwrite", ["run", "sd15.yaml", "weight=2", "--out", "out/sd15", "--overwrite"]
    yield "lock", ["run", "out/sdxl/recipe.lock.yaml", "--out", "out/again", "--no-verify"]
    places = [f"models.{role}.path=sdxl/{role}" for role in ("base", "distilled", "target")]
    yield (
        "lock found",
        ["run", "out/sdxl/recipe.lock.yaml", *places, "--out", "out/l", "--no-verify"],
    )
    yield "write-lock", ["run", "sd15.yaml", "--write-lock", "--out", "out/w", "--no-verify"]
    yield "locked", ["run", "sd15.yaml", "--locked", "--out", "out/locked", "--no-verify"]
    for name in ("demo", "demo-lora"):
        yield f"plan {name}", ["plan", name, "--json"]
        yield f"run {name}", ["run", name, "--out", f"out/{name}"]
        yield f"publish {name}", ["publish", f"out/{name}", "--repo-id", "a/b", "--dry-run"]
        yield f"verify {name}", ["verify", f"out/{name}", "--json"]
        yield f"show {name}", ["show", f"out/{name}"]
    yield (
        "edit",
        [
            *("edit", "out/demo", "recipes/demo/pictures/add-balloons.png", "make it winter"),
            *("-o", "out/edit.png", "--seed", "3"),
        ],
    )
    yield "validate", ["validate", "demo", "sdxl-turbo", "unknown-key.yaml"]
    for words in (["recipes"], ["recipes", "demo"], ["--help"], ["run", "nothing"], ["rnu"]):
        yield " ".join(words), words
    for name in (
        "run",
        "plan",
        "edit",
        "verify",
        "reproduce",
        "convert",
        "extract-lora",
        "publish",
    ):
        yield f"{name} --help", [name, "--help"]
    for name in ("show", "env", "validate", "recipes"):
        yield f"{name} --help", [name, "--help"]
    pictures = "recipes/demo/pictures"
    yield (
        "edit many",
        [
            *("edit", "out/demo", "--images", pictures, "make it night", "-o", "out/many"),
            *("--seed", "1", "--seed", "2", "--timesteps", "999,499"),
        ],
    )
    yield "edit no picture", ["edit", "out/demo", "recipes/demo/edits.yaml", "make it night"]
    yield "edit badly", ["edit", "out/demo", "--images", pictures, "x", "--timesteps", "1,2"]
    words = ["convert", "file.safetensors", "out/average", "--config", "sd15/target"]
    yield "no average", [*words, "--ema", "true"]
    yield "exclude", [*words, "--exclude", "nothing.*"]
    compared = ("--compare", "recipes/demo/target", "--compare-steps", "3", "--no-cache")
    yield "verify compared", ["verify", "out/demo", *compared]
    yield "verify edits", ["verify", "out/demo", "--edits", "recipes/demo/edits.yaml", "--json"]


# ----------------------------------------------------------------------------------------- running


def record(result: Path) -> None:
    """Run every command in this process with the `merge` that it imports; write what came out."""
    from merge.cli.main import main

    found: dict[str, Any] = {}
    for name, words in commands():
        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        # Handlers keep the stream that they were made with.
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            import logging

            logging.getLogger("merge").handlers.clear()
            try:
                main(words)
            except SystemExit as stop:
                code = stop.code
        found[name] = {
            "code": code,
            "stdout": _steady(out.getvalue()),
            "stderr": _steady(err.getvalue()),
        }
        print(name, code, file=sys.stderr)
    files = {}
    for path in sorted(p for p in Path().rglob("*") if p.is_file() and not p.is_symlink()):
        if path.name not in SINGLE_RUN and path.parts[0] not in ("sd15", "sdxl", "recipes"):
            files[path.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    result.write_text(json.dumps({"commands": found, "files": files}, indent=1))


def _steady(text: str) -> str:
    """Take out what differs from one run to the next."""
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            tree = json.loads(text)
            for edit in tree.get("edits", ()):
                edit.pop("time_s", None)
            tree.pop("seconds", None)
            text = json.dumps(_without_times(tree), indent=1)
    return _TIMES.sub("TIME", _UNSTEADY.sub("", text))


def _without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_times(v) for k, v in tree.items() if k not in ("time_s", "seconds")}
    return [_without_times(item) for item in tree] if isinstance(tree, list) else tree


def take(source: str, folder: Path) -> None:
    """Put the code and the recipes of a version into a folder, with the same version number."""
    folder.mkdir(parents=True)
    if Path(source).is_dir():
        for name in ("merge", "recipes"):
            shutil.copytree(Path(source) / name, folder / name)
    else:
        tree = subprocess.run(
            ["git", "-C", str(ROOT), "archive", source, "merge", "recipes"],
            check=True,
            capture_output=True,
        )
        subprocess.run(["tar", "-x", "-C", str(folder)], input=tree.stdout, check=True)
    # A version's number is in what it writes, and is no difference.
    (folder / "merge" / "_version.py").write_text('__version__ = "0"\n')
    for library in (ROOT / "merge" / "engine").glob("*.so"):
        shutil.copy(library, folder / "merge" / "engine")


def run(version: Path, inputs: Path, work: Path) -> dict[str, Any]:
    """Run every command with a version; return what came out."""
    if work.exists():
        shutil.rmtree(work)
    shutil.copytree(inputs, work)
    (work / "out").mkdir()
    (work / "recipes").symlink_to(version / "recipes")
    for name, tree in recipes().items():
        # JSON is YAML but for what is no number there.
        text = json.dumps(tree, indent=1).replace("NaN", ".nan")
        (work / f"{name}.yaml").write_text(text)
    result = version / "result.json"
    code = f"import sys; sys.path.insert(0, {str(version)!r}); import merge"
    words = [sys.executable, "-c", f"{code}; {_BOOT}", str(Path(__file__)), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(version / "cache")}
    subprocess.run(words, cwd=work, check=True, env=environment)
    text = result.read_text().replace(str(version), "VERSION").replace(str(work), "WORK")
    found: dict[str, Any] = json.loads(text)
    return found


_BOOT = (
    "import importlib.util as u; from pathlib import Path; "
    "s = u.spec_from_file_location('compare_versions', sys.argv[1]); "
    "m = u.module_from_spec(s); s.loader.exec_module(m); m.record(Path(sys.argv[2]))"
)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line or more for each thing that is not the same."""
    lines = []
    for name, was in before["commands"].items():
        now = after["commands"].get(name)
        for part in was:
            if now is None or was[part] == now[part]:
                continue
            lines.append(f"{name}: {part}")
            lines += difflib.unified_diff(
                str(was[part]).splitlines(), str(now[part]).splitlines(), lineterm="", n=0
            )
    ours, theirs = before["files"], after["files"]
    lines += [f"{name}: other bytes" for name in ours if theirs.get(name) not in (None, ours[name])]
    lines += [f"{name}: only before" for name in sorted(ours.keys() - theirs.keys())]
    return lines + [f"{name}: only after" for name in sorted(theirs.keys() - ours.keys())]


def main() -> None:
    """Compare two versions; the exit status is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", help="commit or folder")
    parser.add_argument("after", nargs="?", default=str(ROOT), help="commit or folder")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for inputs and results; kept results of BEFORE are used again",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).absolute()
        inputs, kept = folder / "inputs", folder / "before.json"
        if not inputs.is_dir():
            make_inputs(inputs)
        if kept.is_file():
            before = json.loads(kept.read_text())
        else:
            take(options.before, folder / "before")
            before = run(folder / "before", inputs, folder / "work")
            kept.write_text(json.dumps(before, indent=1))
        if (folder / "after").exists():
            shutil.rmtree(folder / "after")
        take(options.after, folder / "after")
        after = run(folder / "after", inputs, folder / "work")
    lines = differences(before, after)
    print("\n".join(lines))
    print(
        f"{len(before['commands'])} commands, {len(before['files'])} files: "
        f"{'all the same' if not lines else f'{len(lines)} lines of differences'}"
    )
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
