"""The tensors of transformers' CLIP models, and of the safety checker that holds one.

Source: `modeling_clip.py` of transformers 5 and `safety_checker.py` of diffusers 0.42. Keys are
those of published files, where the model inside of a model has a name of its own; transformers from
5.6 on leaves it out when it saves.
"""

from __future__ import annotations

from collections.abc import Mapping

from merge.family.expected.fields import ConfigFields, Layers, Table

_CONCEPTS, _SPECIAL = 17, 3


def text_tensors(fields: ConfigFields) -> Table:
    """Return the table of CLIPTextModel."""
    layers = Layers()
    width = fields.required("hidden_size", 512)
    positions = fields.required("max_position_embeddings", 77)
    words = fields.required("vocab_size", 49408)
    layers.table["text_model.embeddings.token_embedding.weight"] = (words, width)
    layers.table["text_model.embeddings.position_embedding.weight"] = (positions, width)
    _encoder(layers, "text_model", width, fields.required("intermediate_size", 2048), fields)
    layers.norm("text_model.final_layer_norm", width)
    return layers.table


def text_projection_tensors(fields: ConfigFields) -> Table:
    """Return the table of CLIPTextModelWithProjection."""
    width = fields.required("hidden_size", 512)
    projected = fields.required("projection_dim", 512)
    return {**text_tensors(fields), "text_projection.weight": (projected, width)}


def vision_tensors(fields: ConfigFields) -> Table:
    """Return the table of CLIPVisionModel."""
    layers = Layers()
    width = fields.required("hidden_size", 768)
    patch = fields.required("patch_size", 32)
    side = fields.required("image_size", 224) // patch
    place = "vision_model.embeddings"
    layers.table[f"{place}.class_embedding"] = (width,)
    channels = fields.required("num_channels", 3)
    layers.conv(f"{place}.patch_embedding", channels, width, patch, bias=False)
    layers.table[f"{place}.position_embedding.weight"] = (side * side + 1, width)
    layers.norm("vision_model.pre_layrnorm", width)
    _encoder(layers, "vision_model", width, fields.required("intermediate_size", 3072), fields)
    layers.norm("vision_model.post_layernorm", width)
    return layers.table


def vision_projection_tensors(fields: ConfigFields) -> Table:
    """Return the table of CLIPVisionModelWithProjection."""
    width = fields.required("hidden_size", 768)
    projected = fields.required("projection_dim", 512)
    return {**vision_tensors(fields), "visual_projection.weight": (projected, width)}


def safety_checker_tensors(fields: ConfigFields) -> Table:
    """Return the table of StableDiffusionSafetyChecker."""
    nested = fields.config.get("vision_config") or {}
    if not isinstance(nested, Mapping):
        raise fields.problem("vision_config", nested)
    vision = ConfigFields(nested, f"{fields.where}'s vision_config")
    table = {f"vision_model.{key}": shape for key, shape in vision_tensors(vision).items()}
    projected = fields.required("projection_dim", 512)
    table["visual_projection.weight"] = (projected, vision.required("hidden_size", 768))
    for name, count in (("concept_embeds", _CONCEPTS), ("special_care_embeds", _SPECIAL)):
        table[name] = (count, projected)
        table[f"{name}_weights"] = (count,)
    return table


def _encoder(layers: Layers, model: str, width: int, inner: int, fields: ConfigFields) -> None:
    for number in range(fields.required("num_hidden_layers", 12)):
        name = f"{model}.encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layers.linear(f"{name}.self_attn.{part}", width, width)
        layers.norm(f"{name}.layer_norm1", width)
        layers.linear(f"{name}.mlp.fc1", width, inner)
        layers.linear(f"{name}.mlp.fc2", inner, width)
        layers.norm(f"{name}.layer_norm2", width)
