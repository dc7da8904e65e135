"""WrappedState: the parameters and buffers of the module that DDP wraps."""

from __future__ import annotations

from dataclasses import dataclass

from ..nn.module import Buffer
from ..nn.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedState:
    """Parameters and buffers of the wrapped module, so that a step need not walk its tree.

    It is no tuple, because the walk would look into a tuple among DDP's attributes.
    """

    parameters: tuple[Parameter, ...]
    frozen: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
