"""SHA-256: of whole files, and of one that is still being written."""

from merge.digest.files import DigestProcess, digest_file
from merge.digest.following import FileDigest

__all__ = ["DigestProcess", "FileDigest", "digest_file"]
