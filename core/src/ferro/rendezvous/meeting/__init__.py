"""How the ranks of a job find the store that they share, and check that they belong together."""
