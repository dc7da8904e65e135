"""Write the generated parts of the pages again.

In collectives.md they come from the algorithms themselves, in backends.md from what
`ferro conformance` wrote into docs/conformance/, in pipeline.md from `ferro show pipeline`.

python docs/generate.py          rewrite
python docs/generate.py --check  fail when a page is not what would be written
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matrix

from ferro.collectives.builtin import BUILTIN
from ferro.collectives.network import Network
from ferro_strategies.pipeline import build, names
from ferro_strategies.pipeline.drawing.show import show
from ferro_strategies.pipeline.drawing.svg import draw_svg
from ferro_strategies.pipeline.schedules.timeline import simulate
from ferro_testing.schedules import check, cost_s, table

DOCS = Path(__file__).parent
BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"
PICTURES = (("all_reduce", "ring", 3), ("all_reduce", "direct", 3), ("broadcast", "tree", 4))
NETWORK = Network(latency_s=20e-6, bandwidth_bytes_per_s=2.5e9)
MICROBATCHES = (8, 32)
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
        cells += ["yes" if flag and reduces else "" for flag in (proof.rank_order, proof.combines_once)]
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


def timeline() -> str:
    """Return what a command of the page prints."""
    command = "pipeline 1f1b --stages 4 --microbatches 8 --columns 110"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        show(command.split()[1:])
    return f"```console\n$ ferro show {command}\n{printed.getvalue().rstrip()}\n```"


def schedules() -> str:
    """Return every schedule with its bubble and activations, for 4 ranks."""
    heads = ["schedule", "stages per rank"]
    heads += [f"bubble, {m} microbatches" for m in MICROBATCHES]
    heads.append(f"held by ranks 0 to 3, {MICROBATCHES[0]} microbatches")
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name in names():
        stages = 2 if name == "interleaved_1f1b" else 1
        made = [simulate(build(name, ranks=4, stages_per_rank=stages, microbatches=m)) for m in MICROBATCHES]
        bubbles = [f"{item.bubble_fraction:.1%}" for item in made]
        # Where a rank has two stages, each is half of what one would be.
        held = [f"{count / stages:g}" for count in made[0].peak_activations]
        lines.append(_row([f"`{name}`", str(stages), *bubbles, " ".join(held)]))
    return "\n".join(lines)


def drawing() -> str:
    """Return the drawing of the page, in SVG."""
    return draw_svg(simulate(build("zb_h1", ranks=4, microbatches=8)))


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "collectives.md": {"pictures": pictures, "algorithms": algorithms},
    "backends.md": {"backends": backends},
    "pipeline.md": {"timeline": timeline, "schedules": schedules},
}
WHOLE: dict[str, Callable[[], str]] = {"pipeline-zb_h1.svg": drawing}


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
    pages = {name: written((DOCS / name).read_text("utf-8"), parts) for name, parts in PARTS.items()}
    pages |= {name: make() for name, make in WHOLE.items()}
    if "--check" in sys.argv:
        return int(any(_present(DOCS / name) != new for name, new in pages.items()))
    for name, new in pages.items():
        (DOCS / name).write_text(new, "utf-8")
    return 0


def _present(path: Path) -> str | None:
    return path.read_text("utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
