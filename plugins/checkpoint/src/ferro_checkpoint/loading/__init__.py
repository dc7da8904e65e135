"""Loading a state."""
