"""Key names: which architecture keys belong to, and translations between spellings.

Every translation is a table plus one function that checks it to be one-to-one.
"""

from merge.keymap.architecture import (
    CONV_IN,
    GUIDANCE_EMBEDDING,
    UNetArchitecture,
    detect_unet,
)
from merge.keymap.blocks import block_order, is_block_name, unet_blocks
from merge.keymap.one_to_one import one_to_one
from merge.keymap.pairs import KeyPair
from merge.keymap.single_file import (
    SplitFile,
    join_single_file,
    split_single_file,
    unknown_keys,
)
from merge.keymap.unet import LDM_UNET_PREFIX, ldm_to_unet, unet_to_ldm

__all__ = [
    "CONV_IN",
    "GUIDANCE_EMBEDDING",
    "LDM_UNET_PREFIX",
    "KeyPair",
    "SplitFile",
    "UNetArchitecture",
    "block_order",
    "detect_unet",
    "is_block_name",
    "join_single_file",
    "ldm_to_unet",
    "one_to_one",
    "split_single_file",
    "unet_blocks",
    "unet_to_ldm",
    "unknown_keys",
]
