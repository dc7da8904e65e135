"""How the ranks of a job find each other, and check that they belong together."""
