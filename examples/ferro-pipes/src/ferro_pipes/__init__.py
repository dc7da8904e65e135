"""ferro-pipes: a ferro backend over Unix sockets, for ranks of one host."""
