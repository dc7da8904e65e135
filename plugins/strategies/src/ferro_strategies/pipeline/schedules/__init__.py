"""Pipeline schedules as data: how they are built, checked and timed without any rank running."""
