"""How large the engine's buffers are: decided here, so that a plan can tell the peak."""

from __future__ import annotations

import os
from collections.abc import Sequence

from merge.methods.model import Method
from merge.methods.table import METHODS
from merge.plan.model import MergePlan, TensorPlan

MIB = 1024 * 1024
# Elements of one block on the CPU: few enough that inputs, float32 scratch and output stay in a
# core's cache, enough that the interpreter's part of a block does not count. Measured with two
# threads, 64Ki and 128Ki were slower by half and a fifth, 512Ki about the same.
CPU_BLOCK_ELEMENTS = 256 * 1024
# Rows of a LoRA's product that are made at once, in elements: with half of them the merge was
# slower by a tenth, with a quarter by a third; twice as many gain nothing.
PRODUCT_ELEMENTS = 2 * MIB
# On a GPU a block has to be worth a kernel launch and a transfer.
CUDA_BLOCK_ELEMENTS = 2 * MIB
# One unit of work: long enough for the disk to stream, short enough to share out evenly.
UNIT_ELEMENTS = 4 * MIB
# Interpreter, torch and this package, measured with torch 2.13 for the CPU.
IMPORT_BYTES = 260 * MIB
# Hashing buffers, the plan itself and the allocator's slack.
FIXED_BYTES = 24 * MIB

# More workers than this only wait for each other: the interpreter's part of a block is a tenth of
# its time, and fewer saturate a disk.
_MAX_CPU_THREADS = 8
_CUDA_WORKERS = 4


def default_threads(device: str = "cpu") -> int:
    """Return how many workers are used when the user does not say."""
    if device.startswith("cuda"):
        return _CUDA_WORKERS
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_CPU_THREADS)
    return min(os.cpu_count() or 1, _MAX_CPU_THREADS)


def panel_elements(rank: int, columns: int) -> int:
    """Return the elements of a LoRA's `down` once it is packed in panels of eight columns."""
    return rank * -(-columns // 8) * 8


def block_elements(tensors: Sequence[TensorPlan], plain_block: int) -> int:
    """Return the largest block that a worker handles, in elements."""
    rows = (tensor.row_elements for tensor in tensors if tensor.is_by_row)
    return max(plain_block, max(rows, default=0))


def worker_bytes(plan: MergePlan, plain_block: int) -> int:
    """Return the memory of one worker's buffers on the CPU: staging, scratch and what grows."""
    block = block_elements(plan.tensors, plain_block)
    staging, scratch = 4 * block, 3 * 4 * block
    method = METHODS[plan.method]
    return staging + scratch + max((_grown(t, block, method) for t in plan.tensors), default=0)


def _grown(tensor: TensorPlan, block: int, method: Method) -> int:
    """Return the memory that one tensor needs beside the fixed blocks."""
    if not tensor.is_merged:
        return 0
    total = tensor.target.element_count
    largest = max(PRODUCT_ELEMENTS, block) if tensor.loras else block
    count = total if tensor.is_whole else min(largest, total)
    factors = sum(ref.element_count for term in tensor.loras for ref in term.refs)
    if any(term.base is not None for term in tensor.loras):
        factors += count
    # Where sums are compiled, a lone LoRA has a second copy of a factor instead of its product, and
    # a product where a value is too large.
    products = max(2 * count, count + factors) if tensor.loras else 0
    floats = 0
    if tensor.is_whole:
        deltas = len(tensor.deltas) + len(tensor.loras)
        floats = count * (method.arrays + method.arrays_per_delta * deltas)
    linear = sum(
        term.linear.target.element_count + term.embedding.element_count for term in tensor.bakes
    )
    return 8 * (factors + products + linear) + 4 * floats


def peak_bytes(plan: MergePlan, threads: int) -> int:
    """Return the expected peak memory of a merge on the CPU, whatever the models' size."""
    return IMPORT_BYTES + FIXED_BYTES + threads * worker_bytes(plan, CPU_BLOCK_ELEMENTS)
