"""Which names a state dict uses, and what calls of them stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from merge.reader.pickles.values import DTYPES, STORAGE_DTYPES, Global, Opaque, Pairs, Tensor

# torch's own functions that a state dict calls, and with how many arguments.
_REBUILDS: dict[str, tuple[int, ...]] = {
    "_rebuild_tensor": (4,),
    "_rebuild_tensor_v2": (6, 7),
    "_rebuild_tensor_v3": (7, 8),
    "_rebuild_parameter": (3,),
    "_rebuild_parameter_with_state": (4,),
}
# What never occurs in a model and often in attacks. This is no protection, which is that nothing
# is looked up or called; but whoever is sent such a file should hear of it.
_ATTACK_MODULES = {
    *("os", "posix", "nt", "subprocess", "pty", "sys", "runpy", "importlib", "imp", "socket"),
    *("shutil", "ctypes", "code", "codeop", "commands", "webbrowser", "marshal", "pickle"),
    *("_pickle", "cPickle", "pdb", "bdb", "timeit", "pip"),
}
_ATTACK_BUILTINS = {
    *("eval", "exec", "execfile", "compile", "open", "__import__", "breakpoint", "input"),
    *("globals", "locals"),
}


def describe_call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Return what a call would make; every function but torch's own few stays a name."""
    count = len(arguments)
    if (function.module, function.attribute) == ("collections", "OrderedDict") and count == 0:
        return Pairs(is_ordered=True)
    if (function.module, function.attribute) == ("torch", "Size") and count == 1:
        return arguments[0]
    if (function.module, function.attribute) == ("_codecs", "encode") and count == 2:
        # How bytes are written at protocol 2. What they are is of no use here.
        return b""
    if function.module == "torch._utils":
        counts = _REBUILDS.get(function.attribute, ())
        if count in counts and function.attribute.startswith("_rebuild_tensor"):
            storage, offset, shape, stride = arguments[:4]
            hooks = arguments[5] if count > 5 else Pairs()
            dtype = arguments[6] if function.attribute == "_rebuild_tensor_v3" else None
            # Whether the numbers are meant negated or conjugated; left out when they are not.
            metadata = arguments[counts[-1] - 1] if count == counts[-1] > 4 else Pairs()
            return Tensor(storage, offset, shape, stride, dtype, hooks, metadata)
        if count in counts and isinstance(arguments[0], Tensor):
            # Attributes could hold other data for the parameter.
            state = arguments[3] if count == 4 else Pairs()
            if isinstance(state, Pairs) and not state.items:
                return replace(arguments[0], hooks=arguments[2])
    return Opaque(function.name)


def is_known(name: Global) -> bool:
    """Return True for a name that a state dict needs."""
    match name:
        case Global("collections", "OrderedDict") | Global("_codecs", "encode"):
            return True
        case Global("torch", "Size" | "device"):
            return True
        case Global("torch", attribute):
            return attribute in STORAGE_DTYPES or attribute in DTYPES
        case Global("torch.storage", "UntypedStorage"):
            return True
    return name.module == "torch._utils" and name.attribute in _REBUILDS


def looks_like_attack(name: Global) -> bool:
    """Return True for a name that occurs in attacks and never in a model."""
    if name.module in ("builtins", "__builtin__"):
        return name.attribute in _ATTACK_BUILTINS
    return name.module.partition(".")[0] in _ATTACK_MODULES
