"""Merges that stay in memory: the bytes that a run would write, and their digests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.background.file_digest import FileDigest
from merge.errors import DeviceMemoryError
from merge.plan.memory import default_threads
from merge.plan.model import ComponentPlan
from merge.records.manifest import FileRecord
from merge.run.merging import check_results, qualified_overflows
from merge.run.prepare import PreparedRun
from merge.writer.tensors import MemoryFile

if TYPE_CHECKING:
    from merge.engine.execute import MergeResult
    from merge.engine.units import TensorState

_LOG = logging.getLogger(__name__)


def merge_in_memory(
    prepared: PreparedRun, *, device: str = "auto", threads: int | None = None
) -> Mapping[str, memoryview]:
    """Merge the weights of every component into memory.

    Args:
        prepared: What is merged.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers; None for the default.

    Returns:
        Name of the file in an output to its bytes, the same as `run_recipe` writes.

    Raises:
        EngineError: nothing changed, and the recipe does not allow that, or the merge failed.
    """
    merger = MemoryMerger(device, threads)
    merger.merge(prepared)
    return merger.data


@dataclass
class MemoryMerger:
    """Merges one set of values after the other into the same memory.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Workers; None for the default.
        files: Size and digest of the files that were merged last, by their names in an output.
    """

    device: str = "auto"
    threads: int | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    _memory: dict[str, MemoryFile] = field(default_factory=dict)

    @property
    def data(self) -> Mapping[str, memoryview]:
        """Return the bytes of what was merged last; the next merge writes over them."""
        return {name: self._memory[name].data for name in self.files}

    def merge(self, prepared: PreparedRun, on_bytes: Callable[[int], None] | None = None) -> None:
        """Merge the weights of every component, hashing them beside.

        Args:
            prepared: What is merged.
            on_bytes: Told the bytes that are final since the last call, from any thread.

        Raises:
            EngineError: nothing changed, and the recipe does not allow that, or the merge failed.
        """
        from merge.engine.device import choose_device

        where = choose_device(self.device)
        self.files = {}
        results: list[MergeResult] = []
        overflows: dict[str, int] = {}
        for component in prepared.plan.components:
            try:
                result = self._merge_component(prepared, component, where, on_bytes)
            except DeviceMemoryError as error:
                if self.device != "auto" or where.type == "cpu":
                    raise
                _LOG.warning("%s; merging on the CPU, with the same bytes", error.message)
                self.device, where = "cpu", choose_device("cpu")
                result = self._merge_component(prepared, component, where, on_bytes)
            results.append(result)
            overflows |= qualified_overflows(prepared, component, result)
        check_results(prepared, results, overflows)

    def _merge_component(
        self,
        prepared: PreparedRun,
        component: ComponentPlan,
        where: Any,
        on_bytes: Callable[[int], None] | None,
    ) -> MergeResult:
        from merge.engine.execute import execute_plan

        name, size = component.file_name, component.out_header.file_bytes
        file = self._memory.get(name)
        if file is None or file.data.nbytes != size:
            # The old one first, so that there are never two.
            self._memory.pop(name, None)
            file = self._memory[name] = MemoryFile(size)
        header = component.header_bytes(prepared.digest)
        digest = FileDigest(file.read_into, header, size)
        told = 0

        def on_frontier(position: int, states: Sequence[TensorState]) -> None:
            nonlocal told
            digest.advance(position)
            if on_bytes is not None:
                on_bytes(position - told)
                told = position

        try:
            digest.start()
            result = execute_plan(
                prepared.plan,
                component,
                prepared.recipe,
                file,
                device=where,
                threads=self.threads or default_threads(str(where)),
                on_frontier=on_frontier,
            )
            digest.advance(size)
            sha256 = digest.result()
        finally:
            digest.stop()
        file.write(memoryview(header), 0)
        self.files[name] = FileRecord(size, sha256)
        return result
