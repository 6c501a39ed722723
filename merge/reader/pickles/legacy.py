"""What a file with a pickle's suffix is when it is not the zip archive that torch writes today."""

from __future__ import annotations

import re

from merge.errors import CheckpointError
from merge.header.model import LENGTH_BYTES
from merge.header.parse import MAX_HEADER_BYTES, sniff

HEAD_BYTES = 512
# torch.save before 1.6 begins with a pickle of this number.
_OLD_MAGIC = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_PROTOCOL_0 = re.compile(rb"[ci][A-Za-z_][\w.]*\r?\n[A-Za-z_][\w.]*\r?\n|[(\]}][\[(ldpiSVIFcq]")


def describe_foreign(head: bytes, name: str) -> CheckpointError:
    """Return the error that says what a file really is, and the safe way to use it.

    Args:
        head: Its first 512 bytes, or all when it is shorter.
        name: Its name, for the hint.
    """
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and length <= MAX_HEADER_BYTES:
        return CheckpointError("it is a safetensors file", hint="give it the suffix .safetensors")
    if head[257:262] == b"ustar":
        return _old("a tar file of PyTorch 0.1", name)
    if re.fullmatch(rb"\x80[\x02-\x05]", head[:2]) and head[2:].startswith(_OLD_MAGIC):
        return _old("a pickle of PyTorch before 1.6", name)
    what = sniff(head[:64])
    if not what and _PROTOCOL_0.match(head):
        what = "a Python pickle"
    if what == "a Python pickle":
        return CheckpointError(
            "it is a bare Python pickle, not a checkpoint that torch.save wrote: it can run code "
            "and is not read",
            hint="use a .safetensors version of the model",
        )
    detail = f"it is {what}" if what else "it is no zip archive, as torch.save writes them"
    return CheckpointError(f"this is no PyTorch checkpoint: {detail}")


def _old(what: str, name: str) -> CheckpointError:
    stem = name.rpartition(".")[0] or name
    return CheckpointError(
        f"it is {what}, whose tensors can only be found by running it; it is not read",
        hint="convert it once where it can do no harm, such as a container without a network: "
        'python -c "import torch, safetensors.torch as s; '
        f"d = torch.load({name!r}, map_location='cpu', weights_only=True); "
        "s.save_file({k: v.contiguous() for k, v in d.get('state_dict', d).items()}, "
        f'{stem + ".safetensors"!r})"',
    )
