"""What a state is made of: arrays and who holds them, and values."""
