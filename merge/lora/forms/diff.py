"""A whole difference, of the weight's own shape."""

from __future__ import annotations

from merge.lora.forms.model import Array, Factors, Form, Product, Shapes, matrix


def _product(factors: Shapes) -> Product:
    return Product("diff", 0, factors["diff"])


def _rows(factors: Factors, start: int, stop: int) -> Array:
    return matrix(factors["diff"])[start:stop]


DIFF = Form("diff", _product, _rows)
