"""`init` and `shutdown`, the world group, and the environment of this process."""
