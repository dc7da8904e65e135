"""`ferro checkpoint merge`: one plain safetensors file for each bundle."""

from __future__ import annotations

import argparse

from ferro.errors import UsageError
from ferro_checkpoint.command.new_files import ONE_FILE, lay_out
from ferro_checkpoint.command.plain_files import check_out, is_file, write_plain
from ferro_checkpoint.command.selecting import selected
from ferro_checkpoint.command.source import opened_source
from ferro_checkpoint.command.text import count, say, size_text
from ferro_checkpoint.progress import byte_progress


def run(given: argparse.Namespace) -> int:
    """Write the files; return 0.

    Raises:
        UsageError: OUT is there or cannot be written, or it is a file and several bundles are selected.
        CheckpointError: there is no checkpoint, it is damaged, or the file system failed; nothing was written.
    """
    check_out(given.out, overwrite=given.overwrite)
    with opened_source(given.dir) as source:
        if source.record is None:
            raise UsageError(f"{given.dir} is no checkpoint: `ferro checkpoint convert` writes files of other formats")
        bundles = by_bundle(selected(source.tensors, given.only))
        if not bundles:
            raise UsageError(f"{given.dir} has no tensors")
        if is_file(given.out) and len(bundles) != 1:
            listed = ", ".join(bundles)
            raise UsageError(f"{given.out} is one file, for one bundle, and there are {listed}: select one by --only")
        new = lay_out(source, bundles, ONE_FILE)
        with byte_progress("merging", new.nbytes, 0, None) as advance:
            write_plain(given.out, new, overwrite=given.overwrite, progress=advance)
    say(f"{given.out}: {count(len(new.files), 'file')}, {size_text(new.nbytes)}")
    return 0


def by_bundle(names: list[str]) -> dict[str, dict[str, str]]:
    """Group full names: of each bundle the names in its files, and the full names."""
    bundles: dict[str, dict[str, str]] = {}
    for name in names:
        bundle, _, own = name.partition(".")
        bundles.setdefault(bundle, {})[own] = name
    return bundles
