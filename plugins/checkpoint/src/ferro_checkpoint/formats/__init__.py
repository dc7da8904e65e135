"""Checkpoints that others have written."""
