"""Persistent rooted collectives between ranks of one host, whose ranks run ahead of each other."""
