"""The store: keys and values that all ranks of a job share, over TCP or in memory."""
