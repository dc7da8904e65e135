"""The shared-memory transport: groups of ranks on one host."""
