"""How modules are named: every spelling of every weight, against what diffusers makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from merge.family.foreign import foreign_lora
from merge.family.keys.unet import unet_to_ldm
from merge.family.stable_diffusion import SD1
from merge.lora.module import AdapterTable
from merge.lora.parse import parse_adapters
from merge.lora.roles import down_factors
from scripts.make_tiny import LORA_MODULES
from tests.family.test_keymap import full_unet

Shapes = dict[str, tuple[int, ...]]
LOADERS = {"sd15": StableDiffusionLoraLoaderMixin, "sdxl": StableDiffusionXLLoraLoaderMixin}
Name = Callable[[str], tuple[str, str]]


def adapted(keys: list[str]) -> list[str]:
    """Return the paths of the weights that LCM-LoRA changes."""
    paths = [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]
    return [path for path in paths if path.endswith(tuple(f".{name}" for name in LORA_MODULES))]


def factors(target: Shapes, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = target[f"{path}.weight"]
    return (2, *shape[1:]), (shape[0], 2, *(1 for _ in shape[2:]))


def file_of(target: Shapes, names: dict[str, tuple[str, str]]) -> Shapes:
    """Return a LoRA's keys and shapes, given the names of each path's down and up factors."""
    shapes: Shapes = {}
    for path, (down, up) in names.items():
        shapes[down], shapes[up] = factors(target, path)
    return shapes


def changed(table: AdapterTable, component: str = "unet") -> dict[str, str]:
    """Return the down factor's key to the weight's path."""
    assert table.problems == ()
    assert {module.component for module in table.modules} == {component}
    return {dict(m.factors)["down"]: m.key.removesuffix(".weight") for m in table.modules}


def kohya(stem: str) -> tuple[str, str]:
    stem = stem.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def peft(stem: str) -> tuple[str, str]:
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def ldm_path(path: str, ldm: dict[str, str]) -> str:
    return ldm[f"{path}.weight"].removesuffix(".weight")


def processor(path: str) -> tuple[str, str]:
    """Return the names of diffusers 0.1x, which knew only attention."""
    block, _, name = path.partition(".attn")
    number, _, part = name.partition(".")
    stem = f"unet.{block}.attn{number}.processor.{part.removesuffix('.0')}_lora"
    return f"{stem}.down.weight", f"{stem}.up.weight"


SPELLINGS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "kohya": lambda path, ldm: kohya(f"lora_unet_{path}"),
    "kohya SGM": lambda path, ldm: kohya(f"lora_unet_{ldm}"),
    "LyCORIS": lambda path, ldm: kohya(f"lycoris_{path}"),
    "diffusers": lambda path, ldm: peft(f"unet.{path}"),
    "peft": lambda path, ldm: peft(f"base_model.model.{path}"),
    "peft in diffusers": lambda path, ldm: peft(f"unet.base_model.model.{path}"),
    "peft with an adapter's name": lambda path, ldm: (
        f"unet.{path}.lora_A.default.weight",
        f"unet.{path}.lora_B.default.weight",
    ),
    "an adapter's own name": lambda path, ldm: (
        f"unet.{path}.lora_A.default_0.weight",
        f"unet.{path}.lora_B.default_0.weight",
    ),
    "unet with SGM names": lambda path, ldm: peft(f"unet.{ldm}"),
    "unet twice": lambda path, ldm: peft(f"unet.unet.{path}"),
    "peft around unet": lambda path, ldm: peft(f"base_model.model.unet.{path}"),
    "single file": lambda path, ldm: peft(f"model.diffusion_model.{ldm}"),
    "ComfyUI with diffusers names": lambda path, ldm: peft(f"diffusion_model.{path}"),
    "compiled": lambda path, ldm: peft(f"_orig_mod.{path}"),
    "compiled inside": lambda path, ldm: peft(f"base_model.model._orig_mod.{path}"),
    "compiled kohya": lambda path, ldm: kohya(f"lora_unet__orig_mod_{path}"),
    "parallel": lambda path, ldm: peft(f"module.unet.{path}"),
    "bare": lambda path, ldm: peft(path),
    "ComfyUI A/B": lambda path, ldm: peft(f"diffusion_model.{ldm}"),
    "ComfyUI up/down": lambda path, ldm: (
        f"diffusion_model.{ldm}.lora_down.weight",
        f"diffusion_model.{ldm}.lora_up.weight",
    ),
    "old diffusers": lambda path, ldm: (
        f"unet.{path}.lora.down.weight",
        f"unet.{path}.lora.up.weight",
    ),
}


@pytest.mark.parametrize("family", LOADERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_every_module_is_resolved(family: str, spelling: str) -> None:
    target = full_unet(family)
    ldm = unet_to_ldm(target)
    names = {path: SPELLINGS[spelling](path, ldm_path(path, ldm)) for path in adapted(list(target))}
    table = parse_adapters(file_of(target, names), {}, {"unet": target}, SD1)
    assert changed(table) == {down: path for path, (down, _) in names.items()}


@pytest.mark.parametrize(
    ("family", "spelling"),
    # diffusers reads single-file names of SDXL only.
    [("sd15", "kohya"), ("sdxl", "kohya"), ("sdxl", "kohya SGM")],
)
def test_kohya_names_mean_what_diffusers_takes_them_for(family: str, spelling: str) -> None:
    target = full_unet(family)
    ldm = unet_to_ldm(target)
    names = {path: SPELLINGS[spelling](path, ldm_path(path, ldm)) for path in adapted(list(target))}
    shapes = file_of(target, names)
    # A number in each tensor tells which key of the file it was.
    keys = sorted(shapes)
    state = {key: torch.full((1, 1), float(index)) for index, key in enumerate(keys)}
    config = SimpleNamespace(layers_per_block=2)
    renamed, _ = LOADERS[family].lora_state_dict(state, unet_config=config)
    unet = {name.removeprefix("unet."): value for name, value in renamed.items()}
    theirs = {
        keys[int(value.item())]: name.removesuffix(".lora_A.weight")
        for name, value in convert_unet_state_dict_to_peft(unet).items()
        if name.endswith(".lora_A.weight")
    }
    ours = changed(parse_adapters(shapes, {}, {"unet": target}, SD1))
    assert theirs == ours


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_processor_keys_of_old_diffusers(prefix: str) -> None:
    target = full_unet("sd15")
    names = {
        path: tuple(name.replace("unet.", prefix, 1) for name in processor(path))
        for path in adapted(list(target))
        if ".attn" in path
    }
    assert len(names) == 128
    shapes = file_of(target, names)  # type: ignore[arg-type]
    ours = changed(parse_adapters(shapes, {}, {"unet": target}, SD1))
    assert ours == {down: path for path, (down, _) in names.items()}
    keys = sorted(shapes)
    state = {key: torch.full((1,), float(index)) for index, key in enumerate(keys)}
    theirs = {
        keys[int(value)]: name.removeprefix("unet.").removesuffix(".lora_A.weight")
        for name, value in convert_unet_state_dict_to_peft(state).items()
        if name.endswith(".lora_A.weight")
    }
    assert theirs == ours


# -------------------------------------------------------------------------------- text encoders


def text_encoders() -> dict[str, Shapes]:
    """Return small text encoders, spelled as their published files are."""
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=20, projection_dim=6,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    found = {}
    for name, cls in (
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        shapes: Shapes = {}
        for key, value in cls(config).state_dict().items():
            flat = key.removeprefix("text_model.")
            prefix = "" if key.startswith("text_projection") else "text_model."
            shapes[prefix + flat] = tuple(value.shape)
        found[name] = shapes
    return found


TEXT = text_encoders()
TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
OLD_PARTS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def text_paths(component: str) -> list[str]:
    return [
        key.removesuffix(".weight")
        for key in TEXT[component]
        if key.endswith(tuple(f".{name}.weight" for name in TEXT_MODULES))
    ]


def flat(path: str) -> str:
    return path.removeprefix("text_model.")


TEXT_SPELLINGS: dict[str, tuple[str, Name]] = {
    "kohya SD1.5": ("text_encoder", lambda path: kohya(f"lora_te_{path}")),
    "kohya SDXL": ("text_encoder", lambda path: kohya(f"lora_te1_{path}")),
    "kohya SDXL, second": ("text_encoder_2", lambda path: kohya(f"lora_te2_{path}")),
    "kohya without text_model": ("text_encoder", lambda path: kohya(f"lora_te1_{flat(path)}")),
    "diffusers": ("text_encoder", lambda path: peft(f"text_encoder.{path}")),
    "diffusers, flat": ("text_encoder", lambda path: peft(f"text_encoder.{flat(path)}")),
    "diffusers, second": ("text_encoder_2", lambda path: peft(f"text_encoder_2.{path}")),
    "old diffusers": (
        "text_encoder",
        lambda path: (
            f"text_encoder.{path}.lora_linear_layer.down.weight",
            f"text_encoder.{path}.lora_linear_layer.up.weight",
        ),
    ),
}


@pytest.mark.parametrize("is_flat", [False, True], ids=["prefixed", "flat"])
@pytest.mark.parametrize("spelling", TEXT_SPELLINGS)
def test_text_encoders(spelling: str, is_flat: bool) -> None:
    component, name = TEXT_SPELLINGS[spelling]
    target = TEXT[component]
    names = {path: name(path) for path in text_paths(component)}
    assert len(names) == 12
    shapes = file_of(target, names)
    targets = {
        other: {flat(key) if is_flat else key: shape for key, shape in keys.items()}
        for other, keys in TEXT.items()
    }
    ours = changed(parse_adapters(shapes, {}, {"unet": {}, **targets}, SD1), component)
    expected = {down: path for path, (down, _) in names.items()}
    if is_flat:
        expected = {down: flat(path) for down, path in expected.items()}
    assert ours == expected


def test_the_attention_of_very_old_text_encoder_loras() -> None:
    target = TEXT["text_encoder"]
    names = {}
    for path in text_paths("text_encoder"):
        parent, _, part = path.rpartition(".")
        if part in OLD_PARTS:
            stem = f"text_encoder.{parent}.{OLD_PARTS[part]}_lora"
            names[path] = (f"{stem}.down.weight", f"{stem}.up.weight")
    shapes = file_of(target, names)
    ours = changed(parse_adapters(shapes, {}, {"unet": {}, **TEXT}, SD1), "text_encoder")
    assert ours == {down: path for path, (down, _) in names.items()}
    state = {key: torch.tensor(index) for index, key in enumerate(sorted(shapes))}
    renamed = convert_state_dict_to_diffusers(state)
    assert {name.rpartition(".lora_linear_layer")[0] for name in renamed} == {
        f"text_encoder.{path}" for path in names
    }


def test_kohya_text_names_mean_what_diffusers_takes_them_for() -> None:
    names = {path: kohya(f"lora_te_{path}") for path in text_paths("text_encoder")}
    shapes = file_of(TEXT["text_encoder"], names)
    keys = sorted(shapes)
    state = {key: torch.full((1, 1), float(index)) for index, key in enumerate(keys)}
    renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(state)
    theirs = {
        keys[int(value.item())]: name.removeprefix("text_encoder.").removesuffix(".lora_A.weight")
        for name, value in convert_state_dict_to_peft(renamed).items()
        if name.endswith(".lora_A.weight")
    }
    ours = changed(parse_adapters(shapes, {}, {"unet": {}, **TEXT}, SD1), "text_encoder")
    assert theirs.keys() == ours.keys()
    assert {key: flat(path) for key, path in theirs.items()} == {
        key: flat(path) for key, path in ours.items()
    }


# ---------------------------------------------------------------------------- the wrong model


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("sd15", "sdxl", "a LoRA for Stable Diffusion 1.x, and the target is SDXL"),
        ("sdxl", "sd15", "a LoRA for SDXL, and the target is Stable Diffusion 1.x"),
        ("sd15", "sd21", "a LoRA for Stable Diffusion 1.x, and the target is Stable Diffusion 2.x"),
    ],
)
@pytest.mark.parametrize("spelling", ["kohya", "kohya SGM", "diffusers", "ComfyUI A/B"])
def test_a_lora_for_another_family_is_told(
    theirs: str, ours: str, words: str, spelling: str
) -> None:
    source = full_unet(theirs)
    ldm = unet_to_ldm(source)
    names = {path: SPELLINGS[spelling](path, ldm_path(path, ldm)) for path in adapted(list(source))}
    shapes = file_of(source, names)
    assert words in foreign_lora(shapes, down_factors(shapes), full_unet(ours), SD1)


def test_a_lora_that_fits_is_not_taken_for_another_family() -> None:
    target = full_unet("sd15")
    names = {path: peft(f"unet.{path}") for path in adapted(list(target))}
    shapes = {**file_of(target, names), "lora_unet_x.alpha": ()}
    table = parse_adapters(shapes, {}, {"unet": target}, SD1)
    assert table.problems == ("lora_unet_x: the target has no weight of this name",)
    assert foreign_lora(shapes, down_factors(shapes), target, SD1) == ""


def test_both_spellings_of_one_module_are_a_problem() -> None:
    target = full_unet("sdxl")
    path = "down_blocks.1.attentions.0.proj_in"
    ldm = ldm_path(path, unet_to_ldm(target))
    for first, second in ((path, ldm), (ldm, path)):
        shapes: Shapes = {}
        for stem in (f"lora_unet_{first}", f"lora_unet_{second}"):
            shapes |= file_of(target, {path: kohya(stem)})
        table = parse_adapters(shapes, {}, {"unet": target}, SD1)
        assert [module.key for module in table.modules] == [f"{path}.weight"]
        (problem,) = table.problems
        assert f"{path}.weight is already changed by lora_unet_" in problem
