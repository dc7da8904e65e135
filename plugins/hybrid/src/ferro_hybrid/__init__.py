"""HybridBackend: a backend made of others, one for each kind of array and one for transfers."""

from .backend import HybridBackend

__all__ = ["HybridBackend"]
