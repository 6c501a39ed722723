"""The card of an export: its lines really load what they stand beside."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import yaml
from PIL import Image

from merge import load_recipe, run_recipe


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models: Path = request.getfixturevalue(f"tiny_{request.param}")
    root = tmp_path_factory.mktemp(f"card-{request.param}")
    tree = {
        "name": "carded",
        "models": {role: str(models / role) for role in ("base", "distilled", "target")},
        "verify": {"resolution": 64},
        "output": {"single_file": True},
        # Half precision overflows in these random models on a CPU.
        "out_dtype": "float32",
    }
    (root / "carded.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(root / "carded.yaml")
    return run_recipe(recipe, root / "out", device="cpu", verify=False).folder


def test_the_lines_of_the_card_load_and_edit(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    text = (exported / "README.md").read_text()
    folder, single = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((80, 64), 90).save("photo.jpg")
    space: dict[str, object] = {}
    code = (folder + single).replace("path/to/this/folder", str(exported))
    code = code.replace('.to("cuda")', "").replace("torch.float16", "torch.float32")
    code = code.replace(
        "from_pretrained(", "from_pretrained(local_files_only=True, pretrained_model_name_or_path="
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, space)
    assert isinstance(space["image"], Image.Image)
    pipeline = space["pipeline"]
    assert pipeline.unet.config.in_channels == 8  # type: ignore[attr-defined]


def test_the_card_names_parents_formula_and_digest(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert "| target | `target` |" in text
    assert "`target + weight * (distilled - base)` at weight 1" in text
    assert re.search(r"Recipe digest: `[0-9a-f]{64}`", text)
    assert str(exported.parent) not in text
