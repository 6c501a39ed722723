"""Python files that lie about are never run: in the current folder, a model's or an output's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import merge
from merge.errors import VerificationError
from merge.recipe.bundled import bundled_folder
from merge.run import closing_edits as closing

# The console script's own text, and `python -m merge`.
SCRIPT = "import sys\nfrom merge.__main__ import main\nsys.exit(main())\n"
NAMES = (
    *("random", "json", "torch", "typing", "click", "numpy", "diffusers", "transformers"),
    *("sitecustomize", "usercustomize"),
)


def plant(folder: Path, canary: Path, names: tuple[str, ...] = ("merge", *NAMES)) -> None:
    """Put modules into a folder that tell when they are run."""
    code = f"open({str(canary)!r}, 'a').write(__name__ + '\\n')\n"
    for name in names:
        (folder / f"{name}.py").write_text(code)
    (folder / "x.pth").write_text(f"import os; {code}")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models and a folder to stand in, all full of planted code."""
    root = tmp_path_factory.mktemp("planted")
    shutil.copytree(bundled_folder() / "demo", root / "demo")
    tree = yaml.safe_load((bundled_folder() / "demo-lora.yaml").read_text())
    here = root / "here"
    here.mkdir()
    tree["models"]["distilled"] = "../demo/lcm_lora.safetensors"
    tree["models"]["target"] = "../demo/target"
    tree["verify"]["edits"] = []
    (here / "mine.yaml").write_text(yaml.safe_dump(tree))
    Image.new("RGB", (32, 32), (200, 40, 90)).save(here / "p.png")
    (root / "bin").mkdir()
    (root / "bin" / "instruct-merge").write_text(SCRIPT)
    for folder in (here, root / "demo" / "target", root / "demo" / "target" / "unet"):
        plant(folder, root / "canary")
    return root


def run(scene: Path, *words: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    root = str(Path(merge.__file__).parent.parent)
    # As installed: the package is on the path, and the current folder is not.
    start = [sys.executable, "-m", "merge"] if module else [sys.executable, "../bin/instruct-merge"]
    child = subprocess.run(
        [*start, *words],
        cwd=scene / "here",
        env={**environment, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert not (scene / "canary").exists(), (words, (scene / "canary").read_text())
    return child


def test_no_command_runs_what_lies_about(scene: Path) -> None:
    done = run(scene, "run", "mine.yaml", "--out", "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    out = scene / "here" / "out"
    assert json.loads((out / "report.json").read_text())["passed"] is True
    assert (out / "report.html").is_file()
    assert list((out / "images").glob("*.png"))
    plant(out, scene / "canary")
    # A `diffusers.py` in a component's folder is refused by diffusers, as code of the model's own.
    plant(out / "unet", scene / "canary", ("merge", "random", "json", "torch"))
    for words in (
        ("plan", "mine.yaml"),
        ("validate", "mine.yaml"),
        ("recipes", "demo"),
        ("show", "out"),
        ("edit", "out", "p.png", "make it blue", "-o", "e.png", "--device", "cpu"),
        ("verify", "out", "--device", "cpu"),
        ("verify", "out", "--files"),
        ("reproduce", "out"),
        ("convert", "out", "one.safetensors"),
        ("publish", "out", "--repo-id", "a/b", "--license", "apache-2.0", "--dry-run"),
        ("env",),
    ):
        done = run(scene, *words)
        assert done.returncode == 0, (words, done.stderr)
    assert "torch does not load" not in done.stdout
    assert (scene / "here" / "e.png").is_file()


def test_python_m_runs_no_module_of_the_current_folder(scene: Path) -> None:
    # A `merge.py` there is what Python itself takes `-m merge` for.
    for name in ("merge.py", "x.pth"):
        (scene / "here" / name).unlink(missing_ok=True)
    done = run(scene, "run", "mine.yaml", "--out", "m", "--device", "cpu", module=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((scene / "here" / "m" / "report.json").read_text())["passed"] is True
    done = run(scene, "env", module=True)
    assert done.returncode == 0
    assert "torch does not load" not in done.stdout


# The verdict ------------------------------------------------------------------------------------


class Target:
    is_folder = False


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("pass", r"ended without a verdict \(status 0\)"),
        ("import sys; sys.exit('it broke')", r"without a verdict \(status 1\): it broke"),
        ("import os; os.kill(os.getpid(), 9)", r"without a verdict \(status -9\)"),
    ],
)
def test_a_child_that_says_nothing_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.setattr(closing, "_CODE", code)
    (tmp_path / "report.json").write_text('{"passed": true}')
    with pytest.raises(VerificationError, match=words):
        closing.verify_output(tmp_path, [], Target(), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("report", [None, {"passed": True}, {"passed": False}])
def test_a_verdict_counts_only_with_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: dict[str, bool] | None
) -> None:
    said = "{'report': {'passed': True}}"
    code = (
        f"import json, sys; open(sys.argv[1][:-8] + 'verdict.json', 'w').write(json.dumps({said}))"
    )
    monkeypatch.setattr(closing, "_CODE", code)
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(VerificationError, match="the closing edits left no report in"):
        closing.verify_output(tmp_path, [], Target(), "cpu")  # type: ignore[arg-type]


def test_a_failure_comes_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="is no pipeline folder: it has no model_index"):
        closing.verify_output(tmp_path, [], Target(), "cpu")  # type: ignore[arg-type]
