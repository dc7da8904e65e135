"""The TCP transport: groups over a mesh of authenticated connections."""
