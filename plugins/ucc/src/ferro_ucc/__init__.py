"""The UCC backend of ferro: collectives of libucc through ctypes."""
