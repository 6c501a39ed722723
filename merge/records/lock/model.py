"""A lock that was read, and how it holds models to what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge._version import __version__
from merge.errors import IntegrityError, RecipeError, first_lines
from merge.recipe.schema import Recipe
from merge.records.manifest import FileRecord
from merge.sources.model import ResolvedModel, Sources


@dataclass(frozen=True, slots=True)
class Lock:
    """A parsed lock.

    Attributes:
        path: The file.
        tool_version: That wrote it.
        recipe: With commits for revisions; local paths as they were looked up.
        commits: Role to commit, of models on the Hub.
        files: Role to the name and record of every file that is used.
        requested: Role to the revision that the recipe had; empty in the lock of an output.
    """

    path: Path
    tool_version: str
    recipe: Recipe
    commits: Mapping[str, str]
    files: Mapping[str, Mapping[str, FileRecord]]
    requested: Mapping[str, str]

    def check_version(self) -> None:
        """Refuse a lock of another version of the tool, which might write other bytes.

        Raises:
            RecipeError: it was written by another version.
        """
        if self.tool_version != __version__:
            raise RecipeError(
                f"{self.path.name} was written by instruct-merge {self.tool_version}, and this is "
                f"{__version__}",
                [],
                hint=f"`pip install instruct-merge=={self.tool_version}` runs it as it was, or "
                "run the recipe itself with --write-lock",
            )

    def pin(self, sources: Sources) -> Sources:
        """Compare the models with the lock, and expect its digests of every file.

        Raises:
            IntegrityError: a commit, a file or a size is another one; all are named.
        """
        wrong = [line for model in sources.models for line in self._differences(model)]
        if wrong:
            summary = f"the models are not those of {self.path.name}:"
            raise IntegrityError(
                "\n".join([summary, *first_lines(wrong)]),
                hint="get the models that it names, or run the recipe itself with --write-lock",
            )
        pinned = {
            model.role: model.expecting(
                {name: record.sha256 for name, record in self.files[model.role].items()}
            )
            for model in sources.models
        }
        return Sources.by_role(pinned)

    def _differences(self, model: ResolvedModel) -> Iterator[str]:
        locked = self.files.get(model.role)
        if locked is None:
            yield f"{model.role}: the lock has no such model"
            return
        if model.commit != self.commits.get(model.role):
            yield f"{model.role}: commit {model.commit}, not {self.commits.get(model.role)}"
        found = {file.name: file for file in model.files}
        for name in sorted(found.keys() | locked.keys()):
            if name not in found:
                yield f"{model.role}: {name} is missing"
            elif name not in locked:
                yield f"{model.role}: {name} is not in the lock"
            elif found[name].size_bytes != locked[name].size_bytes:
                sizes = f"{found[name].size_bytes:,} bytes, not {locked[name].size_bytes:,}"
                yield f"{model.role}: {name} has {sizes}"
            elif (hub := found[name].hub) and hub.sha256 not in ("", locked[name].sha256):
                yield f"{model.role}: {name} has SHA-256 {hub.sha256}, not {locked[name].sha256}"
