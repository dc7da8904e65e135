"""Saving a state."""
