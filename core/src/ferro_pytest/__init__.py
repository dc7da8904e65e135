"""Tests on ranks for users of pytest; `ferro_pytest.plugin` is the plugin.

A package beside `ferro`, not in it: pytest loads the plugin in every session, and to import
anything within `ferro` is to import NumPy.
"""
