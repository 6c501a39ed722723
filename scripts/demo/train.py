"""Train the demo's models from nothing and write them as ordinary diffusers folders.

    python scripts/demo/train.py                                   # large, on a GPU, ten minutes
    python scripts/demo/train.py --preset overnight --processes 2  # as large, on two CPU cores
    python scripts/demo/train.py --preset small --processes 2      # in an hour on two CPU cores
    python scripts/demo/train.py --preset small --fraction 0.01 --work work   # all, in a minute

Stages: vae, base, target, distilled, lora; see presets.py for which of them a preset has. A
finished stage is kept in the work folder and not run again, so an interrupted run goes on where it
stopped. export.py then writes recipes/demo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import world
from checks import Check
from distil import train_distilled, train_lora
from presets import PRESETS
from training import (
    EMPTY,
    Noise,
    Optimizer,
    Run,
    draw_text_to_image,
    draw_tile_mask,
    load_text,
    load_vae,
    relative_norm,
    v_loss,
)
from world import TRAINING_SEED, VALIDATION_SEED

ROOT = Path(__file__).resolve().parents[2]


def train_vae(run: Run) -> None:
    """Train the autoencoder on pictures of the world, a slight pull towards unit latents."""
    schedule = run.schedule("vae")
    vae = models.make_vae().to(run.device)
    optimizer = Optimizer(list(vae.parameters()), schedule, ema=0.995)
    rng = np.random.default_rng([TRAINING_SEED, run.rank])
    held_out = world.render(world.sample_scenes(np.random.default_rng(VALIDATION_SEED), 256))
    with run.curve("vae") as curve:
        for step in range(schedule.steps):
            pictures = world.render(world.sample_scenes(rng, run.batch))
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(run.device) * 2 - 1
            latent = vae.encode(x).latent_dist
            error = torch.nn.functional.mse_loss(vae.decode(latent.sample()).sample, x)
            loss = error + 1e-4 * latent.kl().mean() / (4 * models.LATENT**2)
            optimizer.step(loss, step)
            if (step + 1) % 250 == 0 and run.rank == 0:
                with optimizer.averaged():
                    latents = models.to_latents(vae, held_out)
                    back = models.to_pictures(vae, latents)
                curve.add(
                    step + 1,
                    loss=loss.item(),
                    held_out_rms=float(np.sqrt(np.square(back - held_out).mean())),
                    held_out_right=float(_sprites_right(held_out, back)),
                    latent_std=latents.std().item(),
                )
    with optimizer.averaged():
        latents = models.to_latents(vae, held_out)
        # Published factors have five digits; float32's own would not survive JSON any better.
        scale = round(1 / latents.std().item(), 5)
        run.save("vae", {"vae": vae.state_dict(), "scale": scale})


def _sprites_right(pictures: np.ndarray, back: np.ndarray) -> float:
    shape = (-1, world.GRID, world.TILE, world.GRID, world.TILE, 3)
    error = np.square(pictures - back).reshape(shape).mean((2, 4, 5))
    return float((np.sqrt(error).max((1, 2)) < world.RIGHT_BELOW).mean())


def train_base(run: Run) -> None:
    """Train text encoder and denoiser on captions and instruction-like sentences.

    Half of the time the denoiser also sees some tiles of the picture that it is to make, in four
    more input channels. The base is what remains without these channels; the target starts with
    them, so it has to learn what instructions mean but not how to copy.
    """
    schedule = run.schedule("base")
    vae, scale = load_vae(run)
    tokenizer = models.make_tokenizer(run.work / "tokenizer")
    text_encoder = models.make_text_encoder(len(tokenizer)).to(run.device)
    unet = run.make_unet(8)
    optimizer = Optimizer([*unet.parameters(), *text_encoder.parameters()], schedule)
    pool = run.pool(run.preset.pool)
    noise = Noise(run.device)
    check = Check(run, vae, scale)
    generator = run.generator(0)
    with run.curve("base") as curve:
        mean = 0.0
        for step in range(schedule.steps):
            clean, rows = draw_text_to_image(pool, run.batch, generator)
            hint = clean * draw_tile_mask(run.batch, generator).to(run.device)
            unique, inverse = rows.unique(return_inverse=True)
            context = text_encoder(pool.texts[unique])[0][inverse]
            loss = v_loss(unet, noise, clean * pool.scale, hint, context, generator)
            optimizer.step(loss, step)
            mean += loss.item() / 100
            if (step + 1) % 100 == 0:
                values = {"loss": mean}
                mean = 0.0
                if (step + 1) % 1500 == 0 and run.rank == 0:
                    with optimizer.averaged():
                        small = run.make_unet(4)
                        small.load_state_dict(models.cut_image_channels(unet.state_dict()))
                        values |= check.text_to_image(small, text_encoder, tokenizer)
                curve.add(step + 1, **values)
    with optimizer.averaged():
        run.save("base", {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()})


def train_target(run: Run) -> None:
    """Fine-tune the denoiser on edits at a small rate; the text encoder stays as it is."""
    schedule = run.schedule("target")
    vae, scale = load_vae(run)
    text_encoder, tokenizer = load_text(run)
    unet = run.make_unet(8)
    start = run.load("base")["unet"]
    unet.load_state_dict(start)
    optimizer = Optimizer(list(unet.parameters()), schedule)
    pool = run.pool(run.preset.pool)
    noise = Noise(run.device)
    check = Check(run, vae, scale)
    generator = run.generator(10)
    with torch.no_grad():
        context = text_encoder(pool.texts)[0]
    with run.curve("target") as curve:
        mean = 0.0
        for step in range(schedule.steps):
            index = torch.randint(len(pool), (run.batch,), generator=generator)
            rows = pool.instruction[index]
            image = pool.source[index]
            # Without the text, the image or both, 5 % each, as InstructPix2Pix was trained.
            lot = torch.rand(run.batch, generator=generator).to(run.device)
            rows = torch.where((lot < 0.05) | (lot > 0.95), EMPTY, rows)
            image = image * ((lot >= 0.05) & (lot < 0.1) | (lot > 0.95)).logical_not().view(
                -1, 1, 1, 1
            )
            clean = pool.outcome[index] * pool.scale
            loss = v_loss(unet, noise, clean, image, context[rows], generator)
            optimizer.step(loss, step)
            mean += loss.item() / 100
            if (step + 1) % 100 == 0:
                values = {"loss": mean}
                mean = 0.0
                if (step + 1) % 1500 == 0 and run.rank == 0:
                    with optimizer.averaged():
                        values |= check.edits(unet, text_encoder, tokenizer)
                        values["drift"] = relative_norm(unet.state_dict(), start)
                curve.add(step + 1, **values)
    with optimizer.averaged():
        run.save("target", {"unet": unet.state_dict()})


STAGES: dict[str, Callable[[Run], None]] = {
    "vae": train_vae,
    "base": train_base,
    "target": train_target,
    "distilled": train_distilled,
    "lora": train_lora,
}


def work_folder(preset: str) -> Path:
    """Return where a preset keeps its stages when nothing else is named."""
    return ROOT / "outputs" / "demo-training" / preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="large")
    parser.add_argument("--work", type=Path, help="default: outputs/demo-training/PRESET")
    parser.add_argument(
        "--stage", choices=list(STAGES), action="append", help="default: all of the preset's"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="on a CPU, one thread each")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps and the data")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    arguments.work = arguments.work or work_folder(arguments.preset)
    if preset.is_paced and (arguments.device == "cpu" or arguments.processes > 1):
        parser.error(
            f"--preset {arguments.preset} trains for minutes on one GPU; on a CPU the same models "
            "need --preset overnight"
        )
    missing = set(arguments.stage or ()) - set(preset.budgets)
    if missing:
        parser.error(f"--preset {arguments.preset} has no stage {', '.join(sorted(missing))}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.processes == 1:
        _train(0, arguments)
    else:
        torch.multiprocessing.spawn(_train, (arguments,), nprocs=arguments.processes)


def _train(rank: int, arguments: argparse.Namespace) -> None:
    if arguments.device == "cpu":
        # A second thread costs more than it gives as soon as the machine does anything else.
        torch.set_num_threads(1)
    else:
        # Ten bits are enough for training, and several times as fast.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if arguments.processes > 1:
        store = dist.FileStore(str(arguments.work / f".store-{os.getppid()}"), arguments.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.processes)
    preset = PRESETS[arguments.preset]
    run = Run(
        arguments.work, arguments.device, preset, rank, arguments.processes, arguments.fraction
    )
    for stage in arguments.stage or preset.budgets:
        torch.manual_seed(TRAINING_SEED)
        if not run.path(stage).exists():
            STAGES[stage](run)
        if arguments.processes > 1:
            dist.barrier()


if __name__ == "__main__":
    main()
