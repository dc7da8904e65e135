"""What runs on every rank of a benchmark, in ferro's environment or in a peer's, without ferro."""
