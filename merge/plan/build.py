"""Build a plan: rows for the output, reasons for what is left out, problems all at once."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from merge.errors import CheckpointError, PlanError
from merge.header import DTYPE_CODES, TensorSpec, encode_header
from merge.keymap import CONV_IN, GUIDANCE_EMBEDDING
from merge.lora import LoraModule, LoraTable, is_lora, parse_lora
from merge.plan.compat import Opened, OpenedSources, describe_roles, open_sources
from merge.plan.model import (
    DIGEST_KEY,
    DIGEST_PLACEHOLDER,
    DeltaTerm,
    LeftOut,
    LoraTerm,
    MergePlan,
    PlanFile,
    TensorPlan,
    TensorRef,
)
from merge.plan.patterns import block_weight, match_exclude, unmatched
from merge.reader import read_scalar
from merge.recipe.schema import Recipe
from merge.sources import Sources

_FLOATS = ("F16", "BF16", "F32")
_ARCHITECTURE_IDS = {
    "sd15": "stable-diffusion-v1-edit",
    "sd21": "stable-diffusion-v2-edit",
    "sdxl": "stable-diffusion-xl-v1-edit",
}
_PREDICTION_IDS = {"v_prediction": "v"}  # where ModelSpec's word is another than diffusers'


def build_plan(recipe: Recipe, sources: Sources) -> MergePlan:
    """Decide every output tensor before any weight is read.

    Reads headers, and scalars such as a LoRA's alpha.

    Args:
        recipe: A checked recipe.
        sources: Its models' files.

    Raises:
        CheckpointError: a weight file breaks its format.
        PlanError: keys, shapes, architectures or dtypes do not fit; all problems together.
    """
    opened = open_sources(sources, _prediction_type(recipe))
    builder = _Builder(recipe, opened)
    builder.run()
    if builder.problems:
        raise PlanError(
            "the models of this recipe do not fit together:",
            builder.problems,
            hint="a key that may stay as it is in the target can be listed under `exclude`",
        )
    assert opened.target.unet is not None
    metadata = _metadata(recipe, opened)
    layout = {row.key: (row.dtype_out, row.target.shape) for row in builder.rows}
    _, header = encode_header(layout, metadata)
    by_key = {row.key: row for row in builder.rows}
    pipeline = sources.target.pipeline
    copies = pipeline.components if pipeline is not None else ()
    return MergePlan(
        recipe=recipe.name,
        method=recipe.method,
        architecture=opened.target.unet.family,
        files=tuple(builder.files),
        tensors=tuple(by_key[spec.name] for spec in header.tensors),
        left_out=tuple(builder.left_out),
        notes=(*describe_roles(opened), *builder.notes),
        out_header=header,
        metadata=metadata,
        copy_bytes=sum(file.size_bytes for part in copies for file in part.files),
    )


def _metadata(recipe: Recipe, opened: OpenedSources) -> dict[str, str]:
    """Return the strings of the output's header.

    Source: https://github.com/Stability-AI/ModelSpec 1.0.1; architecture ids as ComfyUI writes
    them for edit models.
    """
    assert opened.target.unet is not None
    base = [opened.base] if opened.base is not None else []
    parents = [opened.target, *base, *opened.distilled]
    size = recipe.verify.resolution
    predicts = _prediction_type(recipe)
    return {
        "format": "pt",
        DIGEST_KEY: DIGEST_PLACEHOLDER,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURE_IDS[opened.target.unet.family],
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": _PREDICTION_IDS.get(predicts, predicts),
        "modelspec.merged_from": ",".join(parent.model.label for parent in parents),
    }


def _prediction_type(recipe: Recipe) -> str:
    return str(recipe.scheduler.config.get("prediction_type", "epsilon"))


@dataclass
class _Builder:
    """Collects rows, reasons and problems while it walks the keys once."""

    recipe: Recipe
    sources: OpenedSources
    files: list[PlanFile] = field(default_factory=list)
    rows: list[TensorPlan] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _offsets: dict[str, int] = field(default_factory=dict)
    _loras: dict[str, dict[str, tuple[LoraModule, float]]] = field(default_factory=dict)
    _unused: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        for opened in self._opened():
            self._add_files(opened)
            self._note_variant(opened)
        for opened in self.sources.distilled:
            if is_lora(opened.checkpoint.tensors):
                self._loras[opened.role] = self._read_lora(opened)
        self._check_patterns()
        for key, (_, spec) in sorted(self.sources.target.checkpoint.tensors.items()):
            self._plan_key(key, spec)
        for opened in self._opened()[1:]:
            if opened.role in self._loras:
                self._leave_out_modules(opened)
            else:
                self._leave_out_keys(opened)
        if not self.problems and not any(row.deltas or row.loras for row in self.rows):
            if self.recipe.allow_noop:
                self.notes.append("nothing is added: the output is the target")
            else:
                self.problems.append(
                    "nothing would be added to the target: every weight is 0 or every key is "
                    "excluded (allow_noop=true permits it)"
                )

    def _opened(self) -> list[Opened]:
        base = [self.sources.base] if self.sources.base is not None else []
        return [self.sources.target, *base, *self.sources.distilled]

    def _add_files(self, opened: Opened) -> None:
        self._offsets[opened.role] = len(self.files)
        for source, file in zip(opened.model.weights, opened.checkpoint.files, strict=True):
            self.files.append(
                PlanFile(opened.role, source.name, source.path, file.stamp, source.expected_sha256)
            )

    def _note_variant(self, opened: Opened) -> None:
        asked = {
            "target": self.recipe.models.target.variant,
            "base": self.recipe.models.base.variant if self.recipe.models.base else None,
        }.get(opened.role)
        if asked and asked != opened.model.variant:
            self.notes.append(
                f"{opened.role}: its UNet has no {asked} variant, its plain files are used"
            )

    def _ref(self, opened: Opened, key: str) -> TensorRef:
        index, spec = opened.checkpoint.tensors[key]
        return TensorRef(
            self._offsets[opened.role] + index, spec.dtype, spec.shape, spec.start, spec.size_bytes
        )

    def _check_patterns(self) -> None:
        everything = {key for opened in self._opened() for key in opened.checkpoint.tensors}
        target = self.sources.target.checkpoint.tensors
        for pattern in unmatched(self.recipe.exclude, everything):
            self.problems.append(f"exclude: {pattern!r} matches no key of any model")
        for pattern in unmatched(self.recipe.block_weights, target):
            self.problems.append(f"block_weights: {pattern!r} matches no key of the target")

    def _plan_key(self, key: str, spec: TensorSpec) -> None:
        target = self._ref(self.sources.target, key)
        if spec.dtype not in _FLOATS:
            if spec.dtype.startswith(("F", "C", "BF")):
                self.problems.append(f"{key}: {_unsupported(spec.dtype)} in the target")
                return
            self._keep(key, target, spec.dtype, "an integer tensor, kept from the target")
            return
        code = DTYPE_CODES.get(self.recipe.out_dtype, spec.dtype)
        if pattern := match_exclude(key, self.recipe.exclude):
            self._keep(key, target, code, f"excluded by {pattern!r}")
            return
        try:
            weight = block_weight(key, self.recipe.block_weights, self.recipe.weight)
        except ValueError as error:
            self.problems.append(f"block_weights: {error}")
            return
        if weight == 0:
            self._keep(key, target, code, "its weight is 0")
            return
        self._plan_delta(key, target, code, weight)

    def _plan_delta(self, key: str, target: TensorRef, code: str, weight: float) -> None:
        deltas: list[DeltaTerm] = []
        loras: list[LoraTerm] = []
        narrow = False
        count = len(self.problems)
        for opened, own in zip(self.sources.distilled, self.recipe.models.distilled, strict=True):
            scaled = weight * own.weight
            if scaled == 0:
                continue
            if opened.role in self._loras:
                entry = self._loras[opened.role].get(key)
                if entry is not None:
                    loras.append(self._lora_term(opened, entry, scaled))
                    narrow |= entry[0].channels > 0
                continue
            term = self._delta_term(key, opened, target, scaled)
            if term is not None:
                deltas.append(term)
                narrow |= term.base.shape != target.shape
        if len(self.problems) > count:
            return
        reason = ""
        if narrow:
            rule = self.recipe.channel_rule
            channels = deltas[0].base.shape[1] if deltas else loras[0].down.shape[1]
            what = f"{target.shape[1]} input channels in the target, {channels} in the delta"
            if rule == "error":
                self.problems.append(f"{key}: {what}; set channel_rule to skip or first")
                return
            if rule == "skip":
                self._keep(key, target, code, f"{what}; channel_rule skip")
                return
            reason = f"{what}; added to the first {channels}"
        if not deltas and not loras:
            has_full = len(self._loras) < len(self.sources.distilled)
            self._keep(key, target, code, "" if has_full else "not in the LoRA")
            return
        action = "delta" if deltas else "lora"
        self.rows.append(
            TensorPlan(
                key, "unet", action, target, code, tuple(deltas), tuple(loras), weight, reason
            )
        )

    def _delta_term(
        self, key: str, opened: Opened, target: TensorRef, weight: float
    ) -> DeltaTerm | None:
        base = self.sources.base
        assert base is not None
        lacking = [model.role for model in (base, opened) if key not in model.checkpoint.tensors]
        if lacking:
            self.problems.append(f"{key}: missing in {' and '.join(lacking)}")
            return None
        distilled_ref, base_ref = self._ref(opened, key), self._ref(base, key)
        for role, ref in ((opened.role, distilled_ref), (base.role, base_ref)):
            if ref.dtype not in _FLOATS:
                self.problems.append(f"{key}: {_unsupported(ref.dtype)} in {role}")
                return None
        shapes = (target.shape, base_ref.shape, distilled_ref.shape)
        narrow = key == CONV_IN and _is_narrower(base_ref.shape, target.shape)
        if base_ref.shape != distilled_ref.shape or not (base_ref.shape == target.shape or narrow):
            self.problems.append(
                f"{key}: shape {list(shapes[0])} in target, {list(shapes[1])} in base, "
                f"{list(shapes[2])} in {opened.role}"
            )
            return None
        return DeltaTerm(opened.role, distilled_ref, base_ref, round_weight(weight))

    def _lora_term(
        self, opened: Opened, entry: tuple[LoraModule, float], weight: float
    ) -> LoraTerm:
        module, alpha = entry
        down, up = self._ref(opened, module.down), self._ref(opened, module.up)
        for ref, name in ((down, module.down), (up, module.up)):
            if ref.dtype not in _FLOATS:
                self.problems.append(f"{name}: {_unsupported(ref.dtype)} in {opened.role}")
        return LoraTerm(opened.role, down, up, module.rank, weight * alpha / module.rank)

    def _keep(self, key: str, target: TensorRef, code: str, reason: str) -> None:
        action = "copy" if target.dtype == code else "cast"
        self._unused[key] = reason
        self.rows.append(TensorPlan(key, "unet", action, target, code, (), (), None, reason))

    def _read_lora(self, opened: Opened) -> dict[str, tuple[LoraModule, float]]:
        """Match a LoRA's keys and read its alphas."""
        checkpoint = opened.checkpoint
        table = parse_lora(
            checkpoint.shapes, checkpoint.metadata, self.sources.target.checkpoint.shapes
        )
        self.problems += [f"{opened.role} ({opened.model.label}): {p}" for p in table.problems]
        if not table.modules:
            self.problems.append(
                f"{opened.role} ({opened.model.label}): none of its keys fits the target"
            )
        modules: dict[str, tuple[LoraModule, float]] = {}
        for module in table.modules:
            alpha = self._alpha(opened, module)
            if alpha is None or not math.isfinite(alpha) or alpha == 0:
                name = module.alpha_key or "lora_adapter_metadata"
                self.problems.append(f"{opened.role}: {name} is {alpha}, no usable alpha")
                continue
            modules[module.key] = (module, alpha)
        self._note_missing_alpha(opened, table)
        return modules

    def _alpha(self, opened: Opened, module: LoraModule) -> float | None:
        if module.alpha_key is None:
            return float(module.rank) if module.alpha is None else module.alpha
        index, spec = opened.checkpoint.tensors[module.alpha_key]
        try:
            return read_scalar(opened.checkpoint.files[index], spec)
        except CheckpointError as error:
            self.problems.append(f"{opened.role}: {error.message}")
            return None

    def _note_missing_alpha(self, opened: Opened, table: LoraTable) -> None:
        missing = sum(m.alpha_key is None and m.alpha is None for m in table.modules)
        if missing:
            self.notes.append(
                f"{opened.role}: {missing} of {len(table.modules)} LoRA modules state no alpha, "
                "so their scale is 1"
            )

    def _leave_out_keys(self, opened: Opened) -> None:
        """Give a reason for every key of a full model that no row uses."""
        used = {row.key for row in self.rows if row.deltas}
        target = self.sources.target.checkpoint.tensors
        for key in sorted(opened.checkpoint.tensors):
            if key in used:
                continue
            if key in target:
                reason = self._unused.get(key, "not used")
                self.left_out.append(LeftOut(opened.role, key, reason))
            elif pattern := match_exclude(key, self.recipe.exclude):
                self.left_out.append(LeftOut(opened.role, key, f"excluded by {pattern!r}"))
            elif key == GUIDANCE_EMBEDDING and self.recipe.guidance_embedding == "drop":
                reason = "an InstructPix2Pix pipeline never feeds it; guidance_embedding drop"
                self.left_out.append(LeftOut(opened.role, key, reason))
            elif key == GUIDANCE_EMBEDDING:
                self.problems.append(
                    f"{key}: {opened.role} has this guidance embedding, the target has not "
                    "(guidance_embedding=drop leaves it out)"
                )
            else:
                self.problems.append(f"{key}: in {opened.role}, and not in the target")

    def _leave_out_modules(self, opened: Opened) -> None:
        used = {row.key for row in self.rows if any(t.role == opened.role for t in row.loras)}
        for key, (module, _) in self._loras[opened.role].items():
            if key not in used:
                reason = self._unused.get(key, "not used")
                names = (module.down, module.up, module.alpha_key)
                self.left_out += [LeftOut(opened.role, name, reason) for name in names if name]


def round_weight(weight: float) -> float:
    """Round a weight once to float32; the engine's arithmetic uses this value."""
    return float(struct.unpack("<f", struct.pack("<f", weight))[0])


def _is_narrower(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    """Return True when only the input channels differ, and `shape` has fewer."""
    return (
        len(shape) == len(wide) == 4
        and shape[0] == wide[0]
        and shape[2:] == wide[2:]
        and shape[1] < wide[1]
    )


def _unsupported(code: str) -> str:
    if code.startswith("F8"):
        return f"{code} is float8, which needs its scales to mean anything and is not merged yet,"
    return f"{code} cannot be merged (float16, bfloat16 and float32 can)"


def left_out_by_model(plan: MergePlan) -> Mapping[str, int]:
    """Return role to the number of its keys that are left out."""
    counts: dict[str, int] = {}
    for item in plan.left_out:
        counts[item.model] = counts.get(item.model, 0) + 1
    return counts
