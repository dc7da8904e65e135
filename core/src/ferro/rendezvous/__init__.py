"""The rendezvous: an authenticated key-value store over TCP, and how ranks find it."""

from ferro.rendezvous import bulletin
from ferro.rendezvous.client import StoreClient
from ferro.rendezvous.dial import connect
from ferro.rendezvous.gate import Gate, listen
from ferro.rendezvous.memory import MemoryStore
from ferro.rendezvous.secret import derive, per_user_secret
from ferro.rendezvous.server import StoreServer
from ferro.rendezvous.store import Store, StoreTimeout

__all__ = [
    "Gate",
    "MemoryStore",
    "Store",
    "StoreClient",
    "StoreServer",
    "StoreTimeout",
    "bulletin",
    "connect",
    "derive",
    "listen",
    "per_user_secret",
]
