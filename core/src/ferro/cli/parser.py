"""Parser: a command-line parser that raises ferro's errors."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ferro.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise UsageError(f"{message}; see `{self.prog} --help`")
