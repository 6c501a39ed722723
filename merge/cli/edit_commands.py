"""`edit`."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.edit_targets import EditTarget, check_outputs, folder_targets, image_targets
from merge.cli.options import (
    PATH,
    STEPS,
    check_scale,
    choice_option,
    command,
    edit_device_option,
    json_option,
)
from merge.cli.output import Bars, is_quiet, print_json, remark, silence_libraries
from merge.errors import ImageError, MergeError, OutputError, VerificationError, list_first

if TYPE_CHECKING:
    from PIL.Image import Image

    from merge.editor.load import Editor
    from merge.editor.result import EditRequest, EditResult
    from merge.editor.settings import EditSettings

_LOG = logging.getLogger("merge.cli")
_BAR = "verify"  # the stage whose word is "editing"


def _scale(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    return check_scale(value)


def _timesteps(
    ctx: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    if text is None:
        return None
    from merge.recipe.validate import TIMESTEPS_RULE, are_timesteps

    try:
        steps = tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter("must be integers such as 999,749,499,249") from None
    if not are_timesteps(steps):
        raise click.BadParameter(TIMESTEPS_RULE)
    return steps


@command(
    "edit",
    'edit outputs/demo photo.jpg "make it winter"',
    'edit outputs/demo photo.jpg "make it winter" -o out.png --seed 3 --guidance-scale 1.5',
    'edit outputs/demo photo.jpg "make it winter" --seed 0 --seed 1 --seed 2',
    'edit outputs/demo --images photos "make it winter" -o photos-in-winter --batch-size 4',
    'edit outputs/demo --images photos "make it winter" --device cuda --compile',
)
@click.argument("checkpoint", type=PATH)
@click.argument("words", nargs=-1, metavar="[IMAGE] INSTRUCTION")
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="PNG; with --images the folder for them. Default: IMAGE-edit.png or FOLDER-edit in the "
    "current folder.",
)
@click.option(
    "--images", "folder", type=PATH, help="Edit every picture in this folder instead of IMAGE."
)
@click.option("--steps", default=4, type=click.IntRange(1), help="LCM steps.")
@click.option("--guidance-scale", default=2.0, callback=_scale, help="Of the instruction, 1 to 3.")
@click.option(
    "--image-guidance-scale", default=1.0, callback=_scale, help="Of the picture; 1 is off."
)
@click.option(
    "--seed",
    "seeds",
    default=(0,),
    multiple=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Of the noise; give it again for more pictures of each.",
)
@click.option(
    "--resolution",
    type=click.IntRange(8, 8192),
    help="Short side in pixels; default: what the model was trained at.",
)
@click.option(
    "--original-inference-steps",
    default=50,
    type=STEPS,
    help="Length of the LCM schedule that --steps are picked from.",
)
@click.option(
    "--timesteps",
    callback=_timesteps,
    help="Explicit timesteps such as 999,749,499,249 instead of --steps.",
)
@click.option(
    "--batch-size",
    default=1,
    type=click.IntRange(1, 1024),
    help="Pictures of one size that go through the model together.",
)
@edit_device_option
@choice_option(
    "--dtype",
    ["auto", "float16", "bfloat16", "float32"],
    help="auto: float16 on a GPU, float32 on the CPU.",
)
@click.option(
    "--tf32",
    is_flag=True,
    help="Let a GPU multiply float32 numbers in TF32: faster, with ten bits of fraction.",
)
@click.option(
    "--compile",
    "compile_unet",
    is_flag=True,
    help="Compile the UNet first, with CUDA graphs on a GPU: a minute for each picture size, then "
    "faster. For many pictures.",
)
@click.option(
    "--config",
    type=PATH,
    help="For a single file: the pipeline folder with its tokenizers and configs.",
)
@click.option("--overwrite", is_flag=True, help="Replace output pictures.")
@json_option
def edit_command(
    checkpoint: Path,
    words: tuple[str, ...],
    output: Path | None,
    folder: Path | None,
    config: Path | None,
    seeds: tuple[int, ...],
    batch_size: int,
    device: str,
    dtype: str,
    tf32: bool,
    compile_unet: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Edit IMAGE as INSTRUCTION says, with an exported CHECKPOINT, in a few steps.

    CHECKPOINT is a pipeline folder, or a single file together with --config.

    Every PNG holds its instruction and settings in its text chunks. The last line on stdout is the
    picture that was written, or with --images the folder. A file there that is no picture is named
    and left out; the exit code is then 4.
    """
    if options["timesteps"] is not None:
        options["steps"] = len(options["timesteps"])
    elif options["steps"] > options["original_inference_steps"]:
        raise click.BadParameter(
            f"{options['steps']} is more than --original-inference-steps "
            f"({options['original_inference_steps']})",
            param_hint="'--steps'",
        )
    image, instruction = _parse_words(words, folder)
    # The same seed twice would write the same file twice.
    seeds = tuple(dict.fromkeys(seeds))
    if folder is not None:
        targets = folder_targets(folder, output or Path(f"{folder.resolve().name}-edit"), seeds)
    else:
        assert image is not None
        targets = image_targets(image, output or Path(f"{image.stem}-edit.png"), seeds)
    check_outputs(targets, overwrite=overwrite)
    silence_libraries()
    from merge.editor.load import load_editor
    from merge.editor.pictures import load_image
    from merge.editor.settings import EditSettings

    settings = EditSettings(seed=seeds[0], **options)
    # A wrong picture is said before the model is loaded.
    picture = load_image(image) if image is not None else None
    editor = load_editor(
        checkpoint,
        config=config,
        device=device,
        dtype=dtype,
        compile_unet=compile_unet,
        allow_tf32=tf32,
    )
    for line in editor.warnings_for(settings):
        _LOG.warning("%s", line)
    work = _Work(editor, settings, instruction, targets, picture)
    work.run(batch_size)
    work.report(as_json=as_json, last=targets[-1].output.parent if folder is not None else None)


def _parse_words(words: Sequence[str], folder: Path | None) -> tuple[Path | None, str]:
    """Return IMAGE, if there must be one, and INSTRUCTION."""
    wanted = 2 if folder is None else 1
    if folder is not None and len(words) == 2:
        raise click.UsageError("IMAGE and --images are both given: choose one")
    if folder is None and len(words) == 1:
        raise click.UsageError(
            "an IMAGE and an INSTRUCTION are needed, and one of them is missing (or --images)"
        )
    if not words:
        raise click.UsageError("Missing argument 'INSTRUCTION'.")
    if len(words) > wanted:
        raise click.UsageError(f"too many words ({len(words)}): put the instruction in quotes")
    if not words[-1].strip():
        raise click.UsageError('the instruction is empty: say what to change, "make it winter"')
    return (Path(words[0]) if folder is None else None), words[-1]


@dataclass
class _Work:
    """The pictures of one command: those made, and those that could not be.

    Attributes:
        picture: IMAGE, read already; None where there is a folder, whose pictures are read one by
            one.
        pending: What was asked of the editor and is not made yet.
        failures: Picture to what is wrong with it.
        rows: What is told of each picture that was made.
    """

    editor: Editor
    settings: EditSettings
    instruction: str
    targets: Sequence[EditTarget]
    picture: Image | None
    pending: deque[EditTarget] = field(default_factory=deque)
    failures: dict[Path, MergeError] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, batch_size: int) -> None:
        from merge.editor.batches import edit_many

        alone = len(self.targets) == 1
        with Bars(quiet=is_quiet()) as bars:
            results = edit_many(
                self.editor,
                self.requests(),
                self.settings,
                batch_size=batch_size,
                on_step=(lambda done, total: bars(_BAR, done, total)) if alone else None,
            )
            for done, result in enumerate(results, 1):
                self.keep(self.pending.popleft(), result)
                if not alone:
                    bars(_BAR, done, len(self.targets))

    def requests(self) -> Iterator[EditRequest]:
        from merge.editor.pictures import fit_size, load_image
        from merge.editor.result import EditRequest

        resolution = self.settings.resolution or self.editor.default_resolution
        for path, targets in itertools.groupby(self.targets, lambda target: target.image):
            try:
                picture = self.picture or load_image(path)
                fit_size(picture.size, resolution, self.editor.size_multiple)
            except ImageError as error:
                self.fail(path, error)
                continue
            for target in targets:
                self.pending.append(target)
                yield EditRequest(picture, self.instruction, target.seed)

    def keep(self, target: EditTarget, result: EditResult) -> None:
        from merge.editor.png import save_png

        if result.non_finite_count:
            error = VerificationError(
                f"the edited picture has {result.non_finite_count} values that are not finite",
                hint="try --dtype float32; if that does not help, the checkpoint is damaged",
            )
            self.fail(target.image, error)
            return
        try:
            target.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{target.output.parent} cannot be made: {error.strerror or error}"
            ) from error
        save_png(result.to_pil(), target.output, result.settings, self.instruction)
        self.rows.append(_describe(target, self.instruction, result))

    def fail(self, path: Path, error: MergeError) -> None:
        if self.picture is not None:
            raise error
        if path not in self.failures:
            name = "" if str(path) in error.message else f"{path}: "
            _LOG.warning("left out: %s%s", name, error.message)
            self.failures[path] = error

    def report(self, *, as_json: bool, last: Path | None) -> None:
        if as_json:
            print_json(self.rows)
        elif self.rows:
            remark(self.summary())
            paths = [last] if last is not None else [row["output"] for row in self.rows]
            for path in paths:
                click.echo(path)
        if self.failures:
            errors = list(self.failures.values())
            kinds = {type(error) for error in errors}
            kind = VerificationError if VerificationError in kinds else ImageError
            count = len({target.image for target in self.targets})
            raise kind(
                f"{len(errors)} of {count} pictures could not be edited: "
                f"{list_first(list(self.failures))}",
                hint=errors[0].hint,
            )

    def summary(self) -> str:
        row, *others = self.rows
        what = f"{len(self.rows)} pictures" if others else f"{row['width']} x {row['height']} px"
        unet_rows = sum(row["unet_rows"] for row in self.rows)
        seconds = sum(row["time_s"] for row in self.rows)
        return f"{what}, {self.settings.steps} steps, {unet_rows} UNet rows, {seconds:.1f} s"


def _describe(target: EditTarget, instruction: str, result: EditResult) -> dict[str, Any]:
    stages = asdict(result.stages)
    return {
        "image": str(target.image),
        "instruction": instruction,
        "seed": result.settings.seed,
        "output": str(target.output),
        "width": result.source.width,
        "height": result.source.height,
        "unet_rows": result.unet_rows,
        "time_s": round(result.seconds, 3),
        "stages_s": {name.removesuffix("_s"): round(time, 3) for name, time in stages.items()},
    }
