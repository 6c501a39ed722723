"""Which of a model's files to use, decided on names alone, the same for folders and repos."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from merge.errors import SourceError, SourceNotFoundError
from merge.reader.pickles.archive import PICKLE_SUFFIXES

# Spellings of the weights of one component, most specific first.
_STEMS = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
    "pytorch_lora_weights",
    "adapter_model",
)
_WEIGHT_FILE = re.compile(
    r"(?P<stem>[^.]+?)"
    r"(?:\.(?P<variant>[A-Za-z0-9_-]+?))?"
    # An earlier diffusers wrote a shard's number before the variant.
    r"(?:-(?P<part>\d{5})-of-(?P<parts>\d{5})(?:\.(?P<late>[A-Za-z0-9_-]+))?)?"
    r"(?P<suffix>\.safetensors|\.bin|\.ckpt|\.pt|\.pth)"
)
_INDEX_FILE = re.compile(r".+\.(safetensors|bin)\.index(\.[A-Za-z0-9_-]+)?\.json")
PICKLE_HINT = (
    "use a version of the model with .safetensors files, or set allow_pickle: true, which reads "
    "pickles without running anything of them"
)
# Never copied: weights of other frameworks, and code.
_NOT_COPIED = (
    *PICKLE_SUFFIXES,
    ".pkl",
    ".pickle",
    ".safetensors",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
    ".pb",
    ".xml",
    ".py",
    ".pyc",
)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of one folder.

    Attributes:
        names: One file, or all shards in order.
        index: The shards' index file, if there is one.
        variant: Of the chosen files; empty for plain ones.
    """

    names: tuple[str, ...]
    index: str | None
    variant: str

    @property
    def is_sharded(self) -> bool:
        """Return True when the names are the numbered parts of one set of weights."""
        match = _WEIGHT_FILE.fullmatch(self.names[0])
        return match is not None and match["part"] is not None

    @property
    def is_pickle(self) -> bool:
        """Return True when the files are pickles."""
        return self.names[0].endswith(PICKLE_SUFFIXES)


def select_weights(
    names: Collection[str],
    variant: str | None,
    where: str,
    *,
    is_partial: bool = False,
    allow_pickle: bool = False,
) -> Weights:
    """Choose the safetensors files of one folder, or its pickles when these are allowed.

    The asked variant is taken when the folder has it, else the plain files, else the only variant
    there is: the public targets have no fp16 UNet although other parts have one.

    Args:
        names: File names of the folder, without subfolders.
        variant: Preferred variant such as `fp16`.
        where: The folder's name in messages.
        is_partial: The names are only those in a cache, so that a variant which happens to be there
            alone must not stand in for plain files that are merely not downloaded.
        allow_pickle: Take pickles of a folder that has no safetensors file.

    Raises:
        SourceNotFoundError: no usable weights, or a shard is missing.
        SourceError: several weight files and no rule to choose one.
    """
    suffixes = (".safetensors", *(PICKLE_SUFFIXES if allow_pickle else ()))
    found = [match for name in sorted(names) if (match := _WEIGHT_FILE.fullmatch(name))]
    suffix = next((s for s in suffixes if any(match["suffix"] == s for match in found)), "")
    groups: dict[tuple[str, str], list[tuple[str, re.Match[str]]]] = {}
    for match in found:
        if match["suffix"] == suffix:
            key = (match["stem"], match["variant"] or match["late"] or "")
            groups.setdefault(key, []).append((match.string, match))
    stem = _choose_stem({stem for stem, _ in groups}, names, where)
    variants = sorted(each for other, each in groups if other == stem)
    if variant in variants:
        chosen = variant or ""
    elif "" in variants:
        chosen = ""
    elif is_partial:
        raise SourceNotFoundError(f"{where} has only the variant {', '.join(variants)}")
    elif len(variants) == 1:
        chosen = variants[0]
    else:
        raise SourceError(
            f"{where} has weights only as variants: {', '.join(variants)}",
            hint="name one with `variant:` in the recipe",
        )
    members = groups[stem, chosen]
    whole = [name for name, match in members if match["part"] is None]
    if whole:
        return Weights((whole[0],), None, chosen)
    _check_shards(members, where)
    index = f"{stem}{suffix}.index{f'.{chosen}' if chosen else ''}.json"
    return Weights(tuple(name for name, _ in members), index if index in names else None, chosen)


def has_weights(names: Collection[str]) -> bool:
    """Return True when the folder of one component holds weights in any format."""
    return any(name.endswith((".safetensors", *PICKLE_SUFFIXES)) for name in names)


def companion_files(names: Collection[str]) -> list[str]:
    """Return what is copied beside the weights: configs, vocabularies and the like."""
    return [
        name
        for name in sorted(names)
        if not name.endswith(_NOT_COPIED)
        and not _INDEX_FILE.fullmatch(name)
        and not any(part.startswith(".") for part in name.split("/"))
    ]


def plain_name(name: str, variant: str) -> str:
    """Take the variant suffix off a weight or index file's name."""
    if not variant:
        return name
    for suffix in (".safetensors", *PICKLE_SUFFIXES):
        name = name.replace(f".{variant}{suffix}", suffix)
    name = name.replace(f".{variant}-", "-")
    return name.replace(f".index.{variant}.json", ".index.json")


def converted_name(name: str, variant: str) -> str:
    """Return the name of the safetensors file that a pickle, or all its shards, become."""
    match = _WEIGHT_FILE.fullmatch(plain_name(name, variant))
    stem = match["stem"] if match is not None else name.partition(".")[0]
    # transformers' own name for the same weights in the other format.
    return f"{'model' if stem == 'pytorch_model' else stem}.safetensors"


def _choose_stem(stems: set[str], names: Collection[str], where: str) -> str:
    for stem in _STEMS:
        if stem in stems:
            return stem
    if len(stems) == 1:
        return stems.pop()
    if stems:
        raise SourceError(
            f"{where} has several weight files: {', '.join(sorted(stems))}",
            hint="name one: `file:` for a Hub repo, or the file's own path",
        )
    pickles = [name for name in sorted(names) if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise SourceError(
            f"{where} has its weights only as a pickle ({pickles[0]}), which can run code",
            hint=PICKLE_HINT,
        )
    raise SourceNotFoundError(
        f"{where} has no .safetensors file",
        hint="a model is a pipeline folder, a UNet folder or a .safetensors file",
    )


def _check_shards(members: Sequence[tuple[str, re.Match[str]]], where: str) -> None:
    count = int(members[0][1]["parts"])
    present = {int(match["part"]) for _, match in members}
    if any(int(match["parts"]) != count for _, match in members):
        raise SourceError(f"{where} mixes shards of two different splits")
    for part in range(1, count + 1):
        if part not in present:
            name = members[0][0]
            missing = re.sub(r"-\d{5}-of-", f"-{part:05d}-of-", name)
            raise SourceNotFoundError(
                f"{where} lacks the shard {missing}", hint="download the model again"
            )
