"""Kohya's module names, which lose the difference between a dot and an underscore."""

from __future__ import annotations

from collections.abc import Iterable


def kohya_stems(keys: Iterable[str]) -> dict[str, str]:
    """Map kohya's module names to the weights of a UNet.

    Kohya writes `down_blocks.0.attentions.0.proj_in` as
    `lora_unet_down_blocks_0_attentions_0_proj_in`, which cannot be undone without the keys.

    Args:
        keys: The UNet's keys; only those that end in `.weight` count.

    Returns:
        Module name to key, e.g. `lora_unet_conv_in` to `conv_in.weight`.

    Raises:
        ValueError: two keys give the same name, so the map would not be one-to-one.
    """
    stems: dict[str, str] = {}
    for key in keys:
        if not key.endswith(".weight"):
            continue
        stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if stem in stems:
            raise ValueError(f"{stems[stem]} and {key} have the same kohya name {stem}")
        stems[stem] = key
    return stems
