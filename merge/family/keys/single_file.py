"""A single LDM/SGM file: which keys belong to which component, and which are left out and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from merge.errors import CheckpointError, list_first
from merge.family.keys.pairs import KeyPair, checked_pairs, strip
from merge.family.keys.text import SD15_TEXT, SDXL_TEXT, SDXL_TEXT_2
from merge.family.keys.unet import LDM_UNET_PREFIX, ldm_to_unet, unet_to_ldm, unknown_to_unet
from merge.family.keys.vae import VAE_KEYS

# Component to the tables of its keys, of which a file uses one; the UNet's depend on each other.
_TABLES = {
    "vae": (VAE_KEYS,),
    "text_encoder": (SD15_TEXT, SDXL_TEXT),
    "text_encoder_2": (SDXL_TEXT_2,),
}
_ALL_TABLES = tuple(table for tables in _TABLES.values() for table in tables)
_PREFIXES = (LDM_UNET_PREFIX, *(table.prefix for table in _ALL_TABLES))
# Keys of training and of other tools, and why they are in no other layout.
_REASONS = {
    r"model_ema\..+": "a moving average kept for training; the plain weights are used",
    r"(?:sqrt_|log_|one_minus_|recip_|recipm1_)*(?:alphas_cumprod|betas)(?:_prev)?"
    r"|posterior_\w+|logvar|lvlb_weights|denoiser\.(?:sigmas|log_sigmas)": (
        "a constant of the noise schedule, which the scheduler's config holds"
    ),
    r"(?:.+\.)?logit_scale": "of CLIP's training; no text encoder uses it",
    r"first_stage_model\.(?:loss|model_ema|discriminator)\..+": "of the VAE's training",
    r"(?:optimizer\w*|lr_scheduler\w*|callbacks|loops)(?:\..+)?": "of training",
    r"scale_factor": "a constant, which the VAE's config holds",
    r"conditioner\.embedders\.1\.(?:.+\.)?(?:position_ids|attn_mask)": (
        "a constant, which no text encoder loads"
    ),
    r"embedding_manager\..+": "of textual inversion's training",
    r"cond_stage_model\.transformer\.vision_model\..+": "CLIP's picture half",
}
_LEFT_OUT = [(re.compile(pattern), reason) for pattern, reason in _REASONS.items()]
# Where 1.x has `cond_stage_model.transformer.`.
_SD2_TEXT_PREFIX = "cond_stage_model.model."
# Roots of a UNet outside of `model.diffusion_model.`.
_OTHER_UNETS = ("conv_in.weight", "unet.conv_in.weight", "diffusion_model.input_blocks.0.0.weight")


@dataclass(frozen=True, slots=True)
class SplitFile:
    """The keys of a single file.

    Attributes:
        pairs: Component to its tensors, for the components that the file has.
        left_out: Key to the reason why it is used by none.
    """

    pairs: Mapping[str, tuple[KeyPair, ...]]
    left_out: Mapping[str, str]

    def names(self, component: str) -> dict[str, str]:
        """Return single-file key to folder key of a component."""
        return {pair.single: pair.folder for pair in self.pairs.get(component, ())}


def is_single_file(names: Iterable[str]) -> bool:
    """Return True for keys of a file that may hold other components beside its main one."""
    return any(name.startswith(LDM_UNET_PREFIX) for name in names)


def split_single_file(names: Collection[str]) -> SplitFile:
    """Sort the keys of a single file by component.

    Raises:
        CheckpointError: there is no UNet or more than one, a key is unknown, or a map is not
            one-to-one.
    """
    if not is_single_file(names):
        raise CheckpointError(
            f"this is no LDM/SGM single file: no key begins with {LDM_UNET_PREFIX}",
            hint="`instruct-merge show` says what it is",
        )
    other = next((name for name in _OTHER_UNETS if name in names), None)
    if other is not None:
        root = other.removesuffix("conv_in.weight").removesuffix("input_blocks.0.0.weight")
        raise CheckpointError(
            f"the file has two UNets: {LDM_UNET_PREFIX}* and {root}*",
            hint="save the one that you mean in a file of its own",
        )
    left_out = {name: reason for name in sorted(names) if (reason := _reason(name))}
    rest = [name for name in names if name not in left_out]
    if any(name.startswith(_SD2_TEXT_PREFIX) for name in rest):
        raise CheckpointError(
            f"this is a Stable Diffusion 2.x file: its text encoder ({_SD2_TEXT_PREFIX}*) is "
            "OpenCLIP's, and those of 1.x and XL alone are read",
            hint=f"to merge its UNet alone, leave the rest out: `exclude: ['{_SD2_TEXT_PREFIX}*']`",
        )
    if unknown := _outside(rest):
        raise CheckpointError(
            f"keys that belong to no part of an LDM/SGM file: {list_first(unknown)}",
            hint="if they are of no use, leave them out by `exclude` with their names or a glob",
        )
    unet = ldm_to_unet(strip(rest, LDM_UNET_PREFIX))
    pairs = {
        "unet": checked_pairs(
            (KeyPair(key, LDM_UNET_PREFIX + name) for name, key in unet.items()), "UNet keys"
        ),
    }
    for component, tables in _TABLES.items():
        pairs[component] = tuple(pair for table in tables for pair in table.to_folder(rest))
    return SplitFile({name: found for name, found in pairs.items() if found}, left_out)


def unknown_keys(names: Collection[str]) -> list[str]:
    """Return the keys of a single file that no part of it knows, sorted: exclusions may be."""
    rest = [name for name in names if not _reason(name)]
    unet = unknown_to_unet(strip(rest, LDM_UNET_PREFIX))
    others = (name for table in _ALL_TABLES for name in table.unknown(rest))
    return sorted([*_outside(rest), *(LDM_UNET_PREFIX + name for name in unet), *others])


def _outside(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith(_PREFIXES))


def join_single_file(keys: Mapping[str, Collection[str]]) -> SplitFile:
    """Give the keys of a folder's components their names in a single file.

    Args:
        keys: Component to its keys; with `text_encoder_2` the file is an SGM one (SDXL).

    Raises:
        CheckpointError: a key has no name there, or a map is not one-to-one.
    """
    is_xl = "text_encoder_2" in keys
    unet = unet_to_ldm(keys["unet"])
    pairs = {"unet": tuple(KeyPair(key, LDM_UNET_PREFIX + name) for key, name in unet.items())}
    left_out: dict[str, str] = {}
    if "vae" in keys:
        pairs["vae"] = VAE_KEYS.to_single(keys["vae"])
    if "text_encoder" in keys:
        table = SDXL_TEXT if is_xl else SD15_TEXT
        pairs["text_encoder"] = table.to_single(keys["text_encoder"])
    if is_xl:
        pairs["text_encoder_2"] = SDXL_TEXT_2.to_single(keys["text_encoder_2"])
        used = {pair.folder for pair in pairs["text_encoder_2"]}
        for key in sorted(set(keys["text_encoder_2"]) - used):
            left_out[f"text_encoder_2.{key}"] = "a constant, which OpenCLIP does not store"
    # Two components may spell a key alike; in the one file their names must differ.
    qualified = (
        replace(pair, folder=f"{component}.{pair.folder}")
        for component, found in pairs.items()
        for pair in found
    )
    checked_pairs(qualified, "single-file keys")
    return SplitFile(pairs, left_out)


def _reason(name: str) -> str:
    return next((reason for pattern, reason in _LEFT_OUT if pattern.fullmatch(name)), "")
