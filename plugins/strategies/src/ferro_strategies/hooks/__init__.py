"""Communication hooks: other ways to average a bucket of gradients.

A hook is called with a `GradBucket` whose gradients are complete, and the group; it starts to
communicate and returns something with `wait()`. Pass it as `DDP(module, group, hook=…)`, the
same one on every rank.
"""

from ..ddp.bucket import GradBucket, Hook, Pending
from .averaging import bfloat16, float16, mean
from .powersgd import PowerSGD

__all__ = ["GradBucket", "Hook", "Pending", "PowerSGD", "bfloat16", "float16", "mean"]
