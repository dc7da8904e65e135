"""Collectives as data: what algorithms are on offer, and what can be done with one."""

from ferro.collectives.choice import Choice
from ferro.collectives.registry import available, get
from ferro.collectives.schedule import Build, CollectiveInfo, Recv, Round, Schedule, Send

__all__ = ["Build", "Choice", "CollectiveInfo", "Recv", "Round", "Schedule", "Send", "available", "get"]
