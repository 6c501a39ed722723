"""The edit loop against diffusers' own pipelines, and what batches and seeds may not change."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from merge.editor.batches import edit, edit_many
from merge.editor.guidance import Rows, choose_rows, combine
from merge.editor.load import Editor, load_editor
from merge.editor.result import EditRequest, EditResult
from merge.editor.schedule import draw_noise, make_schedule
from merge.editor.settings import EditSettings
from merge.errors import CheckpointError, DeviceError, ImageError, SourceNotFoundError

LATENT_LIMIT = 1e-4
# Far below one step of 8 bits: of random models, pictures hardly follow the latents.
PICTURE_LIMIT = 1e-4
SIZE = (64, 48)
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V_ZERO_SNR = {
    **BASE,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def noise_picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return coarse coloured noise, in which every part differs."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the package's warnings, whoever configured logging before."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("merge")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def counted_rows(editor: Editor) -> Iterator[list[int]]:
    """Collect the batch size of every call of the UNet."""
    rows: list[int] = []
    unet = editor.pipeline.unet
    handle = unet.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    try:
        yield rows
    finally:
        handle.remove()


class Pair:
    """Our editor and diffusers' own pipeline, each loaded from the same folder."""

    def __init__(self, folder: Path) -> None:
        self.editor = load_editor(folder, device="cpu")
        name = type(self.editor.pipeline).__name__
        extra: dict[str, Any] = {"add_watermarker": False}
        if not self.editor.has_added_conditions:
            extra = {"safety_checker": None, "requires_safety_checker": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.stock = getattr(diffusers, name).from_pretrained(
                folder, dtype=torch.float32, **extra
            )
        self.own_scheduler = self.stock.scheduler
        self.stock.set_progress_bar_config(disable=True)

    def use(self, scheduler: Any) -> None:
        self.editor.pipeline.scheduler = scheduler
        self.stock.scheduler = copy.deepcopy(scheduler)

    def run_stock(
        self, picture: Image.Image, instruction: str, settings: EditSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the final latents and the picture."""
        scheduler = copy.deepcopy(self.stock.scheduler)
        arguments: dict[str, Any] = {}
        if type(scheduler).__name__ == "LCMScheduler":
            arguments["original_inference_steps"] = settings.original_inference_steps
        if settings.timesteps is not None:
            arguments["timesteps"] = list(settings.timesteps)
        plain = scheduler.set_timesteps

        # The pipelines pass a number of steps and nothing else.
        def set_timesteps(count: int, device: Any = None) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                if "timesteps" in arguments:
                    plain(device=device, **arguments)
                else:
                    plain(count, device=device, **arguments)

        size = (
            {"width": picture.width, "height": picture.height}
            if self.editor.has_added_conditions
            else {}
        )
        outputs = []
        for output_type in ("latent", "np"):
            self.stock.scheduler = copy.deepcopy(scheduler)
            plain = self.stock.scheduler.set_timesteps
            self.stock.scheduler.set_timesteps = set_timesteps
            images = self.stock(
                instruction,
                image=picture,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                image_guidance_scale=settings.image_guidance_scale,
                generator=torch.Generator("cpu").manual_seed(settings.seed),
                output_type=output_type,
                **size,
            ).images
            outputs.append(images[0].numpy() if output_type == "latent" else images[0])
        self.stock.scheduler = scheduler
        return outputs[0], outputs[1]

    def compare(
        self,
        settings: EditSettings,
        instruction: str = "make it blue",
        picture: Image.Image | None = None,
    ) -> EditResult:
        """Hold our edit against the stock pipeline's and return it."""
        picture = picture or noise_picture()
        settings = dataclasses.replace(settings, resolution=min(picture.size))
        latents, image = self.run_stock(picture, instruction, settings)
        with counted_rows(self.editor) as rows:
            result = edit(self.editor, picture, instruction, settings)
        assert result.latents.shape == latents.shape
        assert np.abs(result.latents - latents).max() <= LATENT_LIMIT
        assert np.abs(result.image - image).max() <= PICTURE_LIMIT
        assert result.image.dtype == result.latents.dtype == np.float32
        assert result.unet_rows == sum(rows)
        assert len(set(rows)) == 1
        return result


def lcm(**config: Any) -> Any:
    return diffusers.LCMScheduler(**{**BASE, **config})


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.getfixturevalue(f"tiny_{request.param}") / "target")


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> Pair:
    return Pair(tiny_sd15 / "target")


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Pair:
    return Pair(tiny_sdxl / "target")


# Against the stock pipelines ---------------------------------------------------------------------


@pytest.mark.parametrize("image_guidance", [0.9, 1.0, 1.5])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_loop_gives_the_stock_pictures_from_fewer_rows(
    pair: Pair, guidance: float, image_guidance: float
) -> None:
    pair.use(lcm())
    settings = EditSettings(
        guidance_scale=guidance, image_guidance_scale=image_guidance, seed=5, steps=3
    )
    result = pair.compare(settings)
    rows = {(2.0, 1.0): 2, (2.0, 1.5): 3}.get((guidance, image_guidance), 1)
    assert result.unet_rows == 3 * rows


@pytest.mark.parametrize(
    "settings",
    [
        EditSettings(steps=1),
        EditSettings(steps=8, guidance_scale=1.5),
        EditSettings(original_inference_steps=100),
        EditSettings(timesteps=(999, 749, 499, 249)),
        EditSettings(timesteps=(999, 0), guidance_scale=3.0, image_guidance_scale=1.2),
    ],
    ids=str,
)
def test_schedules_are_the_stock_ones(pair: Pair, settings: EditSettings) -> None:
    pair.use(lcm())
    result = pair.compare(settings)
    steps = settings.steps if settings.timesteps is None else len(settings.timesteps)
    assert result.unet_rows == steps * (3 if settings.image_guidance_scale > 1 else 2)
    assert result.settings.steps == steps


@pytest.mark.parametrize(
    "config",
    [V_ZERO_SNR, {"prediction_type": "sample"}, {"clip_sample": True}, {"thresholding": True}],
    ids=["v-prediction, zero SNR", "sample", "clip", "threshold"],
)
def test_the_lcm_step_follows_its_config(sd15: Pair, config: dict[str, Any]) -> None:
    sd15.use(lcm(**config))
    sd15.compare(EditSettings(seed=3))


@pytest.mark.parametrize(
    ("name", "config", "calls"),
    [
        ("DDIMScheduler", V_ZERO_SNR, 6),
        ("DDIMScheduler", {"clip_sample": False}, 6),
        ("EulerDiscreteScheduler", {}, 6),
        ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}, 6),
        ("DDPMScheduler", {"clip_sample": False}, 6),
        ("DPMSolverMultistepScheduler", {}, 6),
        ("UniPCMultistepScheduler", {}, 6),
        ("PNDMScheduler", {"skip_prk_steps": True}, 7),
        ("HeunDiscreteScheduler", {}, 11),
        ("TCDScheduler", {}, 6),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_schedulers_step_as_in_the_stock_pipeline(
    sd15: Pair, name: str, config: dict[str, Any], calls: int
) -> None:
    sd15.use(getattr(diffusers, name)(**{**BASE, **config}))
    result = sd15.compare(EditSettings(steps=6, seed=1))
    assert result.unet_rows == 2 * calls


def test_the_targets_own_scheduler_at_many_steps(sdxl: Pair, tiny_sdxl: Path) -> None:
    with logged() as lines:
        editor = load_editor(tiny_sdxl / "target", device="cpu", scheduler="own")
    assert lines == []
    assert type(editor.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    sdxl.use(editor.pipeline.scheduler)
    # 60 steps are more than an LCM schedule has.
    result = sdxl.compare(EditSettings(steps=60, guidance_scale=1.5, image_guidance_scale=1.5))
    assert result.unet_rows == 180


def test_a_vae_of_another_factor_and_small_pictures(sd15: Pair) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.5,
    ).eval()
    parts = {**sd15.editor.pipeline.components, "vae": vae, "requires_safety_checker": False}
    other = copy.copy(sd15)
    other.stock = type(sd15.stock)(**parts)
    other.stock.set_progress_bar_config(disable=True)
    other.editor = dataclasses.replace(sd15.editor, pipeline=type(sd15.stock)(**parts))
    assert other.editor.default_resolution == 32
    for scheduler in (lcm(**V_ZERO_SNR), diffusers.DDIMScheduler(**V_ZERO_SNR)):
        other.use(scheduler)
        result = other.compare(EditSettings(), picture=noise_picture(size=(40, 32)))
        assert result.latents.shape == (4, 8, 10)


def test_sdxl_encodes_the_empty_prompt_where_zeros_are_not_asked_for(sdxl: Pair) -> None:
    sdxl.use(lcm())
    zeros = sdxl.compare(EditSettings(guidance_scale=3.0))
    try:
        for pipeline in (sdxl.stock, sdxl.editor.pipeline):
            pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        encoded = sdxl.compare(EditSettings(guidance_scale=3.0))
    finally:
        for pipeline in (sdxl.stock, sdxl.editor.pipeline):
            pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    assert np.abs(zeros.latents - encoded.latents).max() > LATENT_LIMIT


def test_sdxl_latents_with_a_mean_and_a_deviation(sdxl: Pair) -> None:
    sdxl.use(lcm())
    numbers = {"latents_mean": [10.0, -20.0, 30.0, 0.0], "latents_std": [2.5, 0.1, 1.2, 0.9]}
    vaes = (sdxl.stock.vae, sdxl.editor.pipeline.vae)
    try:
        for vae in vaes:
            vae.register_to_config(**numbers)
        sdxl.compare(EditSettings(steps=2))
    finally:
        for vae in vaes:
            vae.register_to_config(latents_mean=None, latents_std=None)


def test_a_long_instruction_is_cut_as_in_the_stock_pipeline_and_that_is_said(pair: Pair) -> None:
    pair.use(lcm())
    instruction = "make it blue " * 60 + "and add a dragon"
    with logged() as lines:
        pair.compare(EditSettings(steps=1), instruction)
    assert len(lines) == 1
    said, _, lost = lines[0].partition(": ")
    assert said == "the instruction is too long; the model does not see"
    # Each of the first words is one token, and 77 with start and end are read.
    assert lost.split() == instruction.split()[75:]
    with logged() as lines:
        edit(pair.editor, noise_picture(), "make it blue", EditSettings(steps=1))
    assert lines == []


@pytest.mark.parametrize("size", [(8, 8), (8, 72), (56, 24)])
def test_sizes_that_the_unet_does_not_halve_evenly(sd15: Pair, size: tuple[int, int]) -> None:
    sd15.use(lcm())
    sd15.compare(EditSettings(steps=2), picture=noise_picture(size=size))


# Guidance ----------------------------------------------------------------------------------------

values = st.floats(-1e3, 1e3)
scales = st.one_of(st.sampled_from([0.0, 0.9, 1.0, 1.5, 2.0]), st.floats(0, 20))


@given(values, values, values, scales, scales)
def test_the_rows_that_are_left_out_count_for_nothing(
    text: float, image: float, none: float, guidance: float, image_guidance: float
) -> None:
    # As the pipelines write it.
    if guidance > 1.0 and image_guidance >= 1.0:
        expected = none + guidance * (text - image) + image_guidance * (image - none)
    else:
        expected = text
    rows = choose_rows(guidance, image_guidance)
    predictions = [np.float64(value) for value in (text, image, none)[:rows]]
    found = combine(predictions, guidance, image_guidance)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)
    # None too many: with a smaller set the result would depend on what is missing.
    if rows == Rows.ALL:
        assert image_guidance != 1
    if rows > Rows.TEXT:
        assert guidance > 1


def test_rows_at_the_borders() -> None:
    table = {
        (1.0, 1.0): 1,
        (1.0, 1.5): 1,
        (0.0, 2.0): 1,
        (1.0000001, 1.0): 2,
        (2.0, 0.9999999): 1,
        (2.0, 1.0): 2,
        (2.0, 1.0000001): 3,
    }
    assert {scales: int(choose_rows(*scales)) for scales in table} == table


# Noise and batches -------------------------------------------------------------------------------


def requests() -> list[EditRequest]:
    wide, high = noise_picture(1), noise_picture(2, (48, 64))
    third = noise_picture(3)
    return [
        EditRequest(wide, "make it blue", 3),
        EditRequest(high, "make it blue", 3),
        EditRequest(third, "add a dog", 4),
        EditRequest(wide, "make it blue", 4),
        EditRequest(wide, "make it red"),
        EditRequest(high, "add a dog", 9),
        EditRequest(third, "make it blue", 3),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_a_picture_is_the_same_alone_and_in_a_batch(pair: Pair, batch_size: int) -> None:
    pair.use(lcm())
    settings = EditSettings(steps=3, seed=11, resolution=48, image_guidance_scale=1.5)
    found = list(edit_many(pair.editor, requests(), settings, batch_size=batch_size))
    assert len(found) == len(requests())
    for request, result in zip(requests(), found, strict=True):
        seed = 11 if request.seed is None else request.seed
        chosen = dataclasses.replace(settings, seed=seed)
        alone = edit(pair.editor, request.image, request.instruction, chosen)
        assert np.abs(alone.latents - result.latents).max() <= LATENT_LIMIT
        assert np.abs(alone.image - result.image).max() <= PICTURE_LIMIT
        assert alone.source.tobytes() == result.source.tobytes()
        assert result.unet_rows == 9
        assert result.settings == dataclasses.replace(chosen, resolution=48)
    # The seeds and the instructions did something.
    for one, other in itertools.combinations([found[0], found[3], found[4]], 2):
        assert np.abs(one.latents - other.latents).max() > 100 * LATENT_LIMIT


def test_pictures_of_one_size_go_through_the_unet_together(sd15: Pair) -> None:
    sd15.use(lcm())
    with counted_rows(sd15.editor) as rows:
        list(edit_many(sd15.editor, requests(), EditSettings(steps=1, resolution=48), batch_size=7))
    # Five wide ones and two high ones, two rows each.
    assert rows == [10, 4]


def test_a_picture_and_an_instruction_are_encoded_once(
    sd15: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd15.use(lcm())
    pipeline = sd15.editor.pipeline
    encoded = {"pictures": 0, "texts": 0}
    vae, text = pipeline.vae.encode, pipeline.text_encoder.forward

    def encode(pixels: torch.Tensor) -> Any:
        encoded["pictures"] += len(pixels)
        return vae(pixels)

    def forward(ids: torch.Tensor, **options: Any) -> Any:
        encoded["texts"] += len(ids)
        return text(ids, **options)

    monkeypatch.setattr(pipeline.vae, "encode", encode)
    monkeypatch.setattr(pipeline.text_encoder, "forward", forward)
    wide, third = noise_picture(1), noise_picture(3)
    todo = [
        EditRequest(picture, words, seed)
        for picture in (wide, third)
        for words in ("make it blue", "make it red")
        for seed in range(4)
    ]
    for batch_size in (1, 3, 16):
        encoded.update(pictures=0, texts=0)
        settings = EditSettings(steps=1, resolution=48)
        results = list(edit_many(sd15.editor, todo, settings, batch_size=batch_size))
        assert len(results) == 16
        # Two instructions and the empty one.
        assert encoded == {"pictures": 2, "texts": 3}


def test_what_is_kept_is_bounded_and_evicted_pictures_are_encoded_again(sd15: Pair) -> None:
    from merge.editor.batches import _KEPT_PICTURES, _Session

    sd15.use(lcm())
    pictures = [noise_picture(seed) for seed in range(_KEPT_PICTURES + 3)]
    todo = [EditRequest(picture, f"add {i}") for i, picture in enumerate(pictures)]
    todo.append(EditRequest(pictures[0], "add 0"))
    session = _Session(sd15.editor, EditSettings(steps=1, resolution=48), None)
    results = list(session.run(iter(todo), 4))
    assert len(session.pictures._values) == _KEPT_PICTURES
    assert np.abs(results[0].latents - results[-1].latents).max() <= LATENT_LIMIT


def test_requests_are_read_a_batch_at_a_time(sd15: Pair) -> None:
    sd15.use(lcm())
    read = []

    def lazily() -> Iterator[EditRequest]:
        for seed in range(6):
            read.append(seed)
            yield EditRequest(noise_picture(), "make it blue", seed)

    settings = EditSettings(steps=1, resolution=48)
    results = edit_many(sd15.editor, lazily(), settings, batch_size=2)
    assert read == []
    next(results)
    assert read == [0, 1]
    next(results)
    next(results)
    assert read == [0, 1, 2, 3]
    assert len(list(results)) == 3


def test_what_was_read_before_a_bad_request_still_comes(sd15: Pair, tmp_path: Path) -> None:
    sd15.use(lcm())
    todo = [
        EditRequest(noise_picture(), "make it blue"),
        EditRequest(tmp_path / "nothing.png", "make it blue"),
    ]
    results = edit_many(sd15.editor, todo, EditSettings(steps=1, resolution=48), batch_size=8)
    assert next(results).image.shape == (48, 64, 3)
    with pytest.raises(ImageError, match="there is no picture"):
        next(results)


def test_no_requests_give_no_results(sd15: Pair) -> None:
    assert list(edit_many(sd15.editor, [], EditSettings())) == []


def test_steps_are_reported(sd15: Pair) -> None:
    sd15.use(lcm())
    seen: list[tuple[int, int]] = []
    todo = [EditRequest(noise_picture(), "make it blue", seed) for seed in (0, 1)]
    settings = EditSettings(steps=3, resolution=48)
    list(edit_many(sd15.editor, todo, settings, on_step=lambda *n: seen.append(n)))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_edits_repeat_and_leave_the_global_random_state_alone(pair: Pair) -> None:
    pair.use(lcm())
    settings = EditSettings(resolution=48)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = edit(pair.editor, noise_picture(), "make it blue", settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = edit(pair.editor, noise_picture(), "make it blue", settings)
    assert np.array_equal(first.latents, again.latents)
    assert np.array_equal(first.image, again.image)
    assert not torch.is_inference_mode_enabled()


def test_noise_depends_on_the_seed_alone() -> None:
    schedule = make_schedule(lcm(), EditSettings())
    noise, _ = draw_noise([1, 2, 1], (4, 5, 6), schedule)
    assert noise.shape == (4, 3, 4, 5, 6)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[:, 0], noise[:, 2])
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert not torch.equal(noise[0], noise[1])
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(noise[0, 1:2], torch.randn(1, 4, 5, 6, generator=generator))
    assert torch.equal(noise[1, 1:2], torch.randn(1, 4, 5, 6, generator=generator))


def test_the_result_says_what_was_used(sd15: Pair) -> None:
    sd15.use(lcm())
    settings = EditSettings(timesteps=(999, 499), seed=8, image_guidance_scale=1.5)
    result = edit(sd15.editor, noise_picture(), "make it blue", settings)
    assert sd15.editor.default_resolution == 64
    used = dataclasses.replace(settings, resolution=64, steps=2)
    assert result.settings == used
    assert result.source.size == (88, 64)
    assert result.image.shape == (64, 88, 3)
    assert result.latents.shape == (4, 8, 11)
    assert 0 <= result.image.min() <= result.image.max() <= 1
    stages = result.stages
    parts = (stages.text_s, stages.encode_s, stages.denoise_s, stages.decode_s)
    assert min(parts) > 0
    assert result.seconds == pytest.approx(sum(parts))
    assert result.to_pil().size == (88, 64)
    assert result.non_finite_count == 0


def test_values_that_are_not_finite_are_counted_and_not_taken_for_white(sd15: Pair) -> None:
    sd15.use(lcm())
    bias = sd15.editor.pipeline.vae.decoder.conv_out.bias
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[0], bias[1] = float("inf"), float("nan")
        result = edit(sd15.editor, noise_picture(), "blue", EditSettings(steps=1, resolution=48))
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert result.non_finite_count == 2 * 48 * 64
    assert np.asarray(result.to_pil())[..., :2].max() == 0


# Loading -----------------------------------------------------------------------------------------


def copy_target(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source / "target", tmp_path / "copy"))


def test_another_scheduler_is_named_and_overridden(tiny_sd15: Path, tmp_path: Path) -> None:
    with logged() as lines:
        editor = load_editor(tiny_sd15 / "target", device="cpu")
    assert len(lines) == 1
    assert "has EulerAncestralDiscreteScheduler: edits use LCMScheduler" in lines[0]
    assert editor.is_lcm
    assert editor.pipeline.scheduler.config.beta_end == 0.012
    # An export of this tool keeps what its recipe wrote.
    ours = copy_target(tiny_sd15, tmp_path)
    (ours / "merge_manifest.json").write_text("{}")
    with logged() as lines:
        assert not load_editor(ours, device="cpu").is_lcm
    assert lines == []
    with pytest.raises(ValueError, match="'ddim' is not one of lcm, own"):
        load_editor(ours, device="cpu", scheduler="ddim")


def test_the_safety_checker_judges_no_merge(tiny_sd15: Path) -> None:
    assert (tiny_sd15 / "target" / "safety_checker").is_dir()
    assert load_editor(tiny_sd15 / "target", device="cpu").pipeline.safety_checker is None


def test_a_plain_unet_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = copy_target(tiny_sd15, tmp_path)
    shutil.rmtree(folder / "unet")
    shutil.copytree(tiny_sd15 / "base", folder / "unet")
    with pytest.raises(CheckpointError, match="its UNet has 4 input channels, not 8"):
        load_editor(folder, device="cpu")


def test_folders_that_are_no_editor_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="has no model_index.json"):
        load_editor(tmp_path, device="cpu")
    folder = copy_target(tiny_sd15, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("StableDiffusionPipeline", None):
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(CheckpointError, match=f"is a {name}, not an InstructPix2Pix"):
            load_editor(folder, device="cpu")
    for text in ("{", "[]"):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read|is not a JSON object"):
            load_editor(folder, device="cpu")
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="does not load"):
        load_editor(folder, device="cpu")


def test_devices_and_dtypes_that_are_not_there(tiny_sd15: Path) -> None:
    with pytest.raises(DeviceError, match="'tpu' is no device"):
        load_editor(tiny_sd15 / "target", device="tpu")
    with pytest.raises(DeviceError, match="'int8' is no dtype to edit in"):
        load_editor(tiny_sd15 / "target", device="cpu", dtype="int8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_narrow_dtypes_give_nearly_the_same_picture(
    request: pytest.FixtureRequest, arch: str, dtype: str
) -> None:
    folder = request.getfixturevalue(f"tiny_{arch}") / "target"
    narrow = load_editor(folder, device="cpu", dtype=dtype)
    wide = load_editor(folder, device="cpu")
    assert narrow.pipeline.unet.dtype == getattr(torch, dtype)
    # SDXL's VAE asks for float32 where float16 would overflow.
    upcast = arch == "sdxl" and dtype == "float16"
    expected = torch.float32 if upcast else getattr(torch, dtype)
    assert narrow.pipeline.vae.dtype == expected
    settings = EditSettings(resolution=48, steps=2)
    results = [edit(editor, noise_picture(), "make it blue", settings) for editor in (narrow, wide)]
    scale = np.abs(results[1].latents).max()
    assert results[0].latents.dtype == np.float32
    # The noise is the same, so only rounding remains.
    limit = {"float16": 0.02, "bfloat16": 0.1}[dtype] * scale
    assert 0 < np.abs(results[0].latents - results[1].latents).max() < limit


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps 0 is not within 1 to original_inference_steps \(50\)"),
        ({"steps": 51}, r"steps 51 is not within 1 to original_inference_steps \(50\)"),
        ({"steps": -4}, "steps -4"),
        ({"original_inference_steps": 0}, "original_inference_steps 0 is not within 1 to 1000"),
        ({"original_inference_steps": 1001}, "original_inference_steps 1001"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan is not a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf"),
        ({"guidance_scale": -1.0}, "guidance_scale -1.0"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale nan"),
        ({"image_guidance_scale": float("-inf")}, "image_guidance_scale -inf"),
        ({"timesteps": ()}, "timesteps none do not fall strictly within 999 to 0"),
        ({"timesteps": (499, 999)}, "timesteps 499, 999 do not fall"),
        ({"timesteps": (999, 999)}, "timesteps 999, 999 do not fall"),
        ({"timesteps": (1000, 499)}, "timesteps 1000, 499 do not fall"),
        ({"timesteps": (999, -1)}, "timesteps 999, -1 do not fall"),
        ({"seed": -1}, r"seed -1 is not within 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"resolution": 7}, "resolution 7 is not within 8 to 8192 pixels"),
        ({"resolution": 8193}, "resolution 8193"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_any_request_is_read(
    sd15: Pair, settings: dict[str, Any], message: str
) -> None:
    sd15.use(lcm())

    def unread() -> Iterator[EditRequest]:
        raise AssertionError
        yield

    with pytest.raises(ImageError, match=message) as caught:
        edit_many(sd15.editor, unread(), EditSettings(**settings))
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_bad_requests_are_refused(sd15: Pair) -> None:
    sd15.use(lcm())
    for instruction in ("", " \n\t"):
        with pytest.raises(ImageError, match="the instruction is empty"):
            edit(sd15.editor, noise_picture(), instruction)
    with pytest.raises(ImageError, match="seed -1"):
        next(edit_many(sd15.editor, [EditRequest(noise_picture(), "x", -1)], EditSettings()))
    with pytest.raises(ValueError, match="batch_size 0 is below 1"):
        edit_many(sd15.editor, [], EditSettings(), batch_size=0)


def test_a_scheduler_without_explicit_timesteps_says_so(sd15: Pair) -> None:
    sd15.use(diffusers.DDIMScheduler(**BASE))
    with pytest.raises(ImageError, match="DDIMScheduler takes no explicit timesteps"):
        edit_many(sd15.editor, [], EditSettings(timesteps=(999, 499)))
    with pytest.raises(ImageError, match="steps 1001 is not within 1 to 1000"):
        edit_many(sd15.editor, [], EditSettings(steps=1001))


def test_settings_outside_the_range_that_works_are_named(sd15: Pair, sdxl: Pair) -> None:
    def lines(editor: Editor, **settings: Any) -> str:
        return "; ".join(editor.warnings_for(EditSettings(**settings)))

    assert lines(sd15.editor) == ""
    assert lines(sd15.editor, guidance_scale=3.0) == ""
    assert "guidance_scale 3.1 is above 3" in lines(sd15.editor, guidance_scale=3.1)
    assert "below 1 turns all guidance off" in lines(sd15.editor, image_guidance_scale=0.9)
    assert "other than 1" in lines(sd15.editor, image_guidance_scale=1.5)
    large = copy.copy(sdxl.editor.pipeline.unet.config)
    assert large.sample_size == 8
    xl = copy.copy(sdxl.editor.pipeline)
    xl.unet = copy.copy(sdxl.editor.pipeline.unet)
    xl.unet._internal_dict = {**large, "sample_size": 96}
    xl.unet._internal_dict = type(large)(xl.unet._internal_dict)
    editor = dataclasses.replace(sdxl.editor, pipeline=xl)
    assert editor.default_resolution == 768
    assert lines(editor) == lines(editor, resolution=768) == ""
    assert "SDXL edits at 512 px: only 768" in lines(editor, resolution=512)


# Compiled ----------------------------------------------------------------------------------------


def test_a_unet_that_does_not_compile_says_so(
    tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def compile_later(model: torch.nn.Module, **options: Any) -> None:
        asked.update(options)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand more")

        monkeypatch.setattr(model, "forward", fail)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_later)
    editor = load_editor(tiny_sd15 / "target", device="cpu", compile_unet=True)
    assert asked == {"mode": "default", "fullgraph": True, "dynamic": False}
    with pytest.raises(DeviceError, match="compiled UNet failed: Invalid.* found\n") as error:
        edit(editor, noise_picture(), "blue", EditSettings(resolution=48))
    assert "edit without --compile" in error.value.hint


@pytest.mark.slow
def test_a_compiled_unet_gives_the_same_picture(tiny_sd15: Path) -> None:
    settings = EditSettings(resolution=48, image_guidance_scale=1.5)
    results = [
        edit(
            load_editor(tiny_sd15 / "target", device="cpu", compile_unet=c), picture, "x", settings
        )
        for c, picture in ((False, noise_picture()), (True, noise_picture()))
    ]
    assert np.abs(results[0].image - results[1].image).max() < 1 / 255


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_a_gpu_gives_the_picture_of_the_cpu(request: pytest.FixtureRequest, arch: str) -> None:
    folder = request.getfixturevalue(f"tiny_{arch}") / "target"
    settings = EditSettings(resolution=48, image_guidance_scale=1.5)
    results = [
        edit(load_editor(folder, device=d, dtype="float32"), noise_picture(), "blue", settings)
        for d in ("cpu", "cuda")
    ]
    # The same noise; sums are rounded in another order.
    assert np.abs(results[0].latents - results[1].latents).max() < 1e-2
    assert np.abs(results[0].image - results[1].image).max() < 2 / 255


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_the_loop_never_waits_for_the_gpu(
    request: pytest.FixtureRequest, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merge.editor.batches as batches

    editor = load_editor(request.getfixturevalue(f"tiny_{arch}") / "target", device="cuda")
    assert editor.pipeline.unet.dtype == torch.float16
    edit(editor, noise_picture(), "blue", EditSettings(resolution=48))
    real = batches.denoise

    def strictly(*arguments: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(batches, "denoise", strictly)
    result = edit(editor, noise_picture(), "blue", EditSettings(resolution=48))
    assert result.non_finite_count == 0


@pytest.mark.gpu
def test_a_compiled_unet_on_a_gpu_gives_the_same_pictures(tiny_sd15: Path) -> None:
    settings = EditSettings(resolution=48, image_guidance_scale=1.5)
    requests = [EditRequest(noise_picture(), "blue", seed) for seed in range(3)]
    plain, compiled = (
        list(
            edit_many(
                load_editor(
                    tiny_sd15 / "target", device="cuda", dtype="float32", compile_unet=is_compiled
                ),
                requests,
                settings,
            )
        )
        for is_compiled in (False, True)
    )
    # Later ones run in the same graph, whose memory is used again.
    for one, two in zip(plain, compiled, strict=True):
        assert np.abs(one.image - two.image).max() < 2 / 255


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_float32_while_an_edit_runs(
    tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """On a GPU cuDNN convolves in TF32 unless it is told otherwise."""
    import merge.editor.batches as batches

    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    seen: list[list[str]] = []
    real = batches.denoise

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append([place.fp32_precision for place in places])
        return real(*arguments)

    monkeypatch.setattr(batches, "denoise", watched)
    editor = load_editor(tiny_sd15 / "target", device="cpu", allow_tf32=allowed)
    edit(editor, noise_picture(), "blue", EditSettings(steps=1, resolution=48))
    assert seen == [["tf32" if allowed else "ieee"] * 2]
    assert [place.fp32_precision for place in places] == before

    def broken(*arguments: Any) -> torch.Tensor:
        raise KeyError("denoise")

    monkeypatch.setattr(batches, "denoise", broken)
    with pytest.raises(KeyError):
        edit(editor, noise_picture(), "blue", EditSettings(steps=1, resolution=48))
    assert [place.fp32_precision for place in places] == before


@pytest.mark.gpu
def test_tf32_is_asked_for(tiny_sd15: Path) -> None:
    settings = EditSettings(resolution=48)
    folder = tiny_sd15 / "target"
    exact, fast = (
        edit(
            load_editor(folder, device="cuda", dtype="float32", allow_tf32=allowed),
            noise_picture(),
            "blue",
            settings,
        ).latents
        for allowed in (False, True)
    )
    assert 0 < np.abs(exact - fast).max() < 0.1
