"""What a grid edits: lists, folders, the recipe's edits, and samples with new noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from merge import load_recipe
from merge.errors import ImageError, RecipeError, SourceNotFoundError
from merge.grid.inputs import MAX_SAMPLES, Inputs, find_edits, make_samples
from merge.recipe.schema import Recipe
from merge.verify.edits import DEFAULT_EDITS
from merge.verify.model import Edit
from tests.grid.small import measure, read, write_recipe


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with pictures, a picture that is hidden, and what is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.JPG", "a.png", ".hidden.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "words.txt").write_text("# what to do\nmake it winter\n\n  make it night  \n")
    return folder


def recipe_of(folder: Path, *edits: dict[str, object]) -> Recipe:
    tree = {
        "name": "r",
        "models": {"target": "./t", "distilled": "./d.safetensors"},
        "verify": {"edits": list(edits)},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    return load_recipe(folder / "r.yaml")


# What is edited ----------------------------------------------------------------------------------


def test_every_picture_comes_once_before_any_comes_again(photos: Path) -> None:
    inputs = Inputs(images=photos, instructions=photos.parent / "words.txt")
    found = find_edits(recipe_of(photos.parent), inputs)
    assert [(edit.image and edit.image.name, edit.instruction) for edit in found] == [
        ("a.png", "make it winter"),
        ("b.JPG", "make it night"),
        ("a.png", "make it night"),
        ("b.JPG", "make it winter"),
    ]
    assert len(set(found)) == 4


def test_there_is_a_most(photos: Path) -> None:
    words = photos.parent / "many.txt"
    words.write_text("\n".join(f"make it {number}" for number in range(MAX_SAMPLES)))
    found = find_edits(recipe_of(photos.parent), Inputs(images=photos, instructions=words))
    assert len(found) == MAX_SAMPLES
    assert {edit.image and edit.image.name for edit in found} == {"a.png", "b.JPG"}


def test_a_list_of_edits_is_read_as_by_verify(photos: Path) -> None:
    listed = photos / "edits.yaml"
    listed.write_text(yaml.safe_dump([{"image": "a.png", "instruction": "x", "seed": 3}]))
    recipe = recipe_of(photos.parent)
    (found,) = find_edits(recipe, Inputs(listed))
    assert (found.image, found.instruction, found.seed) == (photos / "a.png", "x", 3)
    assert find_edits(recipe, Inputs((found,))) == (found,)


def test_the_recipes_edits_are_taken_where_nothing_is_named(photos: Path) -> None:
    recipe = recipe_of(
        photos.parent,
        {"image": "photos/a.png", "instruction": "x", "expected": ["photos/b.JPG"], "steps": 2},
        {"image": "photos/b.JPG", "instruction": "y", "timesteps": [999, 99]},
    )
    first, second = find_edits(recipe, Inputs())
    assert first == Edit(
        photos / "a.png", "x", expected=(photos / "b.JPG",), steps=2, drawing="house"
    )
    assert second.timesteps == (999, 99)


def test_drawn_pictures_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "merge.grid.inputs"):
        assert find_edits(recipe_of(tmp_path), Inputs()) == DEFAULT_EDITS
    assert "drawn pictures are edited, which photographs need not agree with" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (Inputs(images="photos"), RecipeError, "belong together"),
        (Inputs(instructions="words.txt"), RecipeError, "belong together"),
        (
            Inputs("edits.yaml", images="photos", instructions="words.txt"),
            RecipeError,
            "--edits and --images are both given",
        ),
        (
            Inputs(images="nowhere", instructions="words.txt"),
            SourceNotFoundError,
            "no folder nowhere",
        ),
        (
            Inputs(images="photos/a.png", instructions="words.txt"),
            SourceNotFoundError,
            "no folder photos/a.png",
        ),
        (Inputs(images="empty", instructions="words.txt"), ImageError, "no picture in empty"),
        (
            Inputs(images="photos", instructions="nowhere.txt"),
            SourceNotFoundError,
            "the instructions nowhere.txt cannot be read",
        ),
        (
            Inputs(images="photos", instructions="photos/a.png"),
            SourceNotFoundError,
            "the instructions photos/a.png cannot be read",
        ),
        (Inputs(images="photos", instructions="none.txt"), RecipeError, "has no instruction"),
        (Inputs(()), RecipeError, "there is nothing to edit"),
        (Inputs("none.txt"), RecipeError, "no list of edits"),
        (Inputs("nothing.yaml"), RecipeError, "name at least one edit"),
        (Inputs("lost.yaml"), ImageError, "there is no picture lost.png"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_inputs_that_cannot_be_are_told(
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    inputs: Inputs,
    error: type[Exception],
    text: str,
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("none.txt").write_text("# nothing\n\n")
    Path("nothing.yaml").write_text("[]")
    Path("lost.yaml").write_text(yaml.safe_dump([{"image": "lost.png", "instruction": "x"}]))
    # Binary: no text in UTF-8.
    Path("photos/a.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(error, match=text):
        find_edits(recipe_of(photos.parent), inputs)


def test_pictures_that_the_recipe_lacks_are_named(photos: Path) -> None:
    recipe = recipe_of(
        photos.parent,
        {"image": "photos/a.png", "instruction": "x", "expected": ["photos/no.png"]},
        {"image": "photos/neither.png", "instruction": "y"},
    )
    with pytest.raises(ImageError, match=r"verify.edits: there is no picture .*no.png, .*neither"):
        find_edits(recipe, Inputs())


# Samples -----------------------------------------------------------------------------------------

A, B = Edit(None, "a"), Edit(None, "b", seed=5)


def pairs(*words: object, **options: object) -> list[tuple[str, int]]:
    samples = make_samples(*words, **{"is_seed_fixed": False, **options})  # type: ignore[arg-type]
    return [(sample.edit.instruction, sample.seed) for sample in samples]


def test_each_edit_has_each_seed_or_its_own() -> None:
    assert pairs([A, B], [0, 1]) == [("a", 0), ("a", 1), ("b", 5)]
    assert pairs([A, B], [0, 1], is_seed_fixed=True) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_more_samples_repeat_the_edits_with_new_noise() -> None:
    assert pairs([A, B], [0], 6) == [("a", 0), ("b", 5), ("a", 6), ("b", 6), ("a", 7), ("b", 7)]
    assert pairs([A, B], [0, 1], 2) == [("a", 0), ("a", 1)]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 40),
    st.booleans(),
)
def test_no_sample_comes_twice(
    seeds: list[int], own: list[int | None], count: int, is_fixed: bool
) -> None:
    edits = [Edit(None, str(index), seed) for index, seed in enumerate(own)]
    found = pairs(edits, seeds, count, is_seed_fixed=is_fixed)
    assert len(found) == len(set(found)) == count
    assert found == pairs(edits, seeds, count, is_seed_fixed=is_fixed)
    # Fewer are the first of more.
    assert found[: count // 2] == pairs(edits, seeds, count // 2, is_seed_fixed=is_fixed)


def test_the_largest_seed_may_be_followed() -> None:
    assert pairs([A], [2**63 - 1], 3)[1:] == [("a", 0), ("a", 1)]


# In a sweep --------------------------------------------------------------------------------------


def test_words_for_every_cell_win_over_those_of_an_edit(tiny_sd15: Path, tmp_path: Path) -> None:
    edits = (
        Edit(None, "make it winter", seed=7, steps=3),
        Edit(None, "make it night", drawing="boat", timesteps=(999, 99)),
    )
    recipe = write_recipe(tmp_path, tiny_sd15)

    def sweep(*axes: str, **options: object) -> tuple[list[int], list[float]]:
        measure(recipe, axes, tmp_path / "out", edits, metrics=["l1"], overwrite=True, **options)
        tree = read(tmp_path / "out")
        seeds = [sample["seed"] for sample in tree["samples"]]
        return seeds, [cell["unet_rows"] for cell in tree["cells"]]

    # The mean of 3 and 2 rows, and then as many as all of them are told to have.
    assert sweep("weight=0.5,1") == ([7, 0], [2.5, 2.5])
    assert sweep("weight=0.5,1", "steps=1", "seed=3") == ([3, 3], [1, 1])
    assert sweep("timesteps=999/499/99,999", "seed=1,2") == ([None, None], [3, 3, 1, 1])


def test_samples_are_the_same_in_every_cell_and_sweep(tiny_sd15: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_sd15)
    inputs = Inputs((Edit(None, "make it winter"), Edit(None, "make it night")), samples=5)
    trees = []
    for name in ("one", "two"):
        measure(recipe, ["weight=0.5,1"], tmp_path / name, inputs=inputs, metrics=["residual"])
        trees.append(read(tmp_path / name))
    for tree in trees:
        assert [sample["seed"] for sample in tree["samples"]] == [0, 0, 1, 1, 2]
        assert [sample["is_shown"] for sample in tree["samples"]] == [True] * 5
    assert trees[0]["cells"][0]["samples"] == trees[1]["cells"][0]["samples"]
    assert len(set(trees[0]["cells"][0]["samples"]["residual"])) == 5
