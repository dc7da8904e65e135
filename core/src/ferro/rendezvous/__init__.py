"""The rendezvous: an authenticated key-value store over TCP, and how ranks find it."""

from ferro.rendezvous.auth.connect import connect
from ferro.rendezvous.auth.listener import Listener, listen
from ferro.rendezvous.auth.secret import derive, per_user_secret
from ferro.rendezvous.meeting import rendezvous_file
from ferro.rendezvous.store.client import StoreClient
from ferro.rendezvous.store.interface import Store, StoreTimeout
from ferro.rendezvous.store.memory import MemoryStore
from ferro.rendezvous.store.server import StoreServer

__all__ = [
    "Listener",
    "MemoryStore",
    "Store",
    "StoreClient",
    "StoreServer",
    "StoreTimeout",
    "connect",
    "derive",
    "listen",
    "per_user_secret",
    "rendezvous_file",
]
