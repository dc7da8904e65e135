"""The command line of `ferro checkpoint`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ferro.cli.parser import Parser
from ferro.errors import UsageError
from ferro_checkpoint.command import convert, diff, inspect, merge, verify

_DESCRIPTION = "Look into checkpoints, check, compare and convert them. Nothing here needs the program that saved them."
_EPILOG = """\
`ferro checkpoint COMMAND --help` tells the rest of each. A checkpoint is a directory that `save` or a Checkpointer has
written, or an address that fsspec knows, such as s3://bucket/run/step-000000500.

The exit status is 0; 1 for damage, a difference, or a failure; and 2 for a mistake in the command line.
"""
_FORMATS = "safetensors (a file or a directory), torch (torch.distributed.checkpoint) or ferrotorch (the crate's)"
_INSPECT = """\
Print the tensors of a checkpoint, and what else is in it, or list the checkpoints of a directory with the step, time
and size of each, and whether it is whole. Only records and headers are read: `verify` reads all.
"""
_VERIFY = """\
Read every byte of a checkpoint and compare it with the digests in the record. Each damaged range is printed with the
file and the tensors in it, and the exit status is 1.
"""
_DIFF = """\
Compare two checkpoints tensor by tensor, bit for bit. Of tensors that differ the number of elements that do, and the
largest absolute and relative difference, are printed. The exit status is 0 if they are equal, and otherwise 1.
Either may be of another format: then tensors alone are compared, of which one at a time is in memory. Of two
checkpoints steps and values are compared as well, and a few MiB are in memory at a time.
"""
_MERGE = """\
Write a directory with one plain safetensors file for each bundle of a checkpoint (model.safetensors, ...), for programs
that cannot read several files and an index. If OUT ends in .safetensors, it is the file of the one bundle that
--only selects. OUT appears when it is whole.
"""
_CONVERT = """\
Write a checkpoint from what other programs have written, or plain safetensors from a checkpoint. OUT appears when it
is whole. Values are kept in a checkpoint; plain safetensors have none.
"""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; the result's `run` is the function to call with it.

    Raises:
        UsageError: the command is unknown, or an option is.
    """
    parser = _parser()
    if not arguments:
        raise UsageError(f"give a command: {', '.join(_COMMANDS)}; see `{parser.prog} --help`")
    return parser.parse_args(arguments)


_COMMANDS = ("inspect", "verify", "diff", "merge", "convert")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ferro checkpoint",
        usage="ferro checkpoint COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, arguments: str, summary: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            prog=f"{parser.prog} {name}",
            usage=f"{parser.prog} {name} {arguments}",
            help=summary,
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _inspect(
        command(
            "inspect",
            "DIR [--only PATTERN] [--json]",
            "print the tensors of a checkpoint, or list a directory of checkpoints",
            _INSPECT,
        )
    )
    _verify(command("verify", "DIR [--threads N] [--json]", "check every byte, and name what is damaged", _VERIFY))
    _diff(
        command(
            "diff", "A B [--bundle NAME] [--only PATTERN] [--json]", "compare two checkpoints tensor by tensor", _DIFF
        )
    )
    _merge(
        command(
            "merge", "DIR OUT [--only PATTERN] [--overwrite]", "write one plain safetensors file per bundle", _MERGE
        )
    )
    _convert(
        command(
            "convert",
            "IN OUT [--from FORMAT] [--to FORMAT] [--bundle NAME] [--only PATTERN] [--overwrite]",
            "from other formats, and to plain safetensors",
            _CONVERT,
        )
    )
    return parser


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=inspect.run)
    help_ = "a checkpoint, a directory of checkpoints, or a file or directory of another format"
    parser.add_argument("dir", metavar="DIR", help=help_)
    _add_only(parser)
    _add_json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=verify.run)
    parser.add_argument("dir", metavar="DIR", help="a checkpoint")
    parser.add_argument("--threads", type=_threads, default=2, metavar="N", help="that read and compute (default 2)")
    _add_json(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=diff.run)
    parser.add_argument("a", metavar="A", help="a checkpoint, or a file or directory of another format")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--bundle",
        metavar="NAME",
        help="of a checkpoint, compare this bundle under the names in its files with a plain file of the other format",
    )
    _add_only(parser)
    _add_json(parser)


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=merge.run)
    parser.add_argument("dir", metavar="DIR", help="a checkpoint")
    parser.add_argument("out", metavar="OUT", help="the new directory, or a new file that ends in .safetensors")
    _add_only(parser)
    _add_overwrite(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=convert.run)
    parser.add_argument("source", metavar="IN", help="a checkpoint, or a file or directory of another format")
    parser.add_argument("out", metavar="OUT", help="the new checkpoint, file (*.safetensors) or directory of files")
    parser.add_argument(
        "--from",
        dest="from_",
        choices=("safetensors", "torch", "ferrotorch"),
        metavar="FORMAT",
        help=f"{_FORMATS}; default: found out",
    )
    parser.add_argument(
        "--to",
        choices=("ferro", "safetensors"),
        metavar="FORMAT",
        help="ferro or safetensors; default: safetensors from a checkpoint, or if OUT ends in .safetensors, else ferro",
    )
    parser.add_argument(
        "--bundle",
        metavar="NAME",
        help="to ferro: the bundle of all tensors (default model), or `*`: each tensor's name up to its first dot; "
        "from ferro: take this bundle alone, under the names in its files",
    )
    _add_only(parser)
    _add_overwrite(parser)


def _add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="tensors of this name, such as model.0 (and all within it) or 'model.*.bias'; may be given several times",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT, when the new one is whole")


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("give 1 to 64 threads")
    return int(text)
