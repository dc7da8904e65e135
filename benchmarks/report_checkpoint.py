"""Write the part of the results page about checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from records import Record, markdown_table

from ferro_bench import size_text, time_text

METHOD = """\
1 GiB of float32 parameters in layers of 16 MiB, each a weight and a bias. "Shards": every rank holds a flat part of
each layer, as under FSDP; "replicated": every rank holds everything, as under DDP, and it is written once. In each turn
ferro, torch and the raw disk write the same number of bytes, one after the other, then read them: "warm" from the page
cache, "cold" after `posix_fadvise(POSIX_FADV_DONTNEED)`. Times are those of the slowest rank, medians of the turns; a
ratio is the median of the turns' ratios, above 1 ferro is faster. All of them return when the bytes are on disk.

"Raw" is one process: all bytes in order and fsync (1 MiB a call; longer calls take the kernel more time); one read into
memory that was touched before. "Raw, early" tells the disk after each 4 MiB to begin with them, as ferro does. Where
every rank needs all bytes, "raw, each" is a read by every rank at once. torch is torch.distributed.checkpoint:
`FileSystemWriter` with `sync_files` and that number of threads which measured best, and `FileSystemReader`; neither
checks what it reads, and ferro compares digests. "Memory" is the most that a rank needed beyond what it had (VmHWM).

![Seconds of saves and loads](checkpoint.png)"""


def tables(result: Record) -> list[str]:
    """Return the tables of those parts that were measured."""
    parts: list[str] = []
    for name, table in _PARTS.items():
        if name in result:
            parts += table(result[name])
    return parts


def ratio(seconds: Mapping[str, list[float]], other: str, ours: str = "ferro") -> float:
    """Return the median, over the turns, of the other's time over ours."""
    return statistics.median(there / here for there, here in zip(seconds[other], seconds[ours], strict=True))


def _disk(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        for kind, seconds in record["seconds"].items():
            extra = record["extra_bytes"][kind]
            rows.append(
                [
                    f"{kind}, {record['ranks']} rank{'s' * (record['ranks'] > 1)}, {record['layout']}",
                    time_text(statistics.median(seconds["ferro"])),
                    *(_ratio(seconds, other) for other in ("torch", "raw", "raw, early", "raw, each")),
                    size_text(extra["ferro"]),
                    size_text(extra["torch"]) if "torch" in extra else "",
                ]
            )
    head = ["", "ferro", *(f"{name} / ferro" for name in ("torch", "raw", "raw, early", "raw, each"))]
    cold = min(record["cold_share"] for record in records)
    threads = sorted({str(record["torch_threads"]) for record in records})
    setting = (
        f"{size_text(records[0]['nbytes'])}, {records[0]['turns']} turns; torch with {', '.join(threads)} thread"
        f"{'' if threads == ['1'] else 's'} a rank. Of a cold raw read, {cold:.0%} or more came from the disk."
    )
    return ["### Save and load", setting, markdown_table([*head, "memory, ferro", "memory, torch"], rows)]


def _ratio(seconds: Mapping[str, list[float]], other: str) -> str:
    return f"{ratio(seconds, other):.2f}" if other in seconds else ""


def _training(records: list[Record]) -> list[str]:
    text = """\
A perceptron is trained while its parameters and momentum are saved: `Checkpointer(async_=True)` beside torch's
`async_save` with a staging buffer that is used again. "Saving" is what the step that saves takes longer than an
ordinary one, "copy" one copy in memory of the bytes that the rank supplies, measured in the same turns; "beside" is a
step that begins while the save is being written, over an ordinary one. torch's DDP copies everything on every rank."""
    rows = []
    for record in records:
        for name, result in record["results"].items():
            found = result["median_s"]
            saving = found["saving"] - found["ordinary"]
            rows.append(
                [
                    f"{name}, {record['strategy']}, {record['ranks']} rank{'s' * (record['ranks'] > 1)}",
                    size_text(result["state_bytes"]),
                    time_text(found["ordinary"]),
                    f"{saving * 1e3:+.0f} ms",
                    time_text(found["copy"]),
                    f"{saving / found['copy']:.2f}",
                    f"{found['beside'] / found['ordinary'] - 1:+.1%}" if "beside" in found else "",
                    f"{result['counts']['beside'] / result['counts']['saving']:.1f}",
                    time_text(found["written"]),
                ]
            )
    head = ["", "a rank's bytes", "ordinary", "saving", "copy", "saving / copy", "beside", "steps beside", "written in"]
    return ["### While training goes on", text, markdown_table(head, rows)]


def _resharding(records: list[Record]) -> list[str]:
    text = """\
The bytes that all ranks read by system calls (`rchar` of `/proc/self/io`) to load a checkpoint of another number of
ranks, over the bytes that they hold; with the record, the index and the headers."""
    rows = [
        [
            f"{record['from']} to {record['to']} ranks, {record['layout']}, {size_text(record['nbytes'])}",
            *(
                f"{record['read_bytes'][name] / record['needed_bytes'][name]:.4f}"
                if name in record["read_bytes"]
                else ""
                for name in ("ferro", "torch")
            ),
        ]
        for record in records
    ]
    return ["### Resharding", text, markdown_table(["", "ferro", "torch"], rows)]


def _planning(records: list[Record]) -> list[str]:
    text = """\
"Plan" is what comes before the first byte is written: names, shapes and dtypes of all ranks, files, segments; torch's
is `DefaultSavePlanner`'s. "Open" reads and checks the record and the headers; torch's reads the metadata."""
    rows = [
        [
            f"{record['what']} {record['tensors']:,} tensors, {record['ranks']} rank{'s' * (record['ranks'] > 1)}",
            time_text(statistics.median(record["seconds"]["ferro"])),
            time_text(statistics.median(record["seconds"]["torch"])) if "torch" in record["seconds"] else "",
            _ratio(record["seconds"], "torch"),
        ]
        for record in records
    ]
    return ["### Planning and opening", text, markdown_table(["", "ferro", "torch", "torch / ferro"], rows)]


def _memory(records: list[Record]) -> list[str]:
    text = """\
Two ranks have their state in memory, each with a copy of its neighbour's, and on disk. A process that has nothing takes
the place of one of them, and both restore the state: by `Checkpointer.resume`, which finds out who has what, and by
`load` from disk. "Shards" is 1 GiB in all, "replicated" 1 GiB on each rank."""
    rows = [
        [
            f"{record['layout']}, {size_text(record['nbytes'])}",
            *(time_text(statistics.median(record["seconds"][name])) for name in ("memory", "disk, warm", "disk, cold")),
            *(f"{ratio(record['seconds'], name, 'memory'):.2f}" for name in ("disk, warm", "disk, cold")),
        ]
        for record in records
    ]
    head = ["", "memory", "disk, warm", "disk, cold", "warm / memory", "cold / memory"]
    return ["### From a neighbour's memory", text, markdown_table(head, rows)]


_PARTS = {"disk": _disk, "training": _training, "resharding": _resharding, "planning": _planning, "memory": _memory}
TABLES = {"checkpoint": tables}
METHODS = {"checkpoint": METHOD}
