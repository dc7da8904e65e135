"""A checkpoint that is there: its tensors, and its bytes, checked."""
