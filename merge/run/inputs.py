"""The input files of a run: compared with what is expected, never written to."""

from __future__ import annotations

import logging

from merge.errors import IntegrityError
from merge.sources.fetch import DISCARDED_HINT, discard
from merge.sources.model import ResolvedModel, SourceFile

_LOG = logging.getLogger(__name__)

# Role and file.
InputFile = tuple[str, SourceFile]


def check_digest(file: SourceFile, digest: str) -> None:
    """Compare a digest with the one that the recipe or the Hub states.

    Raises:
        IntegrityError: they differ.
    """
    if not digest or not file.expected_sha256 or digest == file.expected_sha256:
        return
    hint = "download it again, or correct sha256 in the recipe"
    if file.hub is not None and digest != file.hub.sha256 and file.hub.sha256:
        # Another program's download, or a disk that changed it: not what the cache calls it.
        discard(file)
        hint = DISCARDED_HINT
    raise IntegrityError(
        f"{file.name} has SHA-256 {digest}, and {file.expected_sha256} is expected", hint=hint
    )


def tell_links(model: ResolvedModel) -> None:
    """Warn of files that are copied and that a link takes from outside of the model's folder.

    A folder that somebody else packed may link to anything of this machine, and an export is
    there to be published. The Hub's cache links to its own blobs.
    """
    parts = model.pipeline.components if model.pipeline is not None else ()
    links = []
    for file in (file for part in parts for file in part.companions.values()):
        # A single file's configs are in another folder than the file.
        root = file.path.parents[file.name.count("/")].resolve()
        path = file.path.resolve()
        if not path.is_relative_to(root) and path.parent != root.parent.parent / "blobs":
            links.append(f"{file.name} is a link to {path}")
    if links:
        _LOG.warning("%s: its content goes into the output", ", ".join(links))
