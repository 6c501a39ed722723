"""From a model named in a recipe to the files that the merge reads and the export copies."""

from merge.sources.model import ComponentFiles, Pipeline, ResolvedModel, SourceFile, Sources
from merge.sources.resolve import resolve_sources

__all__ = [
    "ComponentFiles",
    "Pipeline",
    "ResolvedModel",
    "SourceFile",
    "Sources",
    "resolve_sources",
]
