"""Write the generated parts of the pages again.

In collectives.md they come from the algorithms themselves, in backends.md from what
`ferro conformance` wrote into docs/conformance/.

python docs/generate.py          rewrite
python docs/generate.py --check  fail when a page is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matrix

from ferro.collectives.builtin import BUILTIN
from ferro.collectives.check import check
from ferro.collectives.cost import Network, cost_s
from ferro.collectives.picture import table

DOCS = Path(__file__).parent
BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"
PICTURES = (("all_reduce", "ring", 3), ("all_reduce", "direct", 3), ("broadcast", "tree", 4))
NETWORK = Network(latency_s=20e-6, bandwidth_bytes_per_s=2.5e9)
SIZES = ((4, "4 B"), (1 << 20, "1 MiB"), (64 << 20, "64 MiB"))


def pictures() -> str:
    """Return who sends what to whom, for a few algorithms."""
    by_name = {(info.collective, info.algorithm): info for info in BUILTIN}
    parts = []
    for collective, algorithm, ranks in PICTURES:
        info = by_name[collective, algorithm]
        parts.append(f"{algorithm} {collective}, {ranks} ranks:\n\n```text")
        parts.append(table(info.build, ranks).rstrip() + "\n```\n")
    return "\n".join(parts)


def algorithms() -> str:
    """Return every algorithm with what the checker proves of it, for 8 ranks."""
    heads = ["collective", "algorithm", "rounds", "messages", "rank order", "one rounding"]
    heads += [f"{name} (model)" for _, name in SIZES]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for info in BUILTIN:
        proof = check(info.collective, info.build, 8)
        cells = [info.collective, info.algorithm, str(proof.rounds), str(proof.messages)]
        reduces = info.collective in ("all_reduce", "reduce", "reduce_scatter")
        cells += [
            "yes" if flag and reduces else "" for flag in (proof.rank_order, proof.combines_once)
        ]
        cells += [_time(cost_s(info.build, 8, nbytes, NETWORK)) for nbytes, _ in SIZES]
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def backends() -> str:
    """Return what each backend does and does not, as it was measured."""
    return matrix.table(matrix.surveys(DOCS / "conformance"))


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "collectives.md": {"pictures": pictures, "algorithms": algorithms},
    "backends.md": {"backends": backends},
}


def written(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """Return a page with its generated parts as they should be."""
    for name, make in parts.items():
        begin = BEGIN.format(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(END)
        page = f"{before}{begin}\n\n{make()}\n\n{END}{after}"
    return page


def main() -> int:
    """Rewrite the pages, or check them."""
    stale = 0
    for name, parts in PARTS.items():
        page = (DOCS / name).read_text("utf-8")
        new = written(page, parts)
        stale += page != new
        if "--check" not in sys.argv:
            (DOCS / name).write_text(new, "utf-8")
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
