"""Run the workers of a merge and collect what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from merge.background.workers import Workers
from merge.engine.block_worker import BlockWorker, OutOfRangeError
from merge.engine.device import device_errors, single_threaded
from merge.engine.units import TensorState, Unit, WorkQueue, cut_units
from merge.plan.memory import CPU_BLOCK_ELEMENTS, CUDA_BLOCK_ELEMENTS
from merge.plan.model import ComponentPlan, MergePlan
from merge.reader.checkpoint import FileReader
from merge.recipe.schema import Recipe
from merge.writer.tensors import TensorSink


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did.

    Attributes:
        merged: Tensors that something was added to.
        unchanged: Keys whose delta turned out to be zero; they are the target's.
        overflows: Key to the number of values that a rule replaced.
        seconds: Wall time of the workers.
    """

    merged: int
    unchanged: tuple[str, ...]
    overflows: dict[str, int]
    seconds: float


def execute_plan(
    plan: MergePlan,
    component: ComponentPlan,
    recipe: Recipe,
    writer: TensorSink,
    *,
    device: torch.device,
    threads: int,
    on_frontier: Callable[[int, Sequence[TensorState]], None],
    finished: Sequence[TensorState] = (),
) -> MergeResult:
    """Compute every tensor of a component and write it; the header is left to the caller.

    Results do not depend on the device or on `threads`.

    Args:
        plan: For its files and its method.
        component: Rows in the order of the output file.
        recipe: For its overflow rule.
        writer: The output file.
        device: CPU or CUDA.
        threads: Workers; each has its own buffers.
        on_frontier: Told, from any worker, up to which byte the file is final, and what was found
            out about the tensors that became final since the last call.
        finished: What an earlier run found out about the first tensors, which it wrote.

    Raises:
        NonFiniteError: an input or a result is not finite, or out_dtype cannot hold it.
        DeviceMemoryError: the device has too little memory.
        DeviceError: it failed otherwise.
        IntegrityError: an input changed while it was read.
    """
    started = time.perf_counter()
    done = len(finished)
    units = [unit for unit in cut_units(component.tensors) if unit.tensor >= done]
    states = [*finished, *(TensorState(0) for _ in component.tensors[done:])]
    for unit in units:
        states[unit.tensor].units_left += 1
    ends = [spec.start + spec.size_bytes for spec in component.out_header.tensors]

    def report(position: int, before: int, after: int) -> None:
        on_frontier(position, states[before:after])

    queue = WorkQueue(units, states, ends, report, done)
    block = CUDA_BLOCK_ELEMENTS if device.type == "cuda" else CPU_BLOCK_ELEMENTS
    with ExitStack() as stack:
        readers = [stack.enter_context(FileReader(f.path, f.stamp)) for f in plan.files]
        with single_threaded(), device_errors(device):
            workers = [
                BlockWorker(
                    plan, component, readers, writer, device, block, recipe.on_overflow, number
                )
                for number in range(min(threads, max(1, len(units))))
            ]
            _run_workers(workers, queue)
        for reader, file in zip(readers, plan.files, strict=True):
            reader.check_unchanged(file.stamp)
    merged = [
        (tensor, state)
        for tensor, state in zip(component.tensors, states, strict=True)
        if tensor.is_merged
    ]
    unchanged = tuple(tensor.key for tensor, state in merged if not state.changed)
    overflows = {tensor.key: state.overflows for tensor, state in merged if state.overflows}
    return MergeResult(len(merged), unchanged, overflows, time.perf_counter() - started)


def _run_workers(workers: list[BlockWorker], queue: WorkQueue) -> None:
    failures: list[tuple[Unit, BlockWorker, BaseException]] = []

    def work(worker: BlockWorker) -> None:
        for unit in queue.take():
            try:
                _run_unit(worker, unit, queue)
            except BaseException as error:
                failures.append((unit, worker, error))
                queue.stop()

    threads = Workers(len(workers), "merge")
    try:
        wait([threads.submit(work, worker) for worker in workers])
    finally:
        # On Ctrl-C the files stay open until every worker has left its block; leaving while one
        # computes would crash the interpreter.
        queue.stop()
        threads.end()
    if failures:
        # The first failure in file order, so that the message does not depend on the threads.
        unit, worker, error = min(failures, key=lambda item: (item[0].tensor, item[0].start))
        raise worker.diagnose(unit.tensor) if isinstance(error, OutOfRangeError) else error


def _run_unit(worker: BlockWorker, unit: Unit, queue: WorkQueue) -> None:
    state = queue.states[unit.tensor]
    worker.run(unit, state)
    if queue.is_last(unit):
        if worker.has_delta(unit.tensor) and not state.changed:
            worker.keep(unit.tensor, state)
        queue.finish_tensor(unit.tensor)
