"""Names that a training program put around a model's own keys."""

from __future__ import annotations

import re
from collections.abc import Collection

from merge.errors import CheckpointError

# torch.compile wraps any module, at any depth; DataParallel and FSDP wrap the whole model.
_INSIDE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OUTSIDE = "module."


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Return each key of a model to what it is without the wrappers of a training program.

    Raises:
        CheckpointError: two keys become the same.
    """
    outside = _OUTSIDE if names and all(name.startswith(_OUTSIDE) for name in names) else ""
    back: dict[str, str] = {}
    for name in names:
        inner = _INSIDE.sub("", name.removeprefix(outside))
        if inner in back:
            raise CheckpointError(
                f"{back[inner]} and {name} are one key in two wrappings",
                hint="save the model once, without torch.compile around it",
            )
        back[inner] = name
    return {name: inner for inner, name in back.items()}
