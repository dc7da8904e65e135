"""ferro-gloo: the gloo backend of ferro, for collectives on NumPy arrays.

It uses shared memory on a host and authenticated TCP between hosts. ferro finds it once it is
installed: `ferro.init("gloo")`.
"""
