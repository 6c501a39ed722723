"""Every method that a recipe can name."""

from merge.methods.add_difference import add_difference
from merge.methods.consensus import ties
from merge.methods.dare import dare, dare_ties
from merge.methods.differences import capped_difference, train_difference
from merge.methods.model import Array, Method, Param
from merge.methods.slerp import slerp

__all__ = [
    "METHODS",
    "Array",
    "Method",
    "Param",
    "add_difference",
    "capped_difference",
    "dare",
    "dare_ties",
    "slerp",
    "ties",
    "train_difference",
]

_DENSITY = Param(
    "density", 0.5, 0, 1, "number", "part of each delta's elements that stays", is_open=True
)
# Fewer would leave next to nothing, and dividing by it overflows.
_KEPT = Param("density", 0.5, 1e-6, 1, "number", "part of each delta's elements that stays")
_SEED = Param("seed", 0, 0, 2**63 - 1, "integer", "of the random masks")
# The defaults of mergekit: with the random drop few models meet in an element.
_MEAN, _SUM = (
    Param(
        "normalize", value, None, None, "boolean", "take the mean, not the sum, of those that agree"
    )
    for value in (True, False)
)
_T = Param("t", 0.5, 0, 1, "number", "0 for the target, 1 for the target with the whole delta")
_CAP = Param(
    "cap", 1.0, 0, 1e6, "number", "largest norm of a delta, in norms of the target", is_open=True
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "add_difference",
            (),
            "target + weight * (distilled - base)",
            "arXiv:2212.04089",
        ),
        Method(
            "ties",
            (_DENSITY, _MEAN),
            "target + weight * agreeing(largest(distilled - base, density))",
            "arXiv:2306.01708",
            scope="tensor",
            combine=ties,
        ),
        Method(
            "dare",
            (_KEPT, _SEED),
            "target + weight * random(distilled - base, density) / density",
            "arXiv:2311.03099",
            combine=dare,
        ),
        Method(
            "dare_ties",
            (_KEPT, _SEED, _SUM),
            "target + weight * agreeing(random(distilled - base, density) / density)",
            "arXiv:2311.03099, arXiv:2306.01708",
            combine=dare_ties,
        ),
        Method(
            "slerp",
            (_T,),
            "slerp(target, target + weight * (distilled - base), t)",
            "doi:10.1145/325165.325242",
            scope="tensor",
            combine=slerp,
        ),
        Method(
            "train_difference",
            (),
            "target + 1.8 * weight * (distilled - base) * |distilled - target| "
            "/ (|distilled - target| + |distilled - base|)",
            "https://github.com/hako-mikan/sd-webui-supermerger",
            needs_parents=True,
            combine=train_difference,
        ),
        Method(
            "capped_difference",
            (_CAP,),
            "target + delta * min(1, cap * |target| / |delta|), "
            "delta = weight * (distilled - base)",
            "arXiv:1211.5063",
            scope="tensor",
            combine=capped_difference,
        ),
    )
}
