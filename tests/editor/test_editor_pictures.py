"""Pictures of every kind going in, and PNGs coming out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from merge.editor.pictures import MAX_PIXELS, fit_size, load_image, resize_image, to_rgb
from merge.editor.png import save_png
from merge.editor.settings import EditSettings
from merge.errors import ImageError, OutputError


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# Modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_and_not_cut_off(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 300 * 4).astype(np.uint16).reshape(4, 300)
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(ramp).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    expected = np.round(ramp / 257)
    assert (pixels(loaded) == expected[..., None]).all()
    assert pixels(loaded).max() == 255


def test_32_bit_integers_hold_16_bits_or_are_refused() -> None:
    values = np.array([[0, 257, 65535]], dtype=np.int32)
    assert pixels(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255]
    for wrong in (65536, -1):
        with pytest.raises(ImageError, match=f"{wrong}.* beyond 16 bits|from {wrong} to"):
            to_rgb(Image.fromarray(np.array([[0, wrong]], dtype=np.int32)))
    with pytest.raises(ImageError, match="floating-point pixels"):
        to_rgb(Image.new("F", (4, 4)))


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    # Under a transparent pixel there is often black, which must not show.
    layer = np.zeros((1, 4, 4), np.uint8)
    layer[0, :, 0] = 200
    layer[0, :, 3] = (0, 255, 128, 0)
    Image.fromarray(layer).save(tmp_path / "a.png")
    found = pixels(load_image(tmp_path / "a.png"))[0]
    assert found[0].tolist() == found[3].tolist() == [255, 255, 255]
    assert found[1].tolist() == [200, 0, 0]
    assert np.abs(found[2] - [227, 127, 127]).max() <= 1

    grey = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")
    assert pixels(to_rgb(grey))[0, :, 0].tolist() == [255, 9]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_palettes_keep_their_colours_and_their_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "p.png")
    assert pixels(load_image(tmp_path / "p.png"))[0].tolist() == [
        *([255, 0, 0], [0, 255, 0], [0, 0, 255]),
    ]
    for suffix in ("png", "gif"):
        path = tmp_path / f"t.{suffix}"
        palette.save(path, transparency=1)
        assert pixels(load_image(path))[0, 1].tolist() == [255, 255, 255], suffix
        assert pixels(load_image(path))[0, 2].tolist() == [0, 0, 255], suffix


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    for suffix in ("tif", "jpg"):
        path = tmp_path / f"c.{suffix}"
        # Full cyan.
        Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(path)
        found = pixels(load_image(path))[8, 8]
        assert found[0] < 10, suffix
        assert found[1:].min() > 240, suffix


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    assert pixels(to_rgb(white)).min() >= 254


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(load_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_data_say(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 8, 8))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "e.png", exif=exif)
    loaded = load_image(tmp_path / "e.png")
    assert loaded.tobytes() == upright.tobytes()
    # Once: neither reading nor resizing turns it again.
    assert resize_image(loaded, 16).tobytes() == upright.tobytes()
    with Image.open(tmp_path / "e.png") as plain:
        assert resize_image(plain, 16).tobytes() == upright.tobytes()


# Damage and size ---------------------------------------------------------------------------------


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 90).save(good)
    jpeg = tmp_path / "good.jpg"
    Image.effect_noise((64, 64), 90).save(jpeg)
    contents = {
        "text.png": b"no picture",
        "empty.png": b"",
        "cut.png": good.read_bytes()[:1000],
        "cut.jpg": jpeg.read_bytes()[:600],
        "zeros.png": good.read_bytes()[:60] + bytes(2000),
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }
    for name, data in contents.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"{name} is no picture that can be read") as caught:
            load_image(path)
        assert caught.value.exit_code == 4
        assert caught.value.hint
    with pytest.raises(ImageError, match=r"there is no picture .*nothing\.png"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="is no picture that can be read"):
        load_image(tmp_path)


@given(st.binary(max_size=200), st.integers(0, 500))
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damage"
    folder.mkdir(exist_ok=True)
    good = folder / "good.png"
    if not good.exists():
        Image.effect_noise((20, 20), 90).convert("P").save(good)
    data = good.read_bytes()
    bad = folder / "bad.png"
    bad.write_bytes(data[:at] + junk + data[at + len(junk) :])
    with contextlib.suppress(ImageError):
        assert load_image(bad).mode == "RGB"


def test_the_smallest_and_the_largest_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    one = resize_image(load_image(tmp_path / "one.png"), 64)
    assert one.size == (64, 64)
    assert pixels(one)[32, 32].tolist() == [255, 0, 0]
    # 100 million pixels are read, and scaled down.
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert resize_image(load_image(tmp_path / "large.png"), 64).size == (64, 64)
    Image.new("1", (10_001, 10_000)).save(tmp_path / "larger.png")
    with pytest.raises(ImageError, match=r"larger\.png: a picture of 10001 x 10000 is too large"):
        load_image(tmp_path / "larger.png")


def test_a_picture_too_narrow_or_blown_up_too_far_is_refused() -> None:
    assert resize_image(Image.new("RGB", (640, 20)), 16).size == (512, 16)
    with pytest.raises(ImageError, match="5000 x 2 is too narrow to edit"):
        resize_image(Image.new("RGB", (5000, 2)), 64)
    with pytest.raises(ImageError, match="is too large: 100,000,000 pixels"):
        resize_image(Image.new("RGB", (20, 10)), 8192)


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.integers(8, 1024), st.sampled_from([8, 16, 24])
)
def test_sizes_are_multiples_with_the_short_side_asked_for(
    width: int, height: int, resolution: int, multiple: int
) -> None:
    try:
        size = fit_size((width, height), resolution, multiple)
    except ImageError:
        assert max(width, height) / min(width, height) > 20 or resolution < 16
        return
    assert all(side % multiple == 0 and side > 0 for side in size)
    assert size[0] * size[1] <= MAX_PIXELS
    assert abs(min(size) - resolution) <= max(multiple / 2, multiple - resolution)
    # The proportions stay, up to the rounding of each side.
    scale = resolution / min(width, height)
    for side, old in zip(size, (width, height), strict=True):
        assert abs(side - old * scale) <= max(multiple / 2, multiple - old * scale) + 1e-6


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    picture = Image.effect_noise((72, 64), 90).convert("RGB")
    assert resize_image(picture, 64).tobytes() == picture.tobytes()


# PNG ---------------------------------------------------------------------------------------------


def test_a_png_holds_what_made_it(tmp_path: Path) -> None:
    settings = EditSettings(seed=3, resolution=64, timesteps=(999, 499))
    picture = Image.effect_noise((64, 48), 90).convert("RGB")
    path = tmp_path / "out.png"
    instruction = "mach es grün, 让它变蓝"
    save_png(picture, path, settings, instruction)
    with Image.open(path) as image:
        assert image.tobytes() == picture.tobytes()
        assert set(image.text) == {"instruction", "settings"}
        assert image.text["instruction"] == instruction
        found = json.loads(image.text["settings"])
    assert found.pop("timesteps") == [999, 499]
    assert EditSettings(**found, timesteps=(999, 499)) == settings
    assert str(tmp_path).encode() not in path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_a_png_replaces_another_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.png"
    picture = Image.effect_noise((64, 48), 90)
    save_png(picture, path, EditSettings(), "first")
    before = path.read_bytes()

    def fail(self: Image.Image, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OutputError, match=r"out\.png cannot be written: No space left"):
            save_png(picture, path, EditSettings(), "second")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    save_png(picture, path, EditSettings(), "second")
    with Image.open(path) as image:
        assert image.text["instruction"] == "second"
    with pytest.raises(OutputError, match="cannot be written"):
        save_png(picture, tmp_path / "no" / "folder.png", EditSettings(), "x")


def test_a_png_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    save_png(Image.new("RGB", (8, 8)), tmp_path / "out.png", EditSettings(), "x")
    assert (tmp_path / "out.png").stat().st_mode == plain.stat().st_mode
