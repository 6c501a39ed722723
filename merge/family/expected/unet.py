"""The tensors of diffusers' UNet2DConditionModel.

Source: `UNet2DConditionModel.__init__` and the blocks that it builds, diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge.family.expected.fields import ConfigFields, Layers, Table

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# Settings that change keys or shapes in ways that no model of these families uses: their values
# where they change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "resnet_time_scale_shift": ("default",),
    "act_fn": ("silu", "swish"),
}


def unet_tensors(fields: ConfigFields) -> Table | None:
    """Return the table of a UNet, None where it has a rare kind of block."""
    config = fields.config
    if any(config.get(name, plain[0]) not in plain for name, plain in _PLAIN.items()):
        return None
    down = fields.words("down_block_types", (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"))
    up = fields.words("up_block_types", ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3))
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    is_known = set(down) <= _DOWN.keys() and set(up) <= _UP.keys()
    if not is_known or middle not in ("UNetMidBlock2DCrossAttn", None):
        return None
    widths = fields.numbers("block_out_channels", (320, 640, 1280, 1280))
    if len(down) != len(widths) or len(up) != len(widths):
        raise fields.problem("block_out_channels", widths)
    if config.get("addition_embed_type") not in (None, "text_time"):
        return None
    builder = _Builder(fields, widths)
    depths = _depths(fields, "transformer_layers_per_block", len(widths))
    up_depths: Sequence[int | list[int]] = depths[::-1]
    if fields.config.get("reverse_transformer_layers_per_block") is not None:
        up_depths = _depths(fields, "reverse_transformer_layers_per_block", len(widths))
    elif any(isinstance(item, list) for item in depths):
        return None
    builder.embeddings()
    builder.down(down, depths)
    if middle is not None:
        builder.middle(depths[-1])
    builder.up(up, up_depths)
    return builder.finish()


class _Builder:
    def __init__(self, fields: ConfigFields, widths: list[int]) -> None:
        self.fields = fields
        self.widths = widths
        self.layers = Layers()
        self.time = fields.number("time_embedding_dim") or 4 * widths[0]
        self.counts = fields.per_block("layers_per_block", 2, len(widths))
        self.contexts = fields.per_block("cross_attention_dim", 1280, len(widths))
        self.is_linear = fields.is_on("use_linear_projection", False)

    def embeddings(self) -> None:
        fields, layers, first = self.fields, self.layers, self.widths[0]
        inputs = fields.required("in_channels", 4)
        layers.conv("conv_in", inputs, first, fields.required("conv_in_kernel", 3))
        layers.linear("time_embedding.linear_1", first, self.time)
        layers.linear("time_embedding.linear_2", self.time, self.time)
        if condition := fields.number("time_cond_proj_dim"):
            layers.linear("time_embedding.cond_proj", condition, first, bias=False)
        if classes := fields.number("num_class_embeds"):
            layers.table["class_embedding.weight"] = (classes, self.time)
        if fields.config.get("addition_embed_type") == "text_time":
            width = fields.number("projection_class_embeddings_input_dim")
            if width is None:
                raise fields.problem("projection_class_embeddings_input_dim", None)
            layers.linear("add_embedding.linear_1", width, self.time)
            layers.linear("add_embedding.linear_2", self.time, self.time)

    def down(self, kinds: list[str], depths: Sequence[int | list[int]]) -> None:
        before = self.widths[0]
        for block, (kind, width) in enumerate(zip(kinds, self.widths, strict=True)):
            name = f"down_blocks.{block}"
            inputs = [before, *[width] * (self.counts[block] - 1)]
            depth = depths[block] if _DOWN[kind] else None
            self._block(name, inputs, width, self.contexts[block], depth)
            if block < len(kinds) - 1:
                self.layers.conv(f"{name}.downsamplers.0.conv", width, width, 3)
            before = width

    def middle(self, depths: int | list[int]) -> None:
        width = self.widths[-1]
        for number in (0, 1):
            self.layers.resnet(f"mid_block.resnets.{number}", width, width, self.time)
        depth = self._depth(depths, 0)
        self._transformer("mid_block.attentions.0", width, self.contexts[-1], depth)

    def up(self, kinds: list[str], depths: Sequence[int | list[int]]) -> None:
        widths = self.widths[::-1]
        counts, contexts = self.counts[::-1], self.contexts[::-1]
        before = widths[0]
        for block, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
            name = f"up_blocks.{block}"
            below = widths[min(block + 1, len(widths) - 1)]
            # Each layer also reads what the one opposite of it gave.
            inputs = [before + width, *[2 * width] * (counts[block] - 1), width + below]
            depth = depths[block] if _UP[kind] else None
            self._block(name, inputs, width, contexts[block], depth)
            if block < len(kinds) - 1:
                self.layers.conv(f"{name}.upsamplers.0.conv", width, width, 3)
            before = width

    def finish(self) -> Table:
        first = self.widths[0]
        self.layers.norm("conv_norm_out", first)
        outputs = self.fields.required("out_channels", 4)
        kernel = self.fields.required("conv_out_kernel", 3)
        self.layers.conv("conv_out", first, outputs, kernel)
        return self.layers.table

    def _block(
        self,
        name: str,
        inputs: Sequence[int],
        width: int,
        context: int,
        depths: int | list[int] | None,
    ) -> None:
        """Add a residual layer for each number of inputs, with attention where there is a depth."""
        for layer, channels in enumerate(inputs):
            self.layers.resnet(f"{name}.resnets.{layer}", channels, width, self.time)
            if depths is not None:
                depth = self._depth(depths, layer)
                self._transformer(f"{name}.attentions.{layer}", width, context, depth)

    def _transformer(self, name: str, width: int, context: int, depth: int) -> None:
        layers = self.layers
        layers.norm(f"{name}.norm", width)
        for place in ("proj_in", "proj_out"):
            if self.is_linear:
                layers.linear(f"{name}.{place}", width, width)
            else:
                layers.conv(f"{name}.{place}", width, width, 1)
        for number in range(depth):
            block = f"{name}.transformer_blocks.{number}"
            for part in ("norm1", "norm2", "norm3"):
                layers.norm(f"{block}.{part}", width)
            for part, keys in (("attn1", width), ("attn2", context)):
                layers.linear(f"{block}.{part}.to_q", width, width, bias=False)
                layers.linear(f"{block}.{part}.to_k", keys, width, bias=False)
                layers.linear(f"{block}.{part}.to_v", keys, width, bias=False)
                layers.linear(f"{block}.{part}.to_out.0", width, width)
            # A gated unit has two halves.
            layers.linear(f"{block}.ff.net.0.proj", width, 8 * width)
            layers.linear(f"{block}.ff.net.2", 4 * width, width)

    def _depth(self, depths: int | list[int], layer: int) -> int:
        if isinstance(depths, int):
            return depths
        if layer >= len(depths):
            raise self.fields.problem("transformer_layers_per_block", depths)
        return depths[layer]


def _depths(fields: ConfigFields, name: str, blocks: int) -> list[int | list[int]]:
    """Return the transformer blocks of each block, or of each of its layers."""
    value = fields.config.get(name, 1)
    if not isinstance(value, list | tuple):
        return [*fields.per_block(name, 1, blocks)]
    if len(value) != blocks:
        raise fields.problem(name, value)
    found: list[int | list[int]] = []
    for item in value:
        inner = ConfigFields({name: item}, fields.where)
        is_list = isinstance(item, list | tuple)
        found.append(inner.numbers(name, ()) if is_list else inner.required(name, 1))
    return found
