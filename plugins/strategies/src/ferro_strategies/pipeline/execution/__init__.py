"""Pipeline execution: each rank computes its stages and exchanges arrays with other ranks."""
