"""The errors of huggingface_hub in our own words, each with the next command to type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merge.errors import MergeError, OfflineError, SourceError, SourceNotFoundError


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Translate what huggingface_hub raises inside the block.

    Raises:
        SourceNotFoundError: no such repository, revision or file, or no access to it.
        OfflineError: the cache lacks it and the Hub may not or cannot be asked.
        SourceError: any other answer of the Hub, or a cache that cannot be written.
    """
    # Imported here: a tenth of a second that local models need not wait for.
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    at = f" at {revision}" if revision else ""
    download = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        yield
    except MergeError:
        raise
    except hub.GatedRepoError as error:
        raise SourceNotFoundError(
            f"{repo} is gated and this account has no access",
            hint=f"accept its terms at https://huggingface.co/{repo}, then `hf auth login`",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise SourceNotFoundError(
            f"there is no model {repo} on the Hub, or it is private",
            hint="check the name, or run `hf auth login`; a local path starts with ./",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise SourceNotFoundError(f"{repo} has no revision {revision}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if not constants.HF_HUB_OFFLINE:
            # The client looked into the cache because the Hub failed.
            raise _unreachable(repo, at, error.__cause__ or error) from error
        raise OfflineError(
            f"{repo}{at} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub",
            hint=f"on a machine with a network run `{download}`",
        ) from error
    except hub.EntryNotFoundError as error:
        raise SourceNotFoundError(f"{repo}{at} lacks a file: {error}") from error
    except hub.HfHubHTTPError as error:
        raise SourceError(f"the Hub refused {repo}{at}: {error}") from error
    except ValueError as error:
        # An id or a file name that the client refuses, or an answer that is not JSON.
        raise SourceError(f"the Hub cannot be asked for {repo}{at}: {error}") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        # hf_xet, by which the client downloads large files, raises plain RuntimeErrors.
        raise _unreachable(repo, at, error) from error
    except OSError as error:
        if error.errno is None:
            # A download of the wrong length.
            raise _unreachable(repo, at, error) from error
        raise SourceError(
            f"cannot keep {repo}{at} in the cache: {error}",
            hint="set HF_HOME to a folder that can be written and has enough space",
        ) from error


@contextmanager
def naming(role: str) -> Iterator[None]:
    """Put a model's role in front of the message of an error inside the block."""
    try:
        yield
    except SourceError as error:
        prefix = f"models.{role}: "
        if not error.message.startswith(prefix):
            error.message = prefix + error.message
        raise


def _unreachable(repo: str, at: str, error: BaseException) -> OfflineError:
    return OfflineError(
        f"the Hub cannot be reached for {repo}{at}: {error}",
        hint="check the network, or set HF_HUB_OFFLINE=1 to use what is in the cache",
    )
