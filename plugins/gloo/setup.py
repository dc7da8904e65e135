"""Builds outside of the source tree: what setuptools leaves in `build/` and `*.egg-info` would be in the next wheel."""

import tempfile

from setuptools import setup

folder = tempfile.TemporaryDirectory(prefix="ferro-gloo-build-")  # removed when this process ends
setup(options={"build": {"build_base": folder.name}, "egg_info": {"egg_base": folder.name}})
