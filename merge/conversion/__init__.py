"""Models moved between the two layouts: a diffusers folder and one LDM/SGM file.

Tensors are renamed, fused, split and turned in a stream; no value changes and no model is loaded.
"""

from merge.conversion.configs import check_configs, read_configs
from merge.conversion.directions import LAYOUTS, convert
from merge.conversion.metadata import component_metadata, single_file_metadata
from merge.conversion.model import ConvertResult, WrittenFile

__all__ = [
    "LAYOUTS",
    "ConvertResult",
    "WrittenFile",
    "check_configs",
    "component_metadata",
    "convert",
    "read_configs",
    "single_file_metadata",
]
