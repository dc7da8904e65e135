"""Distributed data parallel training: one model on every rank, gradients averaged."""

from .bucket import GradBucket, Hook, Pending
from .module import DDP
from .plan import plan_buckets

__all__ = ["DDP", "GradBucket", "Hook", "Pending", "plan_buckets"]
