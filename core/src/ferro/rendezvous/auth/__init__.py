"""Authentication: the secret of a job, and connections that both sides have proved."""
