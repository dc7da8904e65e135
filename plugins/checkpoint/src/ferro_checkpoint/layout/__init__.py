"""What is on disk: files of tensors, their index, and the record that commits them."""
