from __future__ import annotations

import sys
from pathlib import Path

import pytest

import merge
from merge.background.child import import_folders


def test_a_checkout_that_is_the_current_folder_comes_after_all_but_copies_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(Path(merge.__file__).resolve().parents[1])
    (tmp_path / "copy" / "merge").mkdir(parents=True)
    (tmp_path / "copy" / "merge" / "__init__.py").touch()
    first, copy = str(tmp_path), str(tmp_path / "copy")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", ["", here, first])
    assert import_folders() == [first, here]
    monkeypatch.setattr(sys, "path", [here, first, copy])
    assert import_folders() == [first, here, copy]
