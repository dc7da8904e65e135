"""Checkpoints in the memories of the ranks, each with a copy at another rank."""
