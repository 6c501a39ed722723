"""The command line as a user meets it: output, exit codes, messages, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import merge
from merge.cli.main import main as cli_main
from tests.mini import random_tensors, write_models, write_recipe, write_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run_cli(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "merge", *map(str, words)], capture_output=True, text=True, **options
    )


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        cli_main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# Help and light commands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["edit", "--help"],
        ["validate", "sd15-lcm-lora"],
        ["recipes"],
        ["env", "--json"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_light_commands_import_neither_torch_nor_diffusers(words: list[str]) -> None:
    code = (
        "import sys\nfrom merge.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    print(heavy or 'light', stop.code, file=sys.stderr)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stderr.strip() == "light 0"
    assert child.stdout.strip()


@pytest.mark.parametrize(
    "command", ["run", "plan", "validate", "recipes", "edit", "verify", "show", "env"]
)
def test_every_command_has_help_with_examples(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"instruct-merge {command}" in out
    assert "Examples:" in out
    assert "--debug" in out


def test_a_mistyped_command_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "rnu")
    assert code == 2
    assert err == (
        "error: No such command 'rnu'. Did you mean 'run'?\nhint: see `instruct-merge --help`\n"
    )
    assert call(capsys, "run")[0] == 2
    assert call(capsys, "run", "demo", "--threads", "0")[0] == 2


def test_recipes_are_listed_printed_and_copied(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert set(names) == {
        "demo",
        "demo-lora",
        "magicbrush-lcm-lora",
        "sd15-hyper-lora",
        "sd15-lcm-lora",
        "sd15-tcd-lora",
        "sdxl-dmd2",
        "sdxl-lcm",
        "sdxl-lcm-lora",
        "sdxl-lightning",
        "sdxl-turbo",
    }
    assert [item["name"] for item in json.loads(call(capsys, "recipes", "--json")[1])] == names
    _, text, _ = call(capsys, "recipes", "sdxl-turbo")
    assert yaml.safe_load(text)["weight"] == 0.5
    code, out, _ = call(capsys, "recipes", "sdxl-turbo", "--copy", tmp_path)
    assert Path(out.strip()).read_text() == text
    assert call(capsys, "recipes", "sdxl-turbo", "--copy", tmp_path)[0] == 8
    code, _, err = call(capsys, "recipes", "sdxl-trubo")
    assert code == 3
    assert err.endswith("hint: did you mean 'sdxl-turbo'?\n")


def test_validate_reports_each_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("name: good\nmodels: {base: a/b, distilled: a/c, target: a/d}\n")
    bad.write_text("name: Bad\nmodels: {base: a/b, distilled: a/c, target: a/d}\nweigth: 1\n")
    code, out, err = call(capsys, "validate", good, bad)
    assert code == 3
    assert f"{good}: ok (good)" in out
    assert "weigth: unknown key, did you mean 'weight'?" in err
    assert "name: 'Bad' must be lower-case" in err


# A run -----------------------------------------------------------------------------------------


def test_run_ends_with_the_folder_on_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    out = tmp_path / "deep" / "er" / "out"
    code, stdout, stderr = call(capsys, "run", recipe, "--out", out, "weight=0.5")
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == str(out)
    assert "merged 7 of 8 tensors" in stderr
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert lock["recipe"]["weight"] == 0.5
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "merge_manifest.json", "provenance.intoto.json", "recipe.lock.yaml"),
        *("run.json", "unet"),
    ]
    code, stdout, _ = call(capsys, "verify", out, "--files", "-q")
    assert (code, stdout) == (0, f"{out}\n")


def test_the_output_folder_defaults_to_the_recipe_and_the_current_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, stdout, _ = call(capsys, "run", recipe, "-q")
    assert (code, stdout) == (0, "outputs/mini\n")
    assert (tmp_path / "here" / "outputs" / "mini" / "unet" / WEIGHTS).is_file()


def test_quiet_prints_only_the_folder(tmp_path: Path) -> None:
    write_models(tmp_path)
    child = run_cli("run", write_recipe(tmp_path), "--out", tmp_path / "out", "-q")
    assert child.stdout == f"{tmp_path / 'out'}\n"
    assert child.stderr == ""


def test_plan_prints_a_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_models(tmp_path)
    code, out, _ = call(capsys, "plan", write_recipe(tmp_path))
    assert code == 0
    assert "8: 7 delta, 1 copy" in out


# Failures: each with its exit code, what is wrong, a hint, and nothing left behind ----------------


def corrupt(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_header(data: bytes, change: Callable[[dict[str, dict[str, object]]], None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    change(tree)
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def overlap(tree: dict[str, dict[str, object]]) -> None:
    begin, end = tree["conv_out.weight"]["data_offsets"]  # type: ignore[misc]
    tree["conv_out.weight"]["data_offsets"] = [begin - 2, end - 2]


def remove_key(folder: Path) -> None:
    tensors = random_tensors(1)
    del tensors["conv_out.weight"]
    write_unet(folder / "base", tensors)


def transpose(folder: Path) -> None:
    tensors = random_tensors(1)
    key = "time_embedding.linear_1.weight"
    tensors[key] = tensors[key].T.contiguous()
    write_unet(folder / "base", tensors)


def put_nan(folder: Path) -> None:
    tensors = random_tensors(1)
    tensors["conv_out.weight"][0, 0, 0, 0] = float("nan")
    write_unet(folder / "base", tensors)


def put_large(folder: Path) -> None:
    tensors = random_tensors(3, channels=8, dtype=torch.float32)
    tensors["conv_out.weight"].view(-1)[:3] = 1e6
    write_unet(folder / "target", tensors)


def foreign_lora(folder: Path) -> None:
    stem = "lora_unet_other_model_conv"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 8).half(),
        f"{stem}.lora_up.weight": torch.randn(4, 2).half(),
    }
    save_file(tensors, folder / "lora.safetensors")
    write_recipe(folder, models={"distilled": "./lora.safetensors", "target": "./target"})


def edit_weights(role: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: corrupt(folder / role / WEIGHTS, change)


def recipe(**changes: object) -> Callable[[Path], None]:
    return lambda folder: write_recipe(folder, **changes) and None


FAILURES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "unknown key": (recipe(wieght=1), 3, "wieght: unknown key, did you mean 'weight'?"),
    "weight nan": (recipe(weight=float("nan")), 3, "weight: nan is not a finite number"),
    "weight inf": (recipe(weight=float("inf")), 3, "weight: inf is not a finite number"),
    "unknown method": (recipe(method="sum"), 3, "method: 'sum' is not one of add_difference"),
    "missing folder": (
        recipe(models={"base": "./nothing", "distilled": "./distilled", "target": "./target"}),
        4,
        "models.base: there is no file or folder",
    ),
    "truncated": (edit_weights("base", lambda data: data[:-7]), 5, "the file is truncated"),
    "header longer than the file": (
        edit_weights("base", lambda data: (10**7).to_bytes(8, "little") + data[8:]),
        5,
        "the header claims 10,000,000 bytes and the file has",
    ),
    "overlapping offsets": (
        edit_weights("distilled", lambda data: with_header(data, overlap)),
        5,
        "its data overlaps the tensor before it",
    ),
    "git lfs pointer": (
        edit_weights("base", lambda _: b"version https://git-lfs.github.com/spec/v1\noid x\n"),
        5,
        "it is a Git LFS pointer",
    ),
    "missing key": (remove_key, 6, "conv_out.weight: missing in base"),
    "transposed": (transpose, 6, "shape [16, 8] in target, [8, 16] in base"),
    "nothing matches": (foreign_lora, 6, "none of its keys fits the target"),
    "nan input": (put_nan, 7, "conv_out.weight: 1 of 288 values are NaN or infinite in base"),
    "overflow": (put_large, 7, "conv_out.weight: 3 of 288 values are too large for float16"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_bad_input_is_named_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    prepare, expected_code, message = FAILURES[case]
    write_models(tmp_path)
    write_recipe(tmp_path)
    prepare(tmp_path)
    before = entries(tmp_path)
    code, out, err = call(capsys, "run", tmp_path / "mini.yaml", "--out", tmp_path / "new" / "out")
    assert (code, out) == (expected_code, "")
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("hint: "), err
    assert entries(tmp_path) == before


def test_an_existing_output_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_models(tmp_path)
    path = write_recipe(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    code, _, err = call(capsys, "run", path, "--out", out)
    assert code == 8
    assert "exists already" in err
    assert "--overwrite" in err
    code, _, err = call(capsys, "run", path, "--out", out, "--overwrite")
    assert code == 8
    assert "is not an output of this tool" in err
    assert (out / "precious.txt").read_text() == "mine"


def test_overwrite_replaces_an_earlier_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_models(tmp_path)
    path = write_recipe(tmp_path)
    out = tmp_path / "out"
    assert call(capsys, "run", path, "--out", out)[0] == 0
    first = (out / "merge_manifest.json").read_bytes()
    assert call(capsys, "run", path, "--out", out, "--overwrite", "weight=0.5")[0] == 0
    assert (out / "merge_manifest.json").read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("base", "distilled", "mini.yaml", "out", "target"),
    ]


@pytest.mark.parametrize("how", ["same", "symlink", "parent", "dots"])
def test_an_output_equal_to_an_input_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, how: str
) -> None:
    models = tmp_path / "models"
    write_models(models)
    path = write_recipe(models)
    # Make the input look like an output of ours, so that only the one rule can save it.
    (models / "target" / "merge_manifest.json").write_text("{}")
    (models / "merge_manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(models / "target")
    out = {
        "same": models / "target",
        "symlink": tmp_path / "link",
        "parent": models,
        "dots": models / "base" / ".." / "target",
    }[how]
    before = {p: p.read_bytes() for p in entries(models) if p.is_file()}
    code, _, err = call(capsys, "run", path, "--out", out, "--overwrite")
    assert code == 8
    assert "hint: " in err
    assert {p: p.read_bytes() for p in entries(models) if p.is_file()} == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    path = write_recipe(tmp_path)
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, 1024, 3, 3, 3, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    before = entries(tmp_path)
    code, _, err = call(capsys, "run", path, "--out", tmp_path / "out")
    assert code == 8
    assert "3,072 free" in err
    assert "the output needs" in err
    assert entries(tmp_path) == before


def test_a_file_size_limit_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    write_models(tmp_path)
    path = write_recipe(tmp_path)
    before = entries(tmp_path)

    def limit() -> None:
        # Without the signal the write fails as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    child = run_cli("run", path, "--out", tmp_path / "out", preexec_fn=limit)
    assert child.returncode == 8, child.stderr
    assert "File too large" in child.stderr
    assert entries(tmp_path) == before


def test_offline_without_the_files_says_what_to_download(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    out = tmp_path / "out"
    child = run_cli("run", "sd15-lcm-lora", "--out", out, env=environment)
    assert child.returncode == 4
    assert "latent-consistency/lcm-lora-sdv1-5 at main is not in the cache" in child.stderr
    assert "hf download latent-consistency/lcm-lora-sdv1-5 --revision main" in child.stderr
    assert not out.exists()


def test_devices_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_models(tmp_path)
    path = write_recipe(tmp_path)
    code, _, err = call(capsys, "run", path, "--out", tmp_path / "out", "--device", "tpu")
    assert code == 7
    assert "'tpu' is no device" in err
    if not torch.cuda.is_available():
        code, _, err = call(capsys, "run", path, "--out", tmp_path / "out", "--device", "cuda")
        assert code == 7
        assert "no CUDA device here" in err
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    child = run_cli("run", tmp_path / "nothing.yaml", "--debug")
    assert child.returncode != 0
    assert "Traceback" in child.stderr
    plain = run_cli("run", tmp_path / "nothing.yaml")
    assert plain.returncode == 3
    assert "Traceback" not in plain.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_in_the_middle_ends_promptly_and_the_run_can_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    for seed, role in enumerate(("target", "distilled", "base")):
        tensors = random_tensors(seed, channels=8 if role == "target" else 4)
        # Large enough that the run is still at it when the signal comes.
        tensors["mid_block.big.weight"] = torch.full((60_000_000,), 0.1 + seed).half()
        write_unet(tmp_path / role, tensors)
    path = write_recipe(tmp_path)
    top_level = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "merge", "run", str(path), "--threads", "1"]
    child = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = None
    while partial is None and child.poll() is None:
        partial = next(tmp_path.glob(f"out.partial-*/unet/{WEIGHTS}"), None)
        time.sleep(0.002)
    assert partial is not None, child.communicate()
    kept = partial.parent.parent
    child.send_signal(number)
    started = time.monotonic()
    out, err = child.communicate(timeout=30)
    assert child.returncode == code, err
    assert out == ""
    assert f"{kept} is kept" in err
    words = shlex.join([*command[3:], "--out", str(tmp_path / "out"), "--resume"])
    assert f"hint: `instruct-merge {words}` goes on with it" in err
    assert time.monotonic() - started < 10
    assert {path.name for path in tmp_path.iterdir()} == {*top_level, kept.name}
    again = run_cli(*shlex.split(words))
    assert again.returncode == 0, again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*top_level, "out"}
    assert not list((tmp_path / "out").rglob(".*"))


def test_every_stage_has_words_or_is_silent_on_purpose() -> None:
    """A stage that nobody named would have a bar with its bare name, and none would notice."""
    from merge.cli.output import _SILENT_STAGES, _STAGE_WORDS

    package = Path(merge.__file__).parent
    pattern = re.compile(r"(?:progress|bars|tell)\(\s*\"(\w+)\"")
    # What a pool's processes tell one another is no stage.
    files = [path for path in package.rglob("*.py") if path.parent.name != "pool"]
    told = {name for path in files for name in pattern.findall(path.read_text())}
    assert {"merge", "verify", "resolve", "convert"} <= told
    assert told == {*_STAGE_WORDS, *_SILENT_STAGES}


def test_an_unknown_stage_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from merge.cli.output import Bars

    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    bars = Bars(quiet=False)
    bars("ripen", 1, 2)
    bars.close()
    assert "ripen" in stderr.getvalue()
