"""How large the models are and how long each stage trains, under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a stage trains.

    Attributes:
        steps: Optimizer steps; None: as many as fit into the preset's seconds.
        rate: Peak learning rate of AdamW.
    """

    steps: int | None
    rate: float


@dataclass(frozen=True, slots=True)
class Preset:
    """A way to train the models.

    Attributes:
        widths: Channels of the UNet's two levels.
        batch: Edits a step, over all processes.
        pool: Edits that are drawn, once.
        distillation_pool: Of these, for the distillation: its teacher says what is right.
        budgets: Stage to its budget. Without `vae` the autoencoder is that of the small models,
            without `lora` the LoRA is the truncated delta itself.
        seconds: Of each stage whose budget has no steps.
    """

    widths: tuple[int, int]
    batch: int
    pool: int
    distillation_pool: int
    budgets: Mapping[str, Budget]
    seconds: float = 0.0

    @property
    def is_paced(self) -> bool:
        """Return True when the clock decides how many steps there are."""
        return any(budget.steps is None for budget in self.budgets.values())


PRESETS = {
    # 7.0 M parameters on one GPU, ten minutes with the drawing of the pool.
    "large": Preset(
        widths=(112, 160),
        batch=512,
        pool=150_000,
        distillation_pool=150_000,
        budgets={
            "base": Budget(None, 1e-3),
            "target": Budget(None, 4e-4),
            "distilled": Budget(None, 1.5e-4),
        },
        seconds=140.0,
    ),
    # The same models on two CPU cores.
    "overnight": Preset(
        widths=(112, 160),
        batch=64,
        pool=150_000,
        distillation_pool=50_000,
        budgets={
            "base": Budget(24_000, 1e-3),
            "target": Budget(18_000, 4e-4),
            "distilled": Budget(4_000, 1.5e-4),
        },
    ),
    # 2.5 M parameters on two CPU cores, in little over an hour.
    "small": Preset(
        widths=(64, 96),
        batch=64,
        pool=48_000,
        distillation_pool=12_000,
        budgets={
            "vae": Budget(2_000, 2e-3),
            "base": Budget(6_000, 1e-3),
            "target": Budget(4_500, 4e-4),
            "distilled": Budget(1_000, 1.5e-4),
            "lora": Budget(150, 2e-4),
        },
    ),
}
