"""The delta of a recipe as a LoRA: randomised SVD per layer, and how far it is off."""

from merge.extract.extraction import DEFAULT_MAX_RANK, DEFAULT_RANK, DTYPES, extract_lora
from merge.extract.factor import Factors, factor_delta
from merge.extract.model import BlockError, ExtractedLayer, ExtractResult, LeftOutDelta
from merge.extract.names import FORMS
from merge.extract.report import extraction_to_json, render_extraction

__all__ = [
    "DEFAULT_MAX_RANK",
    "DEFAULT_RANK",
    "DTYPES",
    "FORMS",
    "BlockError",
    "ExtractResult",
    "ExtractedLayer",
    "Factors",
    "LeftOutDelta",
    "extract_lora",
    "extraction_to_json",
    "factor_delta",
    "render_extraction",
]
