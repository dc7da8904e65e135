"""Context parallel: the positions of long sequences divided over the ranks, with ring attention."""

from .attention import RingAttention
from .chunks import SequenceChunks
from .module import ContextParallel
from .ring import ring_attend

__all__ = ["ContextParallel", "RingAttention", "SequenceChunks", "ring_attend"]
