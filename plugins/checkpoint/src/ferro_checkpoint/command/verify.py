"""`ferro checkpoint verify`: check every byte of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ferro_checkpoint.command.text import count, say, say_json, size_text
from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.opened.record import read_record
from ferro_checkpoint.opened.verify import Finding, verify
from ferro_checkpoint.progress import byte_progress
from ferro_checkpoint.storage.opening import split_path


def run(given: argparse.Namespace) -> int:
    """Print all damage; return 0 if there is none, otherwise 1.

    Raises:
        CheckpointIncomplete: there is no checkpoint.
    """
    storage, name = split_path(given.dir)
    path = f"{storage.path.rstrip('/')}/{name}"
    files = nbytes = 0
    findings: list[Finding] = []
    try:
        record = read_record(storage, name)
        files, nbytes = len(record.files), sum(it.nbytes for it in record.files.values())
        with byte_progress("verifying", nbytes, 0, None) as advance:
            for finding in verify(storage, name, threads=given.threads, progress=advance):
                findings.append(finding)
                if not given.json:
                    say(finding.message)
    except CheckpointDamaged as error:
        findings.append(Finding(RECORD_NAME, None, None, (), str(error)))
        if not given.json:
            say(str(error))
    if given.json:
        result = {"path": path, "whole": not findings, "files": files, "bytes": nbytes}
        say_json(result | {"findings": [asdict(finding) for finding in findings]})
    elif findings:
        say(f"{path} is damaged: {count(len(findings), 'place')}; load an older checkpoint")
    else:
        say(f"{path} is whole: {count(files, 'file')}, {size_text(nbytes)}, every digest is right")
    return 1 if findings else 0
