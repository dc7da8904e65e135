"""Groups over a mesh of authenticated TCP connections."""
