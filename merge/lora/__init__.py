"""LoRA files: what their keys mean, and the delta that they stand for."""

from merge.lora.parse import LoraModule, LoraTable, is_lora, parse_lora

__all__ = ["LoraModule", "LoraTable", "is_lora", "parse_lora"]
