"""ProcessGroup: the ranks that work together, and how their operations are carried out."""
