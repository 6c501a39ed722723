"""LoRA files: what their keys mean, and the delta that they stand for."""

from merge.lora.delta import delta_rows, dora_delta_columns, dora_delta_rows, row_steps
from merge.lora.families import foreign_family
from merge.lora.metadata import CONFIG_NAME
from merge.lora.module import AdapterModule, AdapterTable
from merge.lora.parse import parse_adapters
from merge.lora.roles import has_magnitudes, is_lora

__all__ = [
    "CONFIG_NAME",
    "AdapterModule",
    "AdapterTable",
    "delta_rows",
    "dora_delta_columns",
    "dora_delta_rows",
    "foreign_family",
    "has_magnitudes",
    "is_lora",
    "parse_adapters",
    "row_steps",
]
