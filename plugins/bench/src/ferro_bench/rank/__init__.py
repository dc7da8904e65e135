"""The program of every rank of a benchmark; it runs in peers' environments, too, which have no ferro."""
