"""Time an edit by the loop of this tool against diffusers' own pipeline, with the same weights.

    python scripts/bench/edit.py                                  # half width, 256 px, five pairs
    python scripts/bench/edit.py --size 512 --pairs 3
    python scripts/bench/edit.py --device cuda --dtype float16 --width 320 --size 512

The model has random weights in the proportions of Stable Diffusion 1.5; `--width 320` is its size.
All sides edit the same picture with the same seed, in turn in one process and in swapped order
from pair to pair, and what they make is compared. Guidance 2 and image guidance 1, where diffusers
evaluates three UNet rows a step and two count: no loop can be more than 1.5 times as fast.

    ours, stock   this tool's loop, and diffusers' pipeline at the same settings
    compiled      ours with a compiled UNet, on CUDA with CUDA graphs (with --compile)
    stock-50      diffusers' pipeline with 50 steps, as without a distilled model: once
    seeds         eight seeds of one picture: what is encoded once is shared; time per picture

    loop          from the first step to the last, which is where the rows are saved
    end to end    with the text encoder and the VAE, whose shares and FLOPs are shown
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Python puts this script's folder first, where `merge` would be another script.
sys.path[0] = str(ROOT)
# This folder's own modules.
sys.path.insert(1, str(Path(__file__).resolve().parent))

import diffusers  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from merge.editor.batches import edit, edit_many  # noqa: E402
from merge.editor.load import (  # noqa: E402
    Editor,
    compile_model,
)
from merge.editor.result import EditRequest  # noqa: E402
from merge.editor.settings import EditSettings  # noqa: E402

INSTRUCTION = "make it a rainy evening in autumn"
# Nine tenths of what the numbers of rows allow: 12 against 8, and 150 against 8.
LOOP_AIM, LONG_AIM = 1.35, 16.9
SEEDS = 8
STAGES = ("text_s", "encode_s", "denoise_s", "decode_s")


Side = Callable[[Editor, Image.Image, EditSettings], tuple[dict[str, float], np.ndarray]]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    editor = build_editor(options)
    settings = EditSettings(
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        image_guidance_scale=options.image_guidance_scale,
        resolution=options.size,
    )
    picture = make_picture(options.size)
    sides: dict[str, Side] = {"ours": run_ours, "stock": run_stock}
    if options.compile:
        compiled = compile_copy(editor)
        sides["compiled"] = lambda _, *arguments: run_ours(compiled, *arguments)
    pictures = {side: run(editor, picture, settings)[1] for side, run in sides.items()}
    for image in pictures.values():
        check_picture(image)
    differences = {
        side: float(np.abs(image - pictures["stock"]).max())
        for side, image in pictures.items()
        if side != "stock"
    }
    if editor.pipeline.unet.dtype == torch.float32 and not max(differences.values()) <= 1 / 255:
        raise SystemExit(f"the pictures differ by {differences}")
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for pair in range(options.pairs):
        for side in list(sides)[:: 1 if pair % 2 else -1]:
            print(f"pair {pair + 1}/{options.pairs}: {side}", file=sys.stderr)
            rows[side].append(sides[side](editor, picture, settings)[0])
    print("once: stock-50, seeds", file=sys.stderr)
    long = dataclasses.replace(settings, steps=50)
    rows["stock-50"] = [run_stock(editor, picture, long)[0]]
    rows["seeds"] = [run_seeds(editor, picture, settings)]
    work = count_flops(editor, picture, settings)
    print_tables(rows, differences, work)
    write_results(options, rows, differences, work)


def make_picture(size: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=160, help="of the UNet, a multiple of 32")
    parser.add_argument("--size", type=int, default=256, help="of the picture, in pixels")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--image-guidance-scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="add a compiled UNet")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    return parser.parse_args()


def build_editor(options: argparse.Namespace) -> Editor:
    """Make a pipeline of random weights; every part is as wide as the UNet, relatively."""
    from scripts.make_tiny import make_sd15

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_sd15(Path(folder))
        tokenizer = transformers.CLIPTokenizer.from_pretrained(Path(folder, "target", "tokenizer"))
    width = options.width
    text_width = max(64, 768 * width // 320 // 64 * 64)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=12,
            num_attention_heads=text_width // 64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=text_width,
        attention_head_dim=8,
    )
    vae_width = max(32, 128 * width // 320 // 32 * 32)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.18215,
    )
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    device = torch.device(options.device)
    calibrate(Editor(pipeline.to(device), ROOT, device), options)
    if options.dtype != "float32":
        pipeline.to(getattr(torch, options.dtype))
    return Editor(pipeline.to(device), ROOT, device)


def calibrate(editor: Editor, options: argparse.Namespace) -> None:
    """Scale random weights so that an edit gives a picture of middling values.

    As they are drawn, latents grow to tens within four steps, and the decoder's output is all
    black and white: float16 then differs from anything by a whole pixel.
    """
    pipeline = editor.pipeline
    for name, module in [*pipeline.unet.named_modules(), *pipeline.vae.named_modules()]:
        # The ends of residual branches, which would add up from block to block.
        if name.endswith(("conv2", "to_out.0", "ff.net.2", "proj_out")):
            module.weight.data *= 0.1
    picture = make_picture(min(options.size, 64))
    settings = EditSettings(steps=options.steps, resolution=min(options.size, 64))
    latents = edit(editor, picture, INSTRUCTION, settings).latents
    pipeline.vae.register_to_config(scaling_factor=float(np.std(latents)))
    with torch.inference_mode():
        scaled = torch.from_numpy(latents)[None].to(editor.device) / float(np.std(latents))
        spread = float(pipeline.vae.decode(scaled).sample.std())
    pipeline.vae.decoder.conv_out.weight.data *= 0.3 / spread


def check_picture(image: np.ndarray) -> None:
    """Refuse a comparison that would mean nothing."""
    saturated = float(((image <= 0) | (image >= 1)).mean())
    if not np.isfinite(image).all() or saturated > 0.05:
        raise SystemExit(f"the picture is no picture: {saturated:.0%} of its values are cut off")


# The sides -------------------------------------------------------------------------------------


def run_ours(
    editor: Editor, picture: Image.Image, settings: EditSettings
) -> tuple[dict[str, float], np.ndarray]:
    started = time.perf_counter()
    result = edit(editor, picture, INSTRUCTION, settings)
    total = time.perf_counter() - started
    stages = {name: getattr(result.stages, name) for name in STAGES}
    row = {"total_s": total, "loop_s": stages["denoise_s"], "unet_rows": result.unet_rows}
    return {**row, **stages}, result.image


def run_stock(
    editor: Editor, picture: Image.Image, settings: EditSettings
) -> tuple[dict[str, float], np.ndarray]:
    pipeline = editor.pipeline
    times: list[float] = []
    unet_rows: list[int] = []

    def before(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if not times:
            editor.synchronize()
            times.append(time.perf_counter())
        unet_rows.append(len(inputs[0]))

    def after(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == settings.steps - 1:
            editor.synchronize()
            times.append(time.perf_counter())
        return {}

    handle = pipeline.unet.register_forward_pre_hook(before)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = pipeline(
            INSTRUCTION,
            image=picture,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="np",
            callback_on_step_end=after,
        ).images[0]
    total = time.perf_counter() - started
    handle.remove()
    row = {"total_s": total, "loop_s": times[1] - times[0], "unet_rows": sum(unet_rows)}
    return row, image


def run_seeds(editor: Editor, picture: Image.Image, settings: EditSettings) -> dict[str, float]:
    """Edit one picture with some seeds, one after the other; return means."""
    requests = [EditRequest(picture, INSTRUCTION, seed) for seed in range(SEEDS)]
    started = time.perf_counter()
    results = list(edit_many(editor, requests, settings))
    total = time.perf_counter() - started
    stages = {name: sum(getattr(r.stages, name) for r in results) / SEEDS for name in STAGES}
    row = {"total_s": total / SEEDS, "loop_s": stages["denoise_s"]}
    return {**row, "unet_rows": results[0].unet_rows, **stages}


def compile_copy(editor: Editor) -> Editor:
    """Return the editor with a compiled UNet of its own."""
    pipeline = copy.copy(editor.pipeline)
    pipeline.unet = copy.deepcopy(editor.pipeline.unet)
    compile_model(pipeline.unet, editor.device)
    return dataclasses.replace(editor, pipeline=pipeline, is_compiled=True)


def count_flops(editor: Editor, picture: Image.Image, settings: EditSettings) -> dict[str, float]:
    """Return the floating point operations of a UNet row and of the VAE's halves."""
    parts = {"unet": editor.pipeline.unet, "encode": editor.pipeline.vae.encoder}
    parts["decode"] = editor.pipeline.vae.decoder
    found = dict.fromkeys(parts, 0.0)
    handles = []
    with FlopCounterMode(display=False) as counter:
        begun: list[int] = []
        for name, module in parts.items():

            def before(*_: Any) -> None:
                begun.append(counter.get_total_flops())

            def after(*_: Any, name: str = name) -> None:
                found[name] += counter.get_total_flops() - begun.pop()

            handles += [module.register_forward_pre_hook(before)]
            handles += [module.register_forward_hook(after)]
        rows = edit(editor, picture, INSTRUCTION, settings).unet_rows
    for handle in handles:
        handle.remove()
    found["unet"] /= rows
    return found


# Tables ----------------------------------------------------------------------------------------


def median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def ratios(rows: dict[str, list[dict[str, float]]]) -> list[tuple[str, list[float], str]]:
    def pairs(side: str, name: str) -> list[float]:
        both = zip(rows["stock"], rows[side], strict=True)
        return [stock[name] / ours[name] for stock, ours in both]

    found = []
    for side in ("ours", "compiled"):
        if side in rows:
            aim = f"  aim: at least {LOOP_AIM}" if side == "ours" else ""
            found.append((f"stock / {side}, loop", pairs(side, "loop_s"), aim))
            found.append((f"stock / {side}, end to end", pairs(side, "total_s"), ""))
    loop, total = (
        [rows["stock-50"][0][name] / median(rows["ours"], name)] for name in ("loop_s", "total_s")
    )
    found.append(("stock of 50 steps / ours, loop", loop, f"  aim: at least {LONG_AIM}"))
    found.append(("stock of 50 steps / ours, end to end", total, ""))
    shared = [median(rows["ours"], "total_s") / rows["seeds"][0]["total_s"]]
    return [*found, ("one seed / each of eight, end to end", shared, "")]


def print_tables(
    rows: dict[str, list[dict[str, float]]],
    differences: dict[str, float],
    flops: dict[str, float],
) -> None:
    print(f"{'side':<10}{'loop s':>9}{'min':>8}{'max':>8}{'end to end s':>14}{'UNet rows':>11}")
    for side, runs in rows.items():
        loop = [run["loop_s"] for run in runs]
        print(
            f"{side:<10}{statistics.median(loop):>9.3f}{min(loop):>8.3f}{max(loop):>8.3f}"
            f"{median(runs, 'total_s'):>14.3f}{median(runs, 'unet_rows'):>11.0f}"
        )
    stages = {name: median(rows["ours"], name) for name in STAGES}
    whole = sum(stages.values())
    print("\nour stages, median s and share")
    print("".join(f"{name.removesuffix('_s'):>14}" for name in stages))
    print("".join(f"{value:>8.3f}{value / whole:>6.0%}" for value in stages.values()))
    amounts = (None, flops["encode"], flops["unet"] * rows["ours"][0]["unet_rows"], flops["decode"])
    shown = ("" if amount is None else f"{amount / 1e9:.0f} GFLOP" for amount in amounts)
    print("".join(f"{text:>14}" for text in shown))
    print()
    for name, found, aim in ratios(rows):
        shown = ", ".join(f"{value:.2f}" for value in found)
        print(f"{name:<38}{statistics.median(found):>7.2f}   ({shown}){aim}")
    for side, difference in differences.items():
        print(f"largest difference of the pictures, {side} and stock: {difference:.1e}")


def write_results(
    options: argparse.Namespace,
    rows: dict[str, list[dict[str, float]]],
    differences: dict[str, float],
    flops: dict[str, float],
) -> None:
    name = "edit" if options.device == "cpu" else f"edit-{options.device.split(':')[0]}"
    settings = ("width", "size", "steps", "guidance_scale", "image_guidance_scale", "threads")
    tree = {
        "machine": machine.machine_facts(options.device, ("torch", "diffusers")),
        "settings": {
            **{name: getattr(options, name) for name in settings},
            "device": options.device,
            "dtype": options.dtype,
        },
        "ratios": {name: found for name, found, _ in ratios(rows)},
        "picture_differences": differences,
        "flops": flops,
        "runs": rows,
    }
    machine.write_results(name, tree, options.out)


if __name__ == "__main__":
    main()
