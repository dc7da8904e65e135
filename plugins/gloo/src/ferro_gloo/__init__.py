"""ferro-gloo: the gloo backend of ferro, collectives on NumPy arrays.

Through shared memory on a host, over authenticated TCP between hosts. Installed, it is found by
itself: `ferro.init("gloo")`.
"""
