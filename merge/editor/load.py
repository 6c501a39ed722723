"""Load a checkpoint for editing: diffusers' components, from a folder that needs no other file."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge.editor.settings import EditSettings, outside_range
from merge.editor.weights import Tensors, build_network
from merge.editor.whole import check_file, check_folder
from merge.errors import CheckpointError, DeviceError, SourceNotFoundError
from merge.family.model import Family
from merge.family.registry import editing_families
from merge.json_files import read_json
from merge.records.folder import MANIFEST_NAME

_LOG = logging.getLogger(__name__)
_DTYPES = ("float16", "bfloat16", "float32")
_SCHEDULERS = ("lcm", "own")


@dataclass(frozen=True, eq=False)
class Editor:
    """A loaded checkpoint.

    Attributes:
        pipeline: The diffusers pipeline; only its components are used.
        family: The first architecture that the pipeline edits with.
        folder: Where it was loaded from.
        device: Where the components are.
        is_compiled: True when the UNet is compiled by its first edit of each size.
        allows_tf32: True when float32 on a GPU may be TF32.
    """

    pipeline: Any
    family: Family
    folder: Path
    device: torch.device
    is_compiled: bool = False
    allows_tf32: bool = False

    @property
    def has_added_conditions(self) -> bool:
        """Return True where the UNet also takes the pooled text and the sizes of pictures."""
        return self.family.has_added_conditions

    @property
    def is_lcm(self) -> bool:
        """Return True where the scheduler is LCMScheduler."""
        return type(self.pipeline.scheduler).__name__ == "LCMScheduler"

    @property
    def vae_scale_factor(self) -> int:
        """Return the pixels per latent along a side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """Return what the sides of a picture are rounded to, in pixels."""
        return math.lcm(8, self.vae_scale_factor)

    @property
    def default_resolution(self) -> int:
        """Return what the model was trained at, in pixels along the short side."""
        size = self.pipeline.unet.config.sample_size or 64
        side = size if isinstance(size, int) else min(size)
        return int(side * self.pipeline.vae_scale_factor)

    @property
    def trained_steps(self) -> int:
        """Return num_train_timesteps of the scheduler."""
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    def use_scheduler(self, config: Mapping[str, Any]) -> None:
        """Take another scheduler.

        Args:
            config: Contents of a `scheduler_config.json`, with its class.

        Raises:
            CheckpointError: diffusers has no such class, or it does not take these values.
        """
        self.pipeline.scheduler = load_scheduler(config)

    def use_lcm(self) -> None:
        """Put LCMScheduler in place of another scheduler, with the same configuration."""
        import diffusers

        config = self.pipeline.scheduler.config
        self.pipeline.scheduler = diffusers.LCMScheduler.from_config(config)

    def warnings_for(self, settings: EditSettings) -> list[str]:
        """Return a line for each setting outside the range that was found to work."""
        return list(outside_range(settings, self.family, self.default_resolution))

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that time can be taken."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def move(self, values: torch.Tensor) -> torch.Tensor:
        """Move a CPU tensor to the device without waiting for it."""
        if self.device.type == "cuda":
            # Only from pinned memory does the copy run beside the host.
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


def load_scheduler(config: Mapping[str, Any]) -> Any:
    """Return a scheduler of diffusers.

    Args:
        config: Contents of a `scheduler_config.json`, with its class.

    Raises:
        CheckpointError: diffusers has no such class, or it does not take these values.
    """
    import diffusers

    name = str(config.get("_class_name"))
    try:
        with warnings.catch_warnings():
            # Of the libraries about one another.
            warnings.simplefilter("ignore")
            return getattr(diffusers, name).from_config(dict(config))
    except (AttributeError, TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"the scheduler {name} does not load: {error}") from error


def load_editor(
    folder: str | Path,
    *,
    config: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    scheduler: str = "lcm",
    compile_unet: bool = False,
    allow_tf32: bool = False,
    weights: Mapping[str, Tensors] | None = None,
) -> Editor:
    """Load an exported folder or single file for editing.

    The safety checker of the checkpoint, if it has one, is not loaded: it paints pictures black,
    which a check of a merge would take for a broken one.

    Args:
        folder: A diffusers InstructPix2Pix pipeline, or a single LDM/SGM file; nothing is
            downloaded.
        config: For a single file the pipeline folder with its tokenizers and configs.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto` (float16 on a GPU, float32 on the CPU), `float16`, `bfloat16`, `float32`.
        scheduler: `lcm`: LCMScheduler, in place of another unless the folder is an export of this
            tool, which keeps what its recipe wrote. `own`: the folder's, whatever it is.
        compile_unet: Let torch compile the UNet in the first edit of each picture size and batch,
            on CUDA with CUDA graphs. That takes a minute or more; pictures then differ by rounding.
        allow_tf32: Let a GPU multiply float32 numbers in TF32, with ten bits of fraction: faster,
            and pictures differ by more than rounding. Nothing to float16 and bfloat16.
        weights: Component to its tensors, of those that a folder has no weight files of.

    Raises:
        SourceNotFoundError: there is no such pipeline.
        CheckpointError: it is not an InstructPix2Pix pipeline, or does not load.
        DeviceError: there is no such device.
        ValueError: `scheduler` is neither of the two.
    """
    if scheduler not in _SCHEDULERS:
        raise ValueError(f"scheduler {scheduler!r} is not one of {', '.join(_SCHEDULERS)}")
    folder = Path(folder)
    where = edit_device(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "float16"
    if dtype not in _DTYPES:
        raise DeviceError(f"{dtype!r} is no dtype to edit in", hint=f"use {', '.join(_DTYPES)}")
    configs = _config_folder(folder, config)
    index = _read_index(configs)
    family = _pipeline_family(configs, index)
    if folder.is_file():
        check_file(folder, configs)
    else:
        check_folder(folder, index)
    networks = {
        name: build_network(folder / name, index[name], tensors, getattr(torch, dtype))
        for name, tensors in (weights or {}).items()
    }
    pipeline = _load_pipeline(folder, configs, family, getattr(torch, dtype), networks)
    _check_channels(folder, pipeline)
    editor = Editor(pipeline, family, folder, where, compile_unet, allow_tf32)
    is_export = (configs / MANIFEST_NAME).is_file()
    if scheduler == "lcm" and not is_export and not editor.is_lcm:
        name = type(pipeline.scheduler).__name__
        _LOG.warning("%s has %s: edits use LCMScheduler", folder, name)
        editor.use_lcm()
    vae = pipeline.vae
    if family.overflows_vae and vae.dtype == torch.float16 and vae.config.force_upcast:
        # Once here instead of twice in every edit.
        vae.to(torch.float32)
    try:
        pipeline.to(where)
        if where.type == "cuda":
            # The layout that its convolutions are written for.
            pipeline.unet.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)
        if compile_unet:
            compile_model(pipeline.unet, where)
        return editor
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{where} has too little memory for {folder}", hint="use --device cpu"
        ) from error


def compile_model(model: torch.nn.Module, device: torch.device) -> None:
    """Let torch compile a model when it is called first, in place."""
    # Graphs take away the launches of kernels; sizes are few, so each may have its own.
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    model.compile(mode=mode, fullgraph=True, dynamic=False)


def _config_folder(checkpoint: Path, config: str | Path | None) -> Path:
    """Return the folder with the configs: a single file needs one beside it."""
    if not checkpoint.is_file():
        return checkpoint
    if config is None:
        raise SourceNotFoundError(
            f"{checkpoint} is a single file, which has no tokenizers and configs",
            hint="name a pipeline folder that has them with --config",
        )
    return Path(config)


def _load_pipeline(
    folder: Path,
    configs: Path,
    family: Family,
    dtype: torch.dtype,
    networks: Mapping[str, Any],
) -> Any:
    import diffusers

    diffusers.logging.disable_progress_bar()
    extra = {**family.pipeline_options, **networks}
    try:
        with warnings.catch_warnings():
            # Of the libraries about one another, such as a scheduler's about numpy.
            warnings.simplefilter("ignore")
            pipeline = getattr(diffusers, family.pipeline_class)
            if folder.is_file():
                # Without `config` an 8-channel SDXL file would be taken for a plain one.
                return pipeline.from_single_file(
                    str(folder),
                    config=str(configs),
                    torch_dtype=dtype,
                    local_files_only=True,
                    **extra,
                )
            return pipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **extra)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error


def _check_channels(folder: Path, pipeline: Any) -> None:
    """Refuse a UNet that does not take noisy latents and picture side by side."""
    channels = pipeline.unet.config.in_channels
    wanted = 2 * pipeline.vae.config.latent_channels
    if channels != wanted:
        raise CheckpointError(
            f"{folder}: its UNet has {channels} input channels, not {wanted}",
            hint="an InstructPix2Pix UNet takes the picture's latents beside the noisy ones; "
            "a plain one cannot edit",
        )


def edit_device(name: str) -> torch.device:
    """Return the device that a name stands for: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        DeviceError: there is no such device here.
    """
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            raise DeviceError("there is no MPS device here", hint="use --device cpu")
        return torch.device("mps")
    from merge.engine.device import choose_device

    return choose_device(name)


def _read_index(folder: Path) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise SourceNotFoundError(
            f"{folder} is no pipeline folder: it has no model_index.json",
            hint="an output of `instruct-merge run` with a whole pipeline as target is one",
        )
    return read_json(index)


def _pipeline_family(folder: Path, index: Mapping[str, Any]) -> Family:
    name, known = index.get("_class_name"), editing_families()
    if name not in known:
        raise CheckpointError(
            f"{folder} is a {name}, not an InstructPix2Pix pipeline",
            hint=f"model_index.json must name {' or '.join(known)}",
        )
    return known[str(name)]
