"""Authentication: the secret of a job, and connections whose two ends have proved that they hold it."""
