"""`convert`: which way, and what is checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge.conversion.model import ConvertResult, Options, Progress
from merge.conversion.to_file import convert_to_file
from merge.conversion.to_folder import convert_to_folder
from merge.errors import CheckpointError, SourceError, SourceNotFoundError

LAYOUTS = ("diffusers", "single-file")
_SUFFIX = ".safetensors"
_PICKLE_HINT = "--allow-pickle reads it, without running anything of it"


def convert(
    source: str | Path,
    out: str | Path,
    layout: str | None = None,
    *,
    config: str | Path | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    ema: str | bool = "auto",
    exclude: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> ConvertResult:
    """Move a model between a diffusers folder and a single LDM (SD1.5) or SGM (SDXL) file.

    Bytes are copied in a stream and no value changes; a round trip gives the same tensors. The
    output appears complete or not at all.

    Args:
        source: A pipeline folder or a single file; nothing is downloaded.
        out: A new folder, or a new `.safetensors` file.
        layout: `diffusers` or `single-file`; None to go by the suffix of `out`.
        config: For a single file the pipeline folder of the same architecture whose tokenizers,
            scheduler and configs go into the new folder.
        overwrite: Replace an existing file, or a folder that an earlier conversion wrote.
        allow_pickle: Also read `.ckpt` and `.bin` files, without running anything of them.
        ema: Whether a file's moving average is taken in the place of its UNet's plain weights:
            True, False, or `auto`, which takes it where it is whole.
        exclude: Globs of keys of a single file that belong to no part of it and are left out.
        on_progress: Called with `convert`, the bytes written and the bytes in all.

    Raises:
        SourceError: a file cannot be had, or the input has that layout already.
        CheckpointError: a key is unknown or cannot be said in the other layout, or the configs are
            those of another model.
        OutputError: the output exists, or cannot be written.
        ValueError: `layout` is none of the two.
    """
    source, out = Path(source), Path(out)
    if layout is None:
        layout = "single-file" if out.suffix == _SUFFIX else "diffusers"
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if not source.exists():
        raise SourceNotFoundError(f"there is no file or folder {source}")
    if source.is_dir() == (layout == "diffusers"):
        raise SourceError(
            f"{source} is a {'folder' if source.is_dir() else 'single file'} already",
            hint="a folder becomes a single file (OUT.safetensors), and a single file a folder",
        )
    if layout == "single-file" and out.suffix != _SUFFIX:
        raise SourceError(f"the single file {out} must have a name that ends in {_SUFFIX}")
    if layout == "single-file" and config is not None:
        raise SourceError(
            "--config is for single files that become folders",
            hint="leave it out: a folder has its own configs",
        )
    if layout == "diffusers" and config is None:
        raise SourceNotFoundError(
            f"{source} is a single file, which has no tokenizers and configs",
            hint="name a pipeline folder of the same architecture with --config",
        )
    options = Options(overwrite, allow_pickle, ema, exclude, on_progress)
    try:
        if config is None:
            return convert_to_file(source, out, options)
        return convert_to_folder(source, out, Path(config), options)
    except (CheckpointError, SourceError) as error:
        if "allow_pickle" in error.hint:
            # Other commands take it from a recipe.
            error.hint = _PICKLE_HINT
        raise
