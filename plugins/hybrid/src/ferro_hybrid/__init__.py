"""HybridBackend: a backend made of other backends, one for the arrays on each device and one for transfers."""

from .backend import HybridBackend

__all__ = ["HybridBackend"]
