from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from merge.family.stable_diffusion import SD1
from merge.header.dtypes import element_count
from merge.lora.module import AdapterModule, AdapterTable
from merge.lora.parse import parse_adapters
from merge.lora.roles import is_lora
from tests.family.test_keymap import full_unet

Shapes = dict[str, tuple[int, ...]]

ATTENTION = "down_blocks.0.attentions.0"
TARGET: Shapes = {
    "conv_in.weight": (8, 8, 3, 3),
    "conv_in.bias": (8,),
    f"{ATTENTION}.proj_in.weight": (8, 8, 1, 1),
    f"{ATTENTION}.attn1.to_q.weight": (8, 6),
    f"{ATTENTION}.attn1.to_out.0.weight": (6, 8),
    "mid_block.resnets.0.conv1.weight": (10, 8, 3, 3),
    "mid_block.resnets.0.norm1.weight": (8,),
    "conv_out.weight": (4, 8, 3, 3),
}
TO_Q = f"{ATTENTION}.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
ROLES = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha")
ENDINGS = (
    *ROLES,
    *(".lora.down.weight", ".lora.up.weight", ".lora_A.default.weight", ".lora_B.default.weight"),
    *(".dora_scale", ".lora_magnitude_vector"),
)


def kohya(path: str, down: tuple[int, ...], up: tuple[int, ...], *, alpha: bool = True) -> Shapes:
    stem = "lora_unet_" + path.replace(".", "_")
    factors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return {**factors, f"{stem}.alpha": ()} if alpha else factors


def peft(path: str, down: tuple[int, ...], up: tuple[int, ...], prefix: str = "unet.") -> Shapes:
    return {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}


def adapter(**values: object) -> dict[str, str]:
    return {"format": "pt", "lora_adapter_metadata": json.dumps(values)}


def parse(shapes: Shapes, metadata: dict[str, str] | None = None) -> AdapterTable:
    table = parse_adapters(shapes, metadata or {}, {"unet": TARGET}, SD1)
    assert_nothing_is_skipped(shapes, table)
    return table


def made(key: str, down: str, up: str, rank: int, alpha_key: str | None) -> AdapterModule:
    """Return a module of the target, of two factors that cover the whole weight."""
    rows, *rest = TARGET[key]
    columns = math.prod(rest)
    factors = (("down", down), ("up", up))
    return AdapterModule("unet", key, "lora", factors, rank, alpha_key, None, rows, columns)


def stem_of(key: str) -> str:
    return next((key.removesuffix(end) for end in ENDINGS if key.endswith(end)), key)


def assert_nothing_is_skipped(shapes: Shapes, table: AdapterTable) -> None:
    used = [name for module in table.modules for name in module.names]
    assert len(used) == len(set(used))
    assert set(used) <= shapes.keys()
    named = [problem.split(": ")[0] for problem in table.problems]
    for key in shapes.keys() - set(used):
        # By itself, by its module, or by another key of its module.
        assert any(
            key == name or key.startswith(f"{name}.") or stem_of(key) == stem_of(name)
            for name in named
        ), key


# -------------------------------------------------------------------------------- what is read


def test_kohya() -> None:
    shapes = {
        **kohya(TO_Q, (4, 6), (8, 4)),
        **kohya(CONV, (2, 8, 3, 3), (10, 2, 1, 1)),
        **kohya(f"{ATTENTION}.proj_in", (3, 8, 1, 1), (8, 3, 1, 1), alpha=False),
    }
    stem = "lora_unet_down_blocks_0_attentions_0"
    conv = "lora_unet_mid_block_resnets_0_conv1"
    assert parse(shapes) == AdapterTable(
        modules=(
            made(
                f"{TO_Q}.weight",
                f"{stem}_attn1_to_q.lora_down.weight",
                f"{stem}_attn1_to_q.lora_up.weight",
                4,
                f"{stem}_attn1_to_q.alpha",
            ),
            made(
                f"{ATTENTION}.proj_in.weight",
                f"{stem}_proj_in.lora_down.weight",
                f"{stem}_proj_in.lora_up.weight",
                3,
                None,
            ),
            made(
                f"{CONV}.weight",
                f"{conv}.lora_down.weight",
                f"{conv}.lora_up.weight",
                2,
                f"{conv}.alpha",
            ),
        ),
        problems=(),
    )


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_peft(prefix: str) -> None:
    path = f"{ATTENTION}.attn1.to_out.0"
    table = parse(peft(path, (2, 8), (6, 2), prefix))
    assert table == AdapterTable(
        (
            made(
                f"{path}.weight",
                f"{prefix}{path}.lora_A.weight",
                f"{prefix}{path}.lora_B.weight",
                2,
                None,
            ),
        ),
        (),
    )


def test_a_linear_factor_fits_a_1x1_convolution_and_the_reverse() -> None:
    proj_in = parse(kohya(f"{ATTENTION}.proj_in", (2, 8), (8, 2)))
    to_q = parse(kohya(TO_Q, (2, 6, 1, 1), (8, 2, 1, 1)))
    assert not proj_in.problems
    assert not to_q.problems
    assert [m.key for m in (*proj_in.modules, *to_q.modules)] == [
        f"{ATTENTION}.proj_in.weight",
        f"{TO_Q}.weight",
    ]


def test_a_conv_in_of_four_channels_covers_these() -> None:
    (narrow,) = parse(kohya("conv_in", (2, 4, 3, 3), (8, 2, 1, 1))).modules
    (wide,) = parse(kohya("conv_in", (2, 8, 3, 3), (8, 2, 1, 1))).modules
    assert (narrow.columns, wide.columns) == (4 * 9, 8 * 9)


@pytest.mark.parametrize(
    ("path", "down", "up"),
    [
        ("conv_in", (2, 9, 3, 3), (8, 2, 1, 1)),
        ("conv_in", (2, 4, 1, 1), (8, 2, 1, 1)),
        (CONV, (2, 4, 3, 3), (10, 2, 1, 1)),
        ("conv_out", (2, 4, 3, 3), (4, 2, 1, 1)),
    ],
    ids=["wider", "another kernel", "a hidden layer", "conv_out"],
)
def test_no_other_weight_may_be_narrow(
    path: str, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    table = parse(kohya(path, down, up))
    assert table.modules == ()
    assert "its delta has shape" in table.problems[0]


def test_the_order_of_the_file_does_not_matter() -> None:
    shapes = {**kohya(CONV, (2, 8, 3, 3), (10, 2, 1, 1)), **kohya(TO_Q, (4, 6), (8, 4))}
    backwards = dict(reversed(shapes.items()))
    assert parse(shapes) == parse(backwards)
    keys = [module.key for module in parse(shapes).modules]
    assert keys == sorted(keys)


@pytest.mark.parametrize(("family", "count"), [("sd15", 278), ("sdxl", 788)])
def test_the_modules_of_the_published_lcm_loras(family: str, count: int) -> None:
    # Source: diffusers, train_lcm_distill_lora_sd_wds.py.
    adapted = re.compile(
        r"\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2"
        r"|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)\.weight$"
    )
    target = full_unet(family)
    shapes: Shapes = {}
    for key, shape in target.items():
        if adapted.search(key):
            ones = (1,) * len(shape[2:])
            shapes |= kohya(key.removesuffix(".weight"), (64, *shape[1:]), (shape[0], 64, *ones))
    table = parse_adapters(shapes, {}, {"unet": target}, SD1)
    assert table.problems == ()
    assert len(table.modules) == count
    assert_nothing_is_skipped(shapes, table)


# ---------------------------------------------------------------------------------------- alpha


def alpha_of(metadata: dict[str, str], path: str = TO_Q) -> float | None:
    table = parse(
        {**peft(TO_Q, (4, 6), (8, 4)), **peft(CONV, (2, 8, 3, 3), (10, 2, 1, 1))}, metadata
    )
    assert table.problems == ()
    return next(module.alpha for module in table.modules if module.key == f"{path}.weight")


def test_without_alpha_nothing_is_made_up() -> None:
    assert alpha_of({}) is None
    assert alpha_of({"format": "pt"}) is None
    assert alpha_of(adapter()) is None
    assert alpha_of(adapter(**{"unet.r": 4, "text_encoder.lora_alpha": 3})) is None


def test_alpha_in_the_metadata() -> None:
    assert alpha_of(adapter(**{"unet.lora_alpha": 8})) == 8.0
    assert alpha_of(adapter(lora_alpha=0.5)) == 0.5
    assert alpha_of(adapter(**{"unet.lora_alpha": 8, "lora_alpha": 3})) == 8.0


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (TO_Q, 3.0),
        ("attn1.to_q", 3.0),
        ("to_q", 3.0),
        ("o_q", None),
        ("to", None),
        (f"unet.{TO_Q}", None),
    ],
)
def test_alpha_patterns_name_the_end_of_a_path(pattern: str, expected: float | None) -> None:
    shapes = peft(TO_Q, (4, 6), (8, 4))
    table = parse(shapes, adapter(**{"unet.lora_alpha": 8, "unet.alpha_pattern": {pattern: 3}}))
    (module,) = table.modules
    assert module.alpha == (expected or 8.0)
    assert (get_pattern_key([pattern], TO_Q) == pattern) == (expected is not None)
    unused = f"lora_adapter_metadata: alpha_pattern '{pattern}' fits no module"
    assert table.problems == (() if expected else (unused,))


def test_each_module_has_the_alpha_of_its_pattern() -> None:
    metadata = adapter(**{"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 3, CONV: 5}})
    assert alpha_of(metadata) == 3.0
    assert alpha_of(metadata, CONV) == 5.0
    metadata = adapter(lora_alpha=8, alpha_pattern={CONV: 5})
    assert alpha_of(metadata) == 8.0
    assert alpha_of(metadata, CONV) == 5.0


def test_the_first_pattern_that_fits_wins() -> None:
    patterns = {"attn1.to_q": 3, "to_q": 5}
    assert alpha_of(adapter(**{"unet.alpha_pattern": patterns})) == 3.0
    assert get_pattern_key(list(patterns), TO_Q) == "attn1.to_q"
    assert alpha_of(adapter(**{"unet.alpha_pattern": dict(reversed(patterns.items()))})) == 5.0


def test_patterns_hold_for_kohya_names_too() -> None:
    shapes = kohya(TO_Q, (4, 6), (8, 4), alpha=False)
    (module,) = parse(shapes, adapter(lora_alpha=8, alpha_pattern={"attn1.to_q": 3})).modules
    assert module.alpha == 3.0


def test_a_key_wins_over_the_metadata() -> None:
    (module,) = parse(kohya(TO_Q, (4, 6), (8, 4)), adapter(**{"unet.lora_alpha": 3})).modules
    assert module.alpha is None
    assert module.alpha_key == "lora_unet_down_blocks_0_attentions_0_attn1_to_q.alpha"


def test_an_alpha_of_one_element_is_a_number() -> None:
    shapes = {**kohya(TO_Q, (4, 6), (8, 4), alpha=False)}
    stem = "lora_unet_down_blocks_0_attentions_0_attn1_to_q"
    assert parse({**shapes, f"{stem}.alpha": (1,)}).problems == ()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("5", "cannot be read"),
        ('{"lora_alpha": "x"}', "cannot be read"),
        ('{"lora_alpha": [8]}', "cannot be read"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "cannot be read"),
        ('{"lora_alpha": 1' + "0" * 5000 + "}", "cannot be read"),
        ('{"alpha_pattern": [1]}', "cannot be read"),
        ('{"alpha_pattern": {"to_q": null}}', "cannot be read"),
        ("[" * 100_000 + "]" * 100_000, "cannot be read"),
    ],
    ids=[
        *("no JSON", "a list", "a number", "alpha a word", "alpha a list", "400 digits"),
        *("5000 digits", "patterns a list", "a pattern of null", "deep"),
    ],
)
def test_metadata_that_cannot_be_followed_is_a_problem(text: str, match: str) -> None:
    table = parse(peft(TO_Q, (4, 6), (8, 4)), {"lora_adapter_metadata": text})
    (problem,) = table.problems
    assert problem.startswith("lora_adapter_metadata")
    assert match in problem


def test_dora_in_the_metadata_demands_magnitudes() -> None:
    metadata = adapter(**{"unet.use_dora": True})
    (problem,) = parse(peft(TO_Q, (4, 6), (8, 4)), metadata).problems
    assert problem.endswith("says use_dora, and the module has no magnitude")
    shapes = {**peft(TO_Q, (4, 6), (8, 4)), f"unet.{TO_Q}.lora_magnitude_vector": (8,)}
    assert not parse(shapes, metadata).problems


def test_a_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank() -> None:
    (module,) = parse(peft(TO_Q, (4, 6), (8, 4)), adapter(**{"unet.use_rslora": True})).modules
    assert module.divisor == 2.0
    (module,) = parse(peft(TO_Q, (4, 6), (8, 4))).modules
    assert module.divisor == 4.0


def test_switches_that_are_off_are_no_problem() -> None:
    metadata = adapter(**{"unet.use_dora": False, "unet.use_rslora": False, "use_dora": True})
    assert parse(peft(TO_Q, (4, 6), (8, 4)), metadata).problems == ()


# ------------------------------------------------------------------------------------- problems

STEM = "lora_unet_down_blocks_0_attentions_0_attn1_to_q"
CONV_STEM = "lora_unet_mid_block_resnets_0_conv1"


def loha(left: tuple[int, ...], right: tuple[int, ...]) -> Shapes:
    return {
        f"{STEM}.hada_w{n}_{side}": left if side == "a" else right for n in "12" for side in "ab"
    }


def lokr(**factors: tuple[int, ...]) -> Shapes:
    return {f"{STEM}.lokr_{role}": shape for role, shape in factors.items()}


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({"conv_in.weight": (8, 4, 3, 3)}, "conv_in.weight: not a LoRA key that is known"),
        ({f"unet.{TO_Q}.lora_B.bias": (8,)}, f"unet.{TO_Q}.lora_B.bias: a LoRA with a bias"),
        ({"alpha": ()}, "alpha: not a LoRA key that is known"),
        ({"": ()}, ": not a LoRA key that is known"),
        (kohya("time_embedding.linear_9", (2, 4), (4, 2)), "linear_9: the target has no weight"),
        (
            peft("conv_in.base_layer", (2, 4), (4, 2)),
            "conv_in.base_layer: the target has no weight",
        ),
        ({f"{STEM}.lora_down.weight": (4, 6)}, f"{STEM}: it has only one of its two factors"),
        ({f"{STEM}.lora_up.weight": (8, 4)}, f"{STEM}: it has only one of its two factors"),
        ({f"{STEM}.alpha": ()}, f"{STEM}: it has no factors"),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), f"{STEM}.lora_A.weight": (4, 6)},
            f"{STEM}.lora_down.weight: the module has this factor twice, in two spellings",
        ),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), **peft(TO_Q, (4, 6), (8, 4))},
            f"unet.{TO_Q}: {TO_Q}.weight is already changed by {STEM}, another spelling",
        ),
        (
            {**peft(TO_Q, (4, 6), (8, 4)), **peft(TO_Q, (4, 6), (8, 4), "")},
            f"{TO_Q}.weight is already changed by {TO_Q}, another spelling",
        ),
        ({f"{STEM}.dora_scale": (8, 1)}, f"{STEM}: it has no factors"),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), f"{STEM}.dora_scale": (1, 8)},
            f"{STEM}.dora_scale: DoRA needs one magnitude for each of the 8 outputs or the 6",
        ),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), f"{STEM}.dora_scale": (7, 1)},
            f"{STEM}.dora_scale: DoRA needs one magnitude for each of the 8 outputs or the 6",
        ),
        (
            {**peft(TO_Q, (4, 6), (8, 4)), f"unet.{TO_Q}.lora_magnitude_vector": (6,)},
            f"unet.{TO_Q}.lora_magnitude_vector: DoRA needs one magnitude for each of the 8",
        ),
        ({f"{STEM}.hada_w1_a": (8, 2)}, f"{STEM}: it lacks its factor w1_b and w2_a and w2_b"),
        (
            {f"{STEM}.{role}": (2, 2) for role in ("hada_w1_a", "lokr_w1")},
            f"{STEM}: it mixes the factors hada_w1_a, lokr_w1 of several forms",
        ),
        (loha((8, 2), (2, 5)), f"{STEM}: its delta has shape [8, 5] and"),
        (loha((8, 2), (3, 6)), f"{STEM}: factors [8, 2] and [3, 6] do not multiply"),
        (
            {**loha((8, 2), (2, 6)), f"{STEM}.hada_w2_b": (2, 7)},
            "its halves have shapes [8, 6] and [8, 7]",
        ),
        ({**loha((2, 8), (2, 6)), f"{STEM}.hada_t1": (2, 2, 1, 1)}, "only one of its two cores"),
        ({f"{STEM}.lokr_w1": (2, 2)}, f"{STEM}: it lacks its factor w2_a and w2_b"),
        (lokr(w1=(2, 2), w2=(4, 4)), f"{STEM}: its delta has shape [8, 8] and"),
        (lokr(w1=(2, 2), w2=(4, 3), w2_a=(4, 1)), f"{STEM}: it has w2 both whole and in factors"),
        (lokr(w1=(2, 2), w2_a=(4, 1), w2_b=(2, 3)), "factors [4, 1] and [2, 3] do not multiply"),
        (lokr(w1=(2,), w2=(4, 3)), "factors [2] and [4, 3] have no Kronecker product"),
        (
            lokr(w1_a=(2, 1), w1_b=(1, 2), w2_a=(4, 2), w2_b=(2, 3)),
            f"{STEM}: its factors have ranks 1 and 2, so its scale is open",
        ),
        ({f"{STEM}.lora_mid.weight": (2, 2, 3, 3)}, f"{STEM}: it has only one of its two factors"),
        (
            {
                **kohya(CONV, (2, 8, 1, 1), (10, 2, 1, 1)),
                f"{CONV_STEM}.lora_mid.weight": (2, 3, 3, 3),
            },
            "factors [10, 2, 1, 1], [2, 3, 3, 3] and [2, 8, 1, 1] do not multiply",
        ),
        ({f"unet.{TO_Q}.lora.down.weight": (4, 6)}, f"unet.{TO_Q}: it has only one"),
        (
            {"unet.a.processor.to_q_lora.down.weight": (4, 6)},
            "unet.a.processor.to_q_lora: the target has no weight of this name",
        ),
        ({"lora_te_text_model_mlp_fc1.lora_down.weight": (4, 6)}, "it belongs to text_encoder, "),
        ({"lora_te1_text_model_mlp_fc1.alpha": ()}, "it belongs to text_encoder, "),
        ({"lora_te2_text_model_mlp_fc1.alpha": ()}, "it belongs to text_encoder_2, "),
        ({"text_encoder.text_model.q_proj.lora_A.weight": (4, 6)}, "belongs to text_encoder, "),
        ({"text_encoder_2.text_model.q_proj.lora_B.weight": (4, 6)}, "to text_encoder_2, "),
        (
            {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 6)},
            "lora_unet_input_blocks_4_1_proj_in: the target has no weight of this name",
        ),
        (
            {"diffusion_model.input_blocks.0.lora_A.weight": (4, 6)},
            "diffusion_model.input_blocks.0: the target has no weight of this name",
        ),
        ({f"{STEM}.diff": (8, 7)}, f"{STEM}: its delta has shape [8, 7] and {TO_Q}.weight has"),
        ({f"{STEM}.diff_b": (8,)}, f"{STEM}.diff_b: its difference has shape [8] and the target"),
        ({f"{STEM}.w_norm": (8,)}, f"{STEM}: its delta has shape [8] and {TO_Q}.weight has"),
        ({f"{STEM}.b_norm": (8,)}, f"{STEM}.b_norm: its difference has shape [8] and the target"),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), f"{STEM}.diff": (8, 6)},
            f"{STEM}: it has a whole difference and factors of one too",
        ),
        ({f"{STEM}.boft_R": (2, 4, 4)}, f"{STEM}.boft_R: BOFT is not supported"),
        ({f"{TO_Q}.ia3_l": (8, 1)}, f"{TO_Q}.ia3_l: IA3 is not supported"),
        ({f"{TO_Q}.vera_lambda_b": (8,)}, f"{TO_Q}.vera_lambda_b: VeRA is not supported"),
        ({"bundle_emb.word.clip_l": (1, 8)}, "bundle_emb.word.clip_l: an embedding stored beside"),
        ({f"{STEM}.on_input": ()}, f"{STEM}.on_input: IA3 is not supported"),
        ({f"{STEM}.a1.weight": (8, 2)}, f"{STEM}.a1.weight: GLoRA is not supported"),
        ({f"{STEM}.oft_blocks": (2, 4, 4)}, f"{STEM}.oft_blocks: OFT is not supported"),
        ({f"{STEM}.oft_blocks.0": (4, 4)}, f"{STEM}.oft_blocks.0: OFT is not supported"),
        ({f"unet.{TO_Q}.oft_R.weight": (2, 6)}, f"unet.{TO_Q}.oft_R.weight: OFT is not supported"),
        (kohya(TO_Q, (4, 7), (8, 4)), f"{STEM}: its delta has shape [8, 7] and {TO_Q}.weight has"),
        (kohya(TO_Q, (4, 6), (9, 4)), f"{STEM}: its delta has shape [9, 6] and {TO_Q}.weight has"),
        (kohya(TO_Q, (8, 6), (6, 8)), "[6, 6]"),
        (kohya(CONV, (2, 8), (10, 2)), "delta has shape [10, 8] and"),
        (kohya(CONV, (2, 8, 1, 1), (10, 2, 1, 1)), "delta has shape [10, 8, 1, 1] and"),
        (kohya("mid_block.resnets.0.norm1", (2, 1), (8, 2)), "has shape [8]"),
        (kohya(TO_Q, (4, 6), (8, 3)), f"{STEM}: factors [8, 3] and [4, 6] do not multiply"),
        (kohya(TO_Q, (4,), (8, 4)), "factors [8, 4] and [4] do not multiply"),
        (kohya(TO_Q, (4, 6), ()), "factors [] and [4, 6] do not multiply"),
        (kohya(TO_Q, (0, 6), (8, 0)), f"{STEM}: it is empty: its factors have rank 0"),
        (kohya(CONV, (2, 8, 3, 3), (10, 2, 3, 3)), "do not multiply"),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), f"{STEM}.alpha": (2,)},
            f"{STEM}.alpha: alpha must be one number, not of shape [2]",
        ),
        (
            {**kohya(TO_Q, (4, 6), (8, 4)), f"{STEM}.alpha": (0,)},
            f"{STEM}.alpha: alpha must be one number, not of shape [0]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_applied_is_named(shapes: Shapes, problem: str) -> None:
    table = parse(shapes)
    assert any(problem in line for line in table.problems), table.problems


def test_one_bad_module_leaves_the_others() -> None:
    shapes = {
        **kohya(CONV, (2, 8, 3, 3), (10, 2, 1, 1)),
        **kohya(TO_Q, (4, 7), (8, 4)),
        "lora_te_x.alpha": (),
        "x": (),
    }
    table = parse(shapes)
    assert [module.key for module in table.modules] == [f"{CONV}.weight"]
    assert [problem.split(":")[0] for problem in table.problems] == ["x", "lora_te_x", STEM]


def test_a_target_with_ambiguous_names_is_a_problem() -> None:
    target = {"a.b_c.weight": (2, 2), "a_b.c.weight": (2, 2)}
    table = parse_adapters(kohya("a.b.c", (1, 2), (2, 1)), {}, {"unet": target}, SD1)
    assert table.modules == ()
    assert table.problems[-1] == (
        "lora_unet_a_b_c: a.b_c.weight and a_b.c.weight have the same name in this spelling"
    )
    # Their dotted names differ, so a LoRA that uses these is no problem.
    dotted = parse_adapters(peft("a.b_c", (1, 2), (2, 1)), {}, {"unet": target}, SD1)
    assert [module.key for module in dotted.modules] == ["a.b_c.weight"]
    assert not dotted.problems


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_conv_in.lora_down.weight", True),
        ("lora_unet_conv_in.lora_up.weight", True),
        ("unet.conv_in.lora_A.weight", True),
        ("unet.conv_in.lora_B.weight", True),
        ("lora_te_x.dora_scale", True),
        ("lora_unet_x.hada_w1_a", True),
        ("lora_unet_x.lokr_w2", True),
        ("unet.x.lora.up.weight", True),
        ("unet.x.processor.to_q_lora.down.weight", True),
        ("conv_in.weight", False),
        ("down_blocks.0.resnets.0.alpha", False),
        ("lora.weight", False),
    ],
)
def test_adapters_of_any_kind_are_told_from_models(key: str, expected: bool) -> None:
    assert is_lora(["conv_in.bias", key]) is expected


# ------------------------------------------------------------------------------------- property

STEMS = st.sampled_from(
    [
        *(f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in TARGET),
        *(f"unet.{key.removesuffix('.weight')}" for key in TARGET),
        *(
            TO_Q,
            "",
            "unet.",
            "lora_unet_",
            "lora_te_x",
            "lora_unet_input_blocks_1",
            "text_encoder.x",
        ),
        *("diffusion_model.x", "unet.unet.conv_in", "lora_unet_lora_unet_conv_in"),
    ]
)
SUFFIXES = st.sampled_from(
    [
        *ROLES,
        *(".lora.down.weight", ".dora_scale", ".hada_w1_a", ".lokr_w1", ".lora_mid.weight"),
        *(".weight", ".bias", "", ".lora_A.default.weight", ".lora_B.bias"),
    ]
)
FACTORS = st.sampled_from(
    [
        *((), (1,), (0, 6), (2, 6), (2, 8), (8, 2), (6, 2), (2, 4, 3, 3), (2, 8, 3, 3)),
        *((2, 8, 1, 1), (8, 2, 1, 1), (10, 2, 1, 1), (4, 2, 1, 1), (8, 2, 3, 3)),
    ]
)
PAIRS = st.sampled_from(
    [
        kohya(TO_Q, (2, 6), (8, 2)),
        peft(TO_Q, (2, 6), (8, 2)),
        kohya("conv_in", (2, 4, 3, 3), (8, 2, 1, 1)),
        peft("conv_out", (2, 8, 3, 3), (4, 2, 1, 1)),
        kohya(CONV, (2, 8, 3, 3), (10, 2, 1, 1), alpha=False),
    ]
)
FILES = st.builds(
    lambda pairs, loose: {**{k: v for pair in pairs for k, v in pair.items()}, **loose},
    st.lists(PAIRS, max_size=3),
    st.dictionaries(
        st.builds(str.__add__, STEMS, SUFFIXES) | st.text(max_size=5), FACTORS, max_size=6
    ),
)


@settings(deadline=None, max_examples=250)
@given(
    shapes=FILES,
    alpha=st.none() | st.integers(1, 9),
    patterns=st.dictionaries(st.sampled_from(["to_q", "conv_in", CONV, "x"]), st.integers(1, 9)),
)
def test_no_key_is_ever_skipped(
    shapes: Shapes, alpha: int | None, patterns: dict[str, int]
) -> None:
    table = parse(shapes, adapter(lora_alpha=alpha, alpha_pattern=patterns))
    for module in table.modules:
        factors = dict(module.factors)
        down, up, weight = shapes[factors["down"]], shapes[factors["up"]], TARGET[module.key]
        assert down[0] == up[1] == module.rank > 0
        assert up[0] == weight[0]
        assert module.columns == element_count(down[1:]) <= element_count(weight[1:])
        assert module.alpha_key is None or module.alpha is None
    paths = [module.key.removesuffix(".weight") for module in table.modules]
    for pattern in patterns:
        is_used = any(path == pattern or path.endswith(f".{pattern}") for path in paths)
        unused = f"lora_adapter_metadata: alpha_pattern {pattern!r} fits no module"
        assert (unused in table.problems) == (not is_used)
