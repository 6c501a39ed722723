"""A small Hub on the loopback interface, spoken to by the real client when HF_ENDPOINT names it.

It serves repositories with their history, takes uploads, and fails on demand.
"""

from tests.hub.connection import Transfer
from tests.hub.downloads import Download
from tests.hub.faults import Fault
from tests.hub.server import HubServer

__all__ = ["Download", "Fault", "HubServer", "Transfer"]
