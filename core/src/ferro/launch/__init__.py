"""Processes: `ferro run`, which starts a program as several ranks, and clusters of ranks behind a notebook."""
