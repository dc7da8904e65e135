"""Where a rank's elements lie in a whole array."""
