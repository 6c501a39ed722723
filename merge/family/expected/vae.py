"""The tensors of diffusers' AutoencoderKL.

Source: `AutoencoderKL.__init__`, `Encoder` and `Decoder`, diffusers 0.42.
"""

from __future__ import annotations

from merge.family.expected.fields import ConfigFields, Layers, Table


def vae_tensors(fields: ConfigFields) -> Table | None:
    """Return the table of a VAE, None where it has a rare kind of block."""
    widths = fields.numbers("block_out_channels", (64,))
    down = fields.words("down_block_types", ("DownEncoderBlock2D",))
    up = fields.words("up_block_types", ("UpDecoderBlock2D",))
    if {*down} != {"DownEncoderBlock2D"} or {*up} != {"UpDecoderBlock2D"}:
        return None
    if len(down) != len(widths) or len(up) != len(widths):
        raise fields.problem("block_out_channels", widths)
    latent = fields.required("latent_channels", 4)
    count = fields.required("layers_per_block", 1)
    has_attention = fields.is_on("mid_block_add_attention", True)
    layers = Layers()
    layers.conv("encoder.conv_in", fields.required("in_channels", 3), widths[0], 3)
    _blocks(layers, "encoder.down_blocks", "downsamplers", widths, count)
    _middle(layers, "encoder", widths[-1], has_attention)
    layers.norm("encoder.conv_norm_out", widths[-1])
    layers.conv("encoder.conv_out", widths[-1], 2 * latent, 3)
    layers.conv("decoder.conv_in", latent, widths[-1], 3)
    _middle(layers, "decoder", widths[-1], has_attention)
    _blocks(layers, "decoder.up_blocks", "upsamplers", widths[::-1], count + 1)
    layers.norm("decoder.conv_norm_out", widths[0])
    layers.conv("decoder.conv_out", widths[0], fields.required("out_channels", 3), 3)
    if fields.is_on("use_quant_conv", True):
        layers.conv("quant_conv", 2 * latent, 2 * latent, 1)
    if fields.is_on("use_post_quant_conv", True):
        layers.conv("post_quant_conv", latent, latent, 1)
    return layers.table


def _blocks(layers: Layers, name: str, sampler: str, widths: list[int], count: int) -> None:
    before = widths[0]
    for block, width in enumerate(widths):
        for layer in range(count):
            inputs = before if layer == 0 else width
            layers.resnet(f"{name}.{block}.resnets.{layer}", inputs, width)
        if block < len(widths) - 1:
            layers.conv(f"{name}.{block}.{sampler}.0.conv", width, width, 3)
        before = width


def _middle(layers: Layers, half: str, width: int, has_attention: bool) -> None:
    name = f"{half}.mid_block"
    for number in (0, 1):
        layers.resnet(f"{name}.resnets.{number}", width, width)
    if has_attention:
        layers.norm(f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layers.linear(f"{name}.attentions.0.{part}", width, width)
