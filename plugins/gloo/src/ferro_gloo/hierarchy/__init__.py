"""Collectives of groups that span several hosts."""

from ferro_gloo.hierarchy.backend import Hierarchy

__all__ = ["Hierarchy"]
