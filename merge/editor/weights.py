"""Weights that are at hand in memory, put into a network in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from merge.engine.buffers import TORCH_DTYPES
from merge.errors import CheckpointError, list_first
from merge.header.model import Header
from merge.json_files import read_json

Tensors = Mapping[str, torch.Tensor]

# Of text encoders: in files, and not in the modules that transformers builds from 5.6 on.
_PREFIX = "text_model."


def view_tensors(data: memoryview, header: Header) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file that is in memory, without a copy.

    Args:
        data: The whole file, writable.
        header: Of the file.
    """
    tensors = {}
    for spec in header.tensors:
        dtype = TORCH_DTYPES.get(spec.dtype) or _other_dtype(spec.dtype)
        part = data[spec.start : spec.start + spec.size_bytes]
        values = torch.frombuffer(part, dtype=dtype) if part.nbytes else torch.empty(0, dtype=dtype)
        tensors[spec.name] = values.view(spec.shape)
    return tensors


def _other_dtype(code: str) -> torch.dtype:
    """Return the dtype of tensors that no merge touches, such as position ids."""
    return {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}[code]


def build_network(
    folder: Path, entry: tuple[str, str], tensors: Tensors, dtype: torch.dtype
) -> Any:
    """Build a network of its config, with these weights.

    Args:
        folder: With its `config.json`.
        entry: Library and class, as `model_index.json` names them.
        tensors: All of its weights.
        dtype: Of the network.

    Raises:
        CheckpointError: weights are missing, too many, or of another shape.
    """
    import diffusers
    import transformers

    library, name = entry
    config = read_json(folder / "config.json")
    if library == "transformers":
        kind = getattr(transformers, name)
        network = kind.from_pretrained(
            None, config=kind.config_class.from_dict(config), state_dict=dict(tensors), dtype=dtype
        )
        put_tensors(network, tensors, folder.name)
        return network.eval()
    kind = getattr(diffusers, name)
    # Its first weights would be random numbers, which take as long to draw as a merge does.
    with torch.device("meta"):
        network = kind.from_config(config)
    if any(module._non_persistent_buffers_set for module in network.modules()):
        # Their values are in no file, only in what builds them.
        network = torch.nn.Module.to(kind.from_config(config), dtype)
    else:
        network = torch.nn.Module.to(network, dtype).to_empty(device="cpu")
    put_tensors(network, tensors, folder.name)
    return network.eval()


def put_tensors(network: torch.nn.Module, tensors: Tensors, name: str) -> None:
    """Replace a network's weights in place; only their values change, and no memory is taken.

    Args:
        network: On any device, of any dtype.
        tensors: Key to values; the keys may be those of a file or of the module.
        name: Of the component, for messages.

    Raises:
        CheckpointError: weights are missing, too many, or of another shape; nothing was replaced.
    """
    state = network.state_dict()
    named = {_key_in(state, key): value for key, value in tensors.items()}
    missing, unknown = sorted(state.keys() - named.keys()), sorted(named.keys() - state.keys())
    shapes = [key for key in state.keys() & named.keys() if state[key].shape != named[key].shape]
    # What older files hold beside the weights, and no module has any more.
    unknown = [key for key in unknown if not key.endswith("position_ids")]
    if problem := next(
        (
            f"{name}: {what} {list_first(sorted(keys))}"
            for what, keys in (
                ("there are no weights for", missing),
                ("there is no place for", unknown),
                ("its config wants other shapes of", shapes),
            )
            if keys
        ),
        "",
    ):
        raise CheckpointError(problem)
    with torch.no_grad():
        for key, place in state.items():
            place.copy_(named[key])


def _key_in(state: Mapping[str, Any], key: str) -> str:
    """Return what a module calls a tensor of a file."""
    if key in state or not key.startswith(_PREFIX):
        return key if key in state or _PREFIX + key not in state else _PREFIX + key
    return key.removeprefix(_PREFIX)
