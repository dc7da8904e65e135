"""Checkpoints while training goes on."""
