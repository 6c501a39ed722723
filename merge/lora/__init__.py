"""LoRA files: what their keys mean, and the delta that they stand for."""

from merge.lora.delta import delta_rows, dora_delta_rows, row_steps
from merge.lora.module import AdapterModule, AdapterTable
from merge.lora.parse import parse_adapters
from merge.lora.roles import has_magnitudes, is_lora

__all__ = [
    "AdapterModule",
    "AdapterTable",
    "delta_rows",
    "dora_delta_rows",
    "has_magnitudes",
    "is_lora",
    "parse_adapters",
    "row_steps",
]
