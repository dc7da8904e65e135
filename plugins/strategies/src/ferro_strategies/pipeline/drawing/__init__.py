"""Drawings of pipeline schedules: text, SVG, and the command that prints them."""
