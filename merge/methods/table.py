"""Every method that a recipe can name."""

from merge.methods.add_difference import add_difference
from merge.methods.capped_difference import capped_difference
from merge.methods.dare import dare
from merge.methods.dare_ties import dare_ties
from merge.methods.model import Method
from merge.methods.slerp import slerp
from merge.methods.ties import ties
from merge.methods.train_difference import train_difference

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            add_difference,
            "target + weight * (distilled - base)",
            "arXiv:2212.04089",
            is_sum=True,
        ),
        Method(
            ties,
            "target + weight * agreeing(largest(distilled - base, density))",
            "arXiv:2306.01708",
            is_whole=True,
        ),
        Method(
            dare,
            "target + weight * random(distilled - base, density) / density",
            "arXiv:2311.03099",
        ),
        Method(
            dare_ties,
            "target + weight * agreeing(random(distilled - base, density) / density)",
            "arXiv:2311.03099, arXiv:2306.01708",
        ),
        Method(
            slerp,
            "slerp(target, target + weight * (distilled - base), t)",
            "doi:10.1145/325165.325242",
            is_whole=True,
        ),
        Method(
            train_difference,
            "target + 1.8 * weight * (distilled - base) * |distilled - target| "
            "/ (|distilled - target| + |distilled - base|)",
            "https://github.com/hako-mikan/sd-webui-supermerger",
        ),
        Method(
            capped_difference,
            "target + delta * min(1, cap * |target| / |delta|), "
            "delta = weight * (distilled - base)",
            "arXiv:1211.5063",
            is_whole=True,
        ),
    )
}
