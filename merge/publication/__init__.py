"""Publishing an export on the Hub: checked first, uploaded in one go, compared afterwards."""

from merge.publication.model import Prepared, Published
from merge.publication.prepare import prepare
from merge.publication.publish import publish

__all__ = ["Prepared", "Published", "prepare", "publish"]
