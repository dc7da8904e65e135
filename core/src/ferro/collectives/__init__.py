"""Collectives as data: the algorithms that installed plugins offer, and the types in which they are written."""

from ferro.collectives.choice import Choice
from ferro.collectives.registry import available, get
from ferro.collectives.schedule import Build, CollectiveInfo, Recv, Round, Schedule, Send

__all__ = ["Build", "Choice", "CollectiveInfo", "Recv", "Round", "Schedule", "Send", "available", "get"]
