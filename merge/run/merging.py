"""The merge itself: every component's weights, written and hashed at once."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.background.file_digest import FileDigest
from merge.errors import DeviceMemoryError, EngineError
from merge.plan.memory import default_threads
from merge.plan.model import ComponentPlan
from merge.records.manifest import FileRecord
from merge.run.prepare import PreparedRun
from merge.writer.folder import OutputFolder
from merge.writer.journal import Journal, JournalMark
from merge.writer.tensors import TensorFileWriter

if TYPE_CHECKING:
    from merge.engine.execute import MergeResult
    from merge.engine.units import TensorState

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 1024 * 1024
# A killed run loses what lies between two checkpoints: a tenth of a second's work.
_CHECKPOINT_BYTES = 32 * 1024 * 1024


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
    prepared: PreparedRun,
    *,
    device: str,
    threads: int | None,
    journal: Journal,
    on_bytes: Callable[[int, int], None],
) -> MergedFiles:
    """Write the merged weights of every component.

    Args:
        folder: Where they go.
        prepared: What is merged.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers; None for the default.
        journal: Where what is final is written down, and what an earlier run wrote.
        on_bytes: Told the bytes written so far, and in all.

    Raises:
        EngineError: nothing changed, and the recipe does not allow that, or the merge failed.
    """
    from merge.engine.device import choose_device, device_words

    where = choose_device(device)
    merged = MergedFiles(device_words(where), threads or default_threads(str(where)))
    job = _Job(folder, prepared, where, device == "auto", merged, journal, on_bytes)
    results = [job.merge(component) for component in prepared.plan.components]
    check_results(prepared, results, merged.overflows)
    return merged


def qualified_overflows(
    prepared: PreparedRun, component: ComponentPlan, result: MergeResult
) -> dict[str, int]:
    """Return a component's replaced values under the keys' full names."""
    qualified, name = prepared.plan.family.qualified, component.name
    return {qualified(name, key): count for key, count in result.overflows.items()}


def check_results(
    prepared: PreparedRun, results: Sequence[MergeResult], overflows: Mapping[str, int]
) -> None:
    """Tell of values that a rule replaced, and refuse a merge that changed nothing."""
    recipe = prepared.recipe
    for key, count in overflows.items():
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


@dataclass
class _Job:
    folder: OutputFolder
    prepared: PreparedRun
    device: Any
    may_fall_back: bool
    merged: MergedFiles
    journal: Journal
    on_bytes: Callable[[int, int], None]
    _before: int = 0

    def merge(self, component: ComponentPlan) -> MergeResult:
        """Write one component, hashing it beside the merge."""
        path = self.folder.place(component.file_name)
        header = component.header_bytes(self.prepared.digest)
        total = component.out_header.file_bytes
        with TensorFileWriter(path, total, is_resumed=path.exists()) as writer:
            progress = _Progress(component, self.journal)
            finished, position = progress.check(writer, header)
            digest = FileDigest(writer.read_into, header, total, progress.write)

            def on_frontier(position: int, states: Sequence[TensorState]) -> None:
                finished.extend(states)
                digest.advance(position, is_marked=progress.note(position, finished))
                self.on_bytes(self._before + position, self.prepared.plan.merged_bytes)

            mark = time.perf_counter()
            try:
                digest.start()
                digest.advance(position)
                try:
                    result = self._execute(component, writer, on_frontier, tuple(finished))
                except DeviceMemoryError as error:
                    if not self.may_fall_back or self.device.type == "cpu":
                        raise
                    self._fall_back(error)
                    result = self._execute(component, writer, on_frontier, tuple(finished))
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
        self.merged.overflows |= qualified_overflows(self.prepared, component, result)
        return result

    def _execute(
        self,
        component: ComponentPlan,
        writer: TensorFileWriter,
        on_frontier: Callable[[int, Sequence[TensorState]], None],
        finished: Sequence[TensorState],
    ) -> MergeResult:
        from merge.engine.execute import execute_plan

        return execute_plan(
            self.prepared.plan,
            component,
            self.prepared.recipe,
            writer,
            device=self.device,
            threads=self.merged.workers,
            on_frontier=on_frontier,
            finished=finished,
        )

    def _fall_back(self, error: DeviceMemoryError) -> None:
        """Go on on the CPU: nobody asked for CUDA, and the bytes are the same."""
        from merge.engine.device import choose_device

        _LOG.warning("%s; going on on the CPU, with the same bytes", error.message)
        self.device = choose_device("cpu")
        self.merged.device += ", then cpu"

    def _lap(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.merged.seconds[stage] = self.merged.seconds.get(stage, 0.0) + now - since
        return now


class _Progress:
    """How far one component is, in the journal."""

    def __init__(self, component: ComponentPlan, journal: Journal) -> None:
        self._component = component
        self._journal = journal
        self._pending: dict[int, JournalMark] = {}
        self._tensors = 0
        self._position = 0

    def check(self, writer: TensorFileWriter, header: bytes) -> tuple[list[TensorState], int]:
        """Hash what an earlier run wrote; return what it found out and where to go on."""
        from merge.engine.units import TensorState

        states: list[TensorState] = []
        digest = hashlib.sha256(header)
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        position = len(header)
        for checkpoint in self._journal.checkpoints:
            if checkpoint.file != self._component.file_name:
                continue
            if not position <= checkpoint.position <= writer.size_bytes:
                break
            while position < checkpoint.position:
                part = buffer[: min(_CHUNK_BYTES, checkpoint.position - position)]
                writer.read_into(part, position)
                digest.update(part)
                position += len(part)
            if digest.hexdigest() != checkpoint.sha256:
                # Lost with the machine, or changed: everything from here on is written again.
                break
            tensors = self._component.tensors[len(states) : checkpoint.tensors]
            states += [
                TensorState(
                    0,
                    tensor.key not in checkpoint.unchanged,
                    checkpoint.overflows.get(tensor.key, 0),
                )
                for tensor in tensors
            ]
            self._tensors, self._position = checkpoint.tensors, checkpoint.position
        if states:
            _LOG.info("%d tensors of %s are there", len(states), self._component.file_name)
        return states, self._position

    def note(self, position: int, states: Sequence[TensorState]) -> bool:
        """Remember a checkpoint now and then; True when its digest is wanted."""
        is_last = len(states) == len(self._component.tensors)
        if position - self._position < _CHECKPOINT_BYTES and not is_last:
            return False
        found = [
            (tensor.key, state)
            for tensor, state in zip(
                self._component.tensors[self._tensors : len(states)],
                states[self._tensors :],
                strict=True,
            )
            if tensor.is_merged
        ]
        self._pending[position] = JournalMark(
            self._component.file_name,
            len(states),
            position,
            "",
            tuple(key for key, state in found if not state.changed),
            {key: state.overflows for key, state in found if state.overflows},
        )
        self._tensors, self._position = len(states), position
        return True

    def write(self, position: int, sha256: str) -> None:
        """Write a checkpoint down, now that its bytes were read back and hashed."""
        self._journal.add(dataclasses.replace(self._pending.pop(position), sha256=sha256))
