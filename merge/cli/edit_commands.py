"""`edit`."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import click

from merge.cli.output import (
    common_options,
    examples,
    is_quiet,
    json_option,
    print_json,
    silence_libraries,
)

_LOG = logging.getLogger("merge.cli")


@click.command(
    "edit",
    epilog=examples(
        'edit outputs/demo photo.jpg "make it winter"',
        'edit outputs/demo photo.jpg "make it winter" -o out.png --seed 3 --guidance-scale 1.5',
    ),
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("instruction")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="PNG; default: IMAGE-edit.png in the current folder.",
)
@click.option("--steps", default=4, show_default=True, type=int, help="LCM steps.")
@click.option(
    "--guidance-scale", default=2.0, show_default=True, help="Of the instruction, 1 to 3."
)
@click.option(
    "--image-guidance-scale", default=1.0, show_default=True, help="Of the picture; 1 is off."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option(
    "--resolution",
    type=click.IntRange(8, 8192),
    help="Short side in pixels; default: what the model was trained at.",
)
@click.option(
    "--original-inference-steps", default=50, show_default=True, type=click.IntRange(1, 1000)
)
@click.option("--timesteps", help="Explicit timesteps such as 999,749,499,249 instead of --steps.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    help="auto: float16 on a GPU, float32 on the CPU.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output picture.")
@json_option
@common_options
def edit_command(
    checkpoint: Path,
    image: Path,
    instruction: str,
    output: Path | None,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    seed: int,
    resolution: int | None,
    original_inference_steps: int,
    timesteps: str | None,
    device: str,
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Edit IMAGE as INSTRUCTION says, with an exported CHECKPOINT folder, in a few steps.

    The last line on stdout is the picture that was written.
    """
    from merge.errors import OutputExistsError, VerificationError

    output = output or Path(f"{image.stem}-edit.png")
    if output.exists() and not overwrite:
        raise OutputExistsError(
            f"{output} exists already", hint="add --overwrite, or choose another with -o"
        )
    chosen = _parse_timesteps(timesteps)
    silence_libraries()
    from merge.editor import EditSettings, edit, load_editor, load_image, save_png

    settings = EditSettings(
        steps=len(chosen) if chosen else steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        seed=seed,
        resolution=resolution,
        original_inference_steps=original_inference_steps,
        timesteps=chosen,
    )
    picture = load_image(image)
    editor = load_editor(checkpoint, device=device, dtype=dtype)
    for line in editor.warnings_for(settings):
        _LOG.warning("%s", line)
    result = edit(editor, picture, instruction, settings)
    if result.non_finite_count:
        raise VerificationError(
            f"the edited picture has {result.non_finite_count} values that are not finite",
            hint="try --dtype float32; if that does not help, the checkpoint is damaged",
        )
    save_png(result.to_pil(), output, settings, instruction)
    if as_json:
        print_json(_describe(output, result))
        return
    if not is_quiet():
        click.echo(
            f"{result.source.width} x {result.source.height} px, {settings.steps} steps, "
            f"{result.unet_rows} UNet rows, {result.seconds:.1f} s",
            err=True,
        )
    click.echo(output)


def _parse_timesteps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        steps = tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter("must be integers such as 999,749,499,249") from None
    falling = all(a > b for a, b in itertools.pairwise(steps))
    if not steps or not falling or not all(0 <= step < 1000 for step in steps):
        raise click.BadParameter("must fall strictly, within 999 to 0")
    return steps


def _describe(output: Path, result: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "width": result.source.width,
        "height": result.source.height,
        "unet_rows": result.unet_rows,
        "time_s": round(result.seconds, 3),
    }
