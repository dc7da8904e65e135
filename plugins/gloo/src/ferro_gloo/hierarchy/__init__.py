"""Collectives of groups that span several hosts."""
