"""The products of adapters' factors, against LyCORIS, peft and einsum in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.functional import locon, loha, lokr
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer

from merge.lora.dora import dora_delta_rows
from merge.lora.forms.table import delta_rows, product_of, row_steps

Arrays = dict[str, np.ndarray]
FULL = {"lora": "", "locon": "", "loha": "hada_", "lokr": "lokr_"}


def random(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    generator = np.random.default_rng(seed)
    return {role: generator.standard_normal(shape) for role, shape in shapes.items()}


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {role: torch.from_numpy(array) for role, array in arrays.items()}


def lycoris_delta(form: str, arrays: Arrays) -> np.ndarray:
    """Return LyCORIS's own product as `(out, in*kh*kw)`."""
    get = tensors(arrays).get
    if form in ("lora", "locon"):
        delta = locon.diff_weight(get("down"), get("up"), get("mid"), backend="torch")
    elif form == "loha":
        roles = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        delta = loha.diff_weight(*map(get, roles), backend="torch")
    else:
        roles = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        # It divides gamma by what it takes for the rank, which around a core is the wrong side.
        ranked = next((arrays[role] for role in ("w1_a", "w2_a") if role in arrays), None)
        gamma = 1.0 if ranked is None else float(ranked.shape[1])
        delta = lokr.diff_weight(*map(get, roles), gamma=gamma, backend="torch")
    return delta.reshape(len(delta), -1).numpy()


def einsum_delta(form: str, f: Arrays) -> np.ndarray:
    """Return the product spelled out in numpy, as `(out, in*kh*kw)`."""

    def core(left: np.ndarray, middle: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.einsum("op,pqhw,qi->oihw", left, middle, right)

    if form == "lora":
        delta = np.einsum("or,ri->oi", flat(f["up"]), flat(f["down"]))
    elif form == "locon":
        delta = core(flat(f["up"]), f["mid"], flat(f["down"]))
    elif form == "loha" and "t1" in f:
        delta = core(f["w1_a"].T, f["t1"], f["w1_b"]) * core(f["w2_a"].T, f["t2"], f["w2_b"])
    elif form == "loha":
        delta = np.einsum("or,ri,os,si->oi", f["w1_a"], f["w1_b"], f["w2_a"], f["w2_b"])
    else:
        coarse = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
        if "t2" in f:
            fine = core(f["w2_a"].T, f["t2"], f["w2_b"])
        else:
            fine = f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"]
        delta = np.einsum("lm,kn->lkmn", coarse, flat(fine))
        # The kernel's positions run fastest in a row, and belong to the fine factor.
        delta = delta.reshape(coarse.shape[0] * fine.shape[0], -1)
    return flat(delta)


def flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


CASES = {
    "linear": ("lora", random(1, down=(3, 6), up=(8, 3)), (8, 6)),
    "conv": ("lora", random(2, down=(3, 4, 3, 3), up=(8, 3, 1, 1)), (8, 4, 3, 3)),
    "core": (
        "locon",
        random(3, down=(3, 4, 1, 1), mid=(3, 3, 3, 3), up=(8, 3, 1, 1)),
        (8, 4, 3, 3),
    ),
    "loha": ("loha", random(4, w1_a=(8, 2), w1_b=(2, 6), w2_a=(8, 2), w2_b=(2, 6)), (8, 6)),
    "loha core": (
        "loha",
        random(
            *(5,), w1_a=(2, 8), w1_b=(2, 4), t1=(2, 2, 3, 3), w2_a=(2, 8), w2_b=(2, 4),
            t2=(2, 2, 3, 3),
        ),
        (8, 4, 3, 3),
    ),
    "lokr": ("lokr", random(6, w1=(2, 3), w2=(4, 2)), (8, 6)),
    "lokr conv": ("lokr", random(7, w1=(2, 3), w2=(4, 2, 3, 3)), (8, 6, 3, 3)),
    "lokr fine": ("lokr", random(8, w1=(2, 3), w2_a=(4, 2), w2_b=(2, 5)), (8, 15)),
    "lokr both": ("lokr", random(9, w1_a=(3, 2), w1_b=(2, 3), w2_a=(4, 2), w2_b=(2, 5)), (12, 15)),
    "lokr coarse": ("lokr", random(10, w1_a=(3, 2), w1_b=(2, 3), w2=(4, 5)), (12, 15)),
    "lokr core": (
        "lokr",
        random(11, w1=(2, 3), w2_a=(2, 4), w2_b=(2, 5), t2=(2, 2, 3, 3)),
        (8, 15, 3, 3),
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize(("form", "factors", "shape"), CASES.values(), ids=CASES.keys())


@EACH
def test_products_are_those_of_lycoris(form: str, factors: Arrays, shape: tuple[int, ...]) -> None:
    expected = lycoris_delta(form, factors)
    assert expected.shape == (shape[0], np.prod(shape[1:]))
    np.testing.assert_allclose(delta_rows(form, factors, 0, shape[0]), expected, rtol=1e-12)


@EACH
def test_products_are_those_of_einsum(form: str, factors: Arrays, shape: tuple[int, ...]) -> None:
    expected = einsum_delta(form, factors)
    assert expected.size == np.prod(shape)
    np.testing.assert_allclose(delta_rows(form, factors, 0, shape[0]), expected, rtol=1e-12)


@EACH
def test_any_rows_can_be_had_on_numpy_and_torch(
    form: str, factors: Arrays, shape: tuple[int, ...]
) -> None:
    expected = einsum_delta(form, factors)
    for start in range(shape[0]):
        for stop in range(start + 1, shape[0] + 1):
            rows = delta_rows(form, factors, start, stop)
            same = delta_rows(form, tensors(factors), start, stop)
            np.testing.assert_allclose(rows, expected[start:stop], rtol=1e-12)
            np.testing.assert_allclose(same.numpy(), expected[start:stop], rtol=1e-12)


@EACH
def test_shapes_alone_tell_the_form(form: str, factors: Arrays, shape: tuple[int, ...]) -> None:
    product = product_of({FULL[form] + role: array.shape for role, array in factors.items()})
    assert product.form == form
    assert product.shape == shape
    whole = form == "lokr" and {"w1", "w2"} <= factors.keys()
    assert product.rank == (0 if whole else {"lora": 3, "locon": 3}.get(form, 2))


SIZES = st.integers(1, 4)


@settings(deadline=None, max_examples=150)
@given(sizes=st.tuples(*[SIZES] * 5), data=st.data(), seed=st.integers(0, 99))
def test_kronecker_rows_of_any_sizes(
    sizes: tuple[int, ...], data: st.DataObject, seed: int
) -> None:
    coarse_rows, coarse_columns, rows, columns, kernel = sizes
    factors = random(seed, w1=(coarse_rows, coarse_columns), w2=(rows, columns, kernel, kernel))
    start = data.draw(st.integers(0, coarse_rows * rows - 1))
    stop = data.draw(st.integers(start + 1, coarse_rows * rows))
    whole = torch.kron(tensors(factors)["w1"][..., None, None], tensors(factors)["w2"])
    expected = whole.reshape(coarse_rows * rows, -1).numpy()[start:stop]
    np.testing.assert_allclose(delta_rows("lokr", factors, start, stop), expected, rtol=1e-12)


@settings(deadline=None, max_examples=150)
@given(start=st.integers(0, 20), count=st.integers(1, 20), most=st.integers(0, 25), data=st.data())
def test_steps_cover_every_row_once_and_never_cut_a_kronecker_product(
    start: int, count: int, most: int, data: st.DataObject
) -> None:
    period = data.draw(st.integers(1, 9))
    fine = data.draw(
        st.sampled_from(
            [
                {"w2": np.zeros((period, 3, 1, 1))},
                {"w2_a": np.zeros((period, 2)), "w2_b": np.zeros((2, 3))},
                {"w2_a": np.zeros((2, period)), "t2": np.zeros((2, 2, 3, 3))},
            ]
        )
    )
    for form, factors in (("lokr", fine), ("loha", {})):
        steps = list(row_steps(form, factors, start, start + count, most))
        assert [row for begin, end in steps for row in range(begin, end)] == list(
            range(start, start + count)
        )
        for begin, end in steps:
            assert 0 < end - begin <= max(most, 1)
            if form == "lokr":
                within_one = begin // period == (end - 1) // period
                assert within_one or begin % period == end % period == 0


# ----------------------------------------------------------------------------------------- DoRA


def test_dora_of_a_linear_layer_is_that_of_peft() -> None:
    arrays = random(20, base=(8, 6), down=(3, 6), up=(8, 3), magnitude=(8,))
    found = tensors(arrays)
    layer = DoraLinearLayer(False)
    layer.weight = torch.nn.Parameter(found["magnitude"])
    strength = 0.75
    norm = layer.get_weight_norm(found["base"], found["up"] @ found["down"], strength)
    adapted = found["magnitude"][:, None] / norm.detach()[:, None]
    adapted = adapted * (found["base"] + strength * found["up"] @ found["down"])
    rows = dora_delta_rows(
        arrays["base"], strength * delta_rows("lora", arrays, 0, 8), arrays["magnitude"]
    )
    np.testing.assert_allclose(rows, (adapted - found["base"]).numpy(), rtol=1e-10)


def test_dora_of_a_convolution_is_that_of_peft() -> None:
    arrays = random(21, base=(8, 4, 3, 3), down=(2, 4, 3, 3), up=(8, 2, 1, 1), magnitude=(8,))
    found = tensors(arrays)
    layer = DoraConv2dLayer(False)
    delta = torch.from_numpy(delta_rows("lora", arrays, 0, 8)).reshape(8, 4, 3, 3)
    norm = layer.get_weight_norm(found["base"], delta, 0.5).detach()
    assert norm.shape == (1, 8, 1, 1)
    factor = (found["magnitude"] / norm.reshape(-1)).reshape(-1, 1, 1, 1)
    expected = factor * (found["base"] + 0.5 * delta) - found["base"]
    rows = dora_delta_rows(
        flat(arrays["base"]), 0.5 * delta_rows("lora", arrays, 0, 8), arrays["magnitude"]
    )
    np.testing.assert_allclose(rows, expected.reshape(8, -1).numpy(), rtol=1e-10)


def test_dora_gives_rows_their_lengths_and_leaves_zeros() -> None:
    arrays = random(22, base=(5, 7), delta=(5, 7), magnitude=(5,))
    base, delta, magnitude = arrays["base"], arrays["delta"], np.abs(arrays["magnitude"])
    delta[3] = -base[3]
    adapted = base + dora_delta_rows(base, delta, magnitude)
    lengths = np.linalg.norm(adapted, axis=1)
    np.testing.assert_allclose(lengths, np.where(np.arange(5) == 3, 0, magnitude), atol=1e-12)
    same = dora_delta_rows(*(torch.from_numpy(array) for array in (base, delta, magnitude)))
    np.testing.assert_allclose(same.numpy(), adapted - base, atol=1e-12)


def test_dora_of_the_norms_of_its_base_and_no_delta_changes_nothing() -> None:
    base = random(23, base=(5, 7))["base"]
    rows = dora_delta_rows(base, np.zeros_like(base), np.linalg.norm(base, axis=1))
    np.testing.assert_allclose(rows, 0, atol=1e-14)
