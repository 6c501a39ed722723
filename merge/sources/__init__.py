"""From a model named in a recipe to the files that the merge reads and the export copies."""

from merge.sources.fetch import DISCARDED_HINT, discard, fetch_sources
from merge.sources.model import (
    ComponentFiles,
    HubFile,
    Pipeline,
    ResolvedModel,
    SourceFile,
    Sources,
)
from merge.sources.ranged import opener_of
from merge.sources.resolve import resolve_sources

__all__ = [
    "DISCARDED_HINT",
    "ComponentFiles",
    "HubFile",
    "Pipeline",
    "ResolvedModel",
    "SourceFile",
    "Sources",
    "discard",
    "fetch_sources",
    "opener_of",
    "resolve_sources",
]
