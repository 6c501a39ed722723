"""What a model predicts, where its file says so: a delta is of one kind of prediction only.

Source: the marker tensors that ComfyUI writes and reads (`model_type` in `supported_models.py`),
Playground v2.5's `edm_mean`, `modelspec.prediction_type` of Stability AI's ModelSpec, and what
Kohya's trainers write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

EDM = "edm"
# Marker tensors of EDM checkpoints such as cosxl_edit and Playground v2.5.
_EDM_MARKERS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
# At zero terminal SNR the noise says nothing of the picture, so such a model predicts v.
_V_MARKERS = ("v_pred", "ztsnr")
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
# Kohya's trainers say it with a flag.
_V_FLAG = "ss_v_parameterization"
_WORDS = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "velocity": "v_prediction",
    "eps": "epsilon",
    "epsilon": "epsilon",
    "sample": "sample",
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a file says that its model predicts.

    Attributes:
        kind: `epsilon`, `v_prediction`, `sample`, `edm`, or empty where nothing is said.
        evidence: What says so, e.g. `it has v_pred`.
    """

    kind: str = ""
    evidence: str = ""

    @property
    def title(self) -> str:
        """Return what the model is, with the evidence."""
        name = {EDM: "n EDM", "v_prediction": " v-prediction"}.get(self.kind, f" {self.kind}")
        if self.kind == EDM and "vpred" in self.evidence:
            name = "n EDM v-prediction"
        return f"a{name} model ({self.evidence})"


def stated_prediction(names: Collection[str], metadata: Mapping[str, str]) -> Prediction:
    """Return what a file says about its model's prediction.

    Args:
        names: Its keys.
        metadata: Its header's strings.
    """
    for kind, markers in ((EDM, _EDM_MARKERS), ("v_prediction", _V_MARKERS)):
        for marker in markers:
            if marker in names:
                return Prediction(kind, f"it has {marker}")
    for key in _METADATA:
        stated = metadata.get(key, "").strip().lower()
        if stated in _WORDS:
            return Prediction(_WORDS[stated], f"its metadata has {key} {metadata[key]}")
    if metadata.get(_V_FLAG, "").strip().lower() in ("true", "1"):
        return Prediction("v_prediction", f"its metadata has {_V_FLAG} {metadata[_V_FLAG]}")
    return Prediction()


def is_marker(name: str) -> bool:
    """Return True for a key that only tells what is predicted."""
    return name in _EDM_MARKERS or name in _V_MARKERS
