"""ferro-pipes: a ferro backend over named pipes, for ranks of one host."""
