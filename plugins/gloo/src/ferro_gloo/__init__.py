"""ferro-gloo: the gloo backend of ferro, collectives on NumPy arrays over authenticated TCP.

Installed, it is found by itself: `ferro.init("gloo")`.
"""
