"""Distributed data parallel training: one model on every rank, gradients averaged."""

from .bucket import GradBucket, Hook, Pending, plan_buckets
from .module import DDP

__all__ = ["DDP", "GradBucket", "Hook", "Pending", "plan_buckets"]
