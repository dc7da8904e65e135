"""The command `ferro checkpoint`."""
