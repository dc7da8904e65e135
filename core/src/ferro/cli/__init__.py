"""The `ferro` program."""
