"""The merge itself: every component's weights, written and hashed at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.digest import FileDigest
from merge.errors import EngineError
from merge.manifest import FileRecord
from merge.plan import ComponentPlan, MergePlan, default_threads
from merge.recipe import Recipe
from merge.writer import OutputFolder, TensorFileWriter

if TYPE_CHECKING:
    from merge.engine.execute import MergeResult

_LOG = logging.getLogger(__name__)


@dataclass
class MergedFiles:
    """The merged weight files of a run.

    Attributes:
        files: Name in the output to size and digest.
        overflows: Key to the number of values that a rule replaced.
        device: Where they were merged, in words.
        workers: By how many threads.
        seconds: Wall time of `merge`, `hash_output` and `fsync`.
    """

    device: str
    workers: int
    files: dict[str, FileRecord] = field(default_factory=dict)
    overflows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def merge_components(
    folder: OutputFolder,
    plan: MergePlan,
    recipe: Recipe,
    digest: str,
    *,
    device: str,
    threads: int | None,
    on_bytes: Callable[[int, int], None],
) -> MergedFiles:
    """Write the merged weights of every component.

    Args:
        folder: Where they go.
        plan: What to do.
        recipe: For its overflow rule and `allow_noop`.
        digest: The recipe's, for the headers.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers; None for the default.
        on_bytes: Told the bytes written so far, and in all.

    Raises:
        EngineError: nothing changed, and the recipe does not allow that, or the merge failed.
    """
    from merge.engine import choose_device, device_words

    where = choose_device(device)
    merged = MergedFiles(device_words(where), threads or default_threads(str(where)))
    job = _Job(folder, plan, recipe, digest, where, merged, on_bytes)
    results = [job.merge(component) for component in plan.components]
    for key, count in merged.overflows.items():
        _LOG.warning(
            "%s: %d values were too large for its dtype (on_overflow=%s)",
            key,
            count,
            recipe.on_overflow,
        )
    total = sum(result.merged for result in results)
    unchanged = sum(len(result.unchanged) for result in results)
    if total and unchanged == total and not recipe.allow_noop:
        raise EngineError(
            "the merge changes nothing: the delta of every tensor is zero",
            hint="are base and distilled the same model? allow_noop=true permits it",
        )
    if unchanged:
        _LOG.info("%d tensors have a delta of zero and stay as they are", unchanged)
    return merged


@dataclass
class _Job:
    folder: OutputFolder
    plan: MergePlan
    recipe: Recipe
    digest: str
    device: Any
    merged: MergedFiles
    on_bytes: Callable[[int, int], None]
    _before: int = 0

    def merge(self, component: ComponentPlan) -> MergeResult:
        """Write one component, hashing it beside the merge."""
        from merge.engine import execute_plan

        path = self.folder.partial / component.file_name
        path.parent.mkdir(exist_ok=True)
        header = component.header_bytes(self.digest)
        total = component.out_header.file_bytes
        with TensorFileWriter(path, total) as writer:
            digest = FileDigest(writer.read_into, header, total)

            def on_frontier(position: int) -> None:
                digest.advance(position)
                self.on_bytes(self._before + position, self.plan.merged_bytes)

            mark = time.perf_counter()
            try:
                result = execute_plan(
                    self.plan,
                    component,
                    self.recipe,
                    writer,
                    device=self.device,
                    threads=self.merged.workers,
                    on_frontier=on_frontier,
                )
                mark = self._lap("merge", mark)
                sha256 = digest.result()
                mark = self._lap("hash_output", mark)
            except BaseException:
                digest.stop()
                raise
            writer.finish(header)
            self._lap("fsync", mark)
        self._before += total
        self.merged.files[component.file_name] = FileRecord(total, sha256)
        prefix = "" if component.name == "unet" else f"{component.name}."
        self.merged.overflows |= {prefix + key: n for key, n in result.overflows.items()}
        return result

    def _lap(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.merged.seconds[stage] = self.merged.seconds.get(stage, 0.0) + now - since
        return now
