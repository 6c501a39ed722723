"""The target's own pictures of the same edits, at its own steps and at the merged model's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.background.closable import Closable
from merge.background.digest_process import DigestProcess
from merge.editor.batches import edit
from merge.editor.load import Editor, load_editor
from merge.editor.settings import EditSettings
from merge.errors import RecipeError, SourceError, SourceNotFoundError
from merge.recipe.schema import ModelRef, Models, Recipe
from merge.records.folder import OutputRecords
from merge.sources.resolve import resolve_sources
from merge.verify.model import ComparedTarget, CompareOptions, EditRow, Picture
from merge.verify.references import ReferenceCache, cache_folder, reference_key

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII
)


def find_target(model: str) -> ComparedTarget:
    """Turn the model of `--compare` into files of this disk, downloading what is missing.

    Args:
        model: A pipeline folder, or `org/name[@revision]`; a folder that exists comes first.

    Raises:
        SourceError: there is no such model, or it is no whole pipeline.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        ref = ModelRef(path=str(folder.absolute()))
    elif match := _HUB_ID.fullmatch(model):
        ref = ModelRef(repo=match["repo"], revision=match["revision"])
    else:
        raise SourceNotFoundError(
            f"--compare: there is no folder {model}, and it is no Hub id of the form org/name"
        )
    try:
        sources = resolve_sources(Recipe("compare", Models(target=ref, distilled=[])))
    except (SourceError, RecipeError) as error:
        error.message = f"--compare: {error.message.removeprefix('models.target: ')}"
        raise
    found = sources.target
    if found.pipeline is None:
        raise SourceNotFoundError(
            f"--compare: {model} is no pipeline folder, so it cannot edit",
            hint="name the folder or the repository that has model_index.json",
        )
    parts = [file for component in found.pipeline.components for file in component.files]
    files = {file.name: file.path for file in (*found.main_files, *parts)}
    index = found.root / "model_index.json"
    scheduler = found.root / "scheduler" / "scheduler_config.json"
    files |= {path.relative_to(found.root).as_posix(): path for path in (index, scheduler)}
    weights = tuple(file.path for file in found.main_files)
    return ComparedTarget(found.label, found.commit, found.root, weights, files)


def compare_options(
    folder: Path,
    model: str,
    steps: int | None = None,
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    *,
    cache: bool = True,
) -> CompareOptions:
    """Return how a target makes its pictures: as is said, or else as the output's recipe has it.

    Args:
        folder: The output.
        model: The target, as for `CompareOptions`.
        steps: Of its own scheduler; None: the recipe's.
        guidance_scale: Likewise.
        image_guidance_scale: Likewise.
        cache: As for `CompareOptions`.
    """
    verify = (OutputRecords(folder).recipe or {}).get("verify")
    known = verify.get("compare") if isinstance(verify, dict) else None
    usual = CompareOptions(model)

    def number(said: float | None, name: str) -> Any:
        # A lock is a file that anybody can write to.
        found = known.get(name) if isinstance(known, dict) else None
        default = getattr(usual, name)
        kinds = int if isinstance(default, int) else (int, float)
        is_number = isinstance(found, kinds) and not isinstance(found, bool)
        return said if said is not None else found if is_number else default

    return CompareOptions(
        model,
        number(steps, "steps"),
        number(guidance_scale, "guidance_scale"),
        number(image_guidance_scale, "image_guidance_scale"),
        cache,
    )


class Comparison(Closable):
    """Makes the target's pictures, or takes those that were kept.

    Its files are hashed in a process of their own from the moment it is made.
    """

    def __init__(self, options: CompareOptions) -> None:
        self.options = options
        self.target = find_target(options.model)
        self._names = sorted(name for name, path in self.target.files.items() if path.is_file())
        self._process: DigestProcess | None = None
        if options.cache:
            self._process = DigestProcess([self.target.files[name] for name in self._names])

    def run(
        self,
        rows: Sequence[EditRow],
        settings: EditSettings,
        device: str,
        device_words: str,
        on_picture: Callable[[], None],
    ) -> list[EditRow]:
        """Return the rows with the target's pictures.

        Args:
            rows: What was edited; pictures that the target is to edit are their sources.
            settings: Of the merged model, with the resolution.
            device: As for `load_editor`.
            device_words: Kind of device and dtype.
            on_picture: Called after each picture.
        """
        own = dataclasses.replace(
            settings,
            steps=self.options.steps,
            guidance_scale=self.options.guidance_scale,
            image_guidance_scale=self.options.image_guidance_scale,
            timesteps=None,
        )
        digests: Mapping[str, str] = {}
        if self._process is not None:
            found = self._process.result(lambda count: None)
            digests = dict(zip(self._names, found, strict=True))
        maker = _Maker(self.target.root, digests, device, device_words, on_picture)
        done = []
        # Row by row would switch the scheduler back and forth.
        targets = [maker.make(row, own, "own") for row in rows]
        few = [maker.make(row, row.edit.settings(settings, row.seed), "lcm") for row in rows]
        for row, target, target_few in zip(rows, targets, few, strict=True):
            pictures = {**row.pictures, "target": target, "target_few": target_few}
            done.append(dataclasses.replace(row, pictures=pictures))
        return done

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process is not None:
            self._process.close()


@dataclass(slots=True)
class _Maker:
    """Makes pictures with the target, which is loaded when the first one is not kept."""

    root: Path
    digests: Mapping[str, str]
    device: str
    device_words: str
    on_picture: Callable[[], None]
    editor: Editor | None = None

    def make(self, row: EditRow, settings: EditSettings, scheduler: str) -> Picture:
        chosen = dataclasses.replace(settings, seed=row.seed)
        instruction = row.edit.instruction
        cache = ReferenceCache(cache_folder()) if self.digests else None
        key = reference_key(
            self.digests, row.source, instruction, chosen, scheduler, self.device_words
        )
        picture = cache.get(key, chosen, scheduler) if cache is not None else None
        if picture is None:
            result = edit(self._load(scheduler), row.source, instruction, chosen)
            picture = Picture.of(result, scheduler)
            if cache is not None:
                cache.put(key, picture)
        self.on_picture()
        return picture

    def _load(self, scheduler: str) -> Editor:
        if self.editor is None:
            self.editor = load_editor(self.root, device=self.device, scheduler="own")
        if scheduler == "lcm" and not self.editor.is_lcm:
            # Loading the model again for another scheduler would read gigabytes.
            self.editor.use_lcm()
        return self.editor
