"""What a weight file is beside its numbers: how they are stored, and what the model predicts.

Told by names, shapes, dtypes and metadata alone.
"""

from merge.kinds.average import AVERAGE_PREFIX, PLAIN_PREFIX, averaged_keys
from merge.kinds.foreign import foreign_kind, is_controlnet
from merge.kinds.prediction import EDM, Prediction, is_marker, stated_prediction
from merge.kinds.quantized import FLOAT8, Quantized, find_scales
from merge.kinds.wrappers import unwrapped

__all__ = [
    "AVERAGE_PREFIX",
    "EDM",
    "FLOAT8",
    "PLAIN_PREFIX",
    "Prediction",
    "Quantized",
    "averaged_keys",
    "find_scales",
    "foreign_kind",
    "is_controlnet",
    "is_marker",
    "stated_prediction",
    "unwrapped",
]
