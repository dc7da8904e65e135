"""The instructions of a pickle, one after the other, on a stack and a memo; see `pickle_reader`.

Source: CPython's Lib/pickletools.py, which describes every instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ferro_checkpoint.formats.pickle_names import Built, Maker, Names

_MOST_INSTRUCTIONS = 100_000_000
_MOST_INTEGER_BYTES = 1024  # a longer one would take quadratic time to print
_MOST_KEY_ITEMS = 64
_MARK = object()


class Refusal(Exception):
    """The pickle holds what is not read; the message says what."""


class PickleMachine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, data: bytes, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        self.data = data
        self.position = 0
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the object that the pickle is of."""
        data, instructions, stack, memo = self.data, _INSTRUCTIONS, self.stack, self.memo
        for _ in range(_MOST_INSTRUCTIONS):
            code = data[self.position]
            self.position += 1
            if code == 0x94 and stack[-1] is not _MARK:  # MEMOIZE, here because half of all are this one or the next
                memo[len(memo)] = stack[-1]
            elif code == 0x6A:  # LONG_BINGET
                stack.append(memo[self.number(4)])
            elif code == 0x2E:  # STOP
                (value,) = stack
                if value is _MARK:
                    raise Refusal("it ends within a sequence")
                return value
            elif (instruction := instructions.get(code)) is not None:
                instruction(self)
            else:
                raise Refusal(f"the instruction {bytes([code])!r} is not read")
        raise Refusal(f"it has more than {_MOST_INSTRUCTIONS} instructions")

    def take(self, count: int) -> bytes:
        """Take the next bytes, of which there must be enough."""
        taken = self.data[self.position : self.position + count]
        if len(taken) != count:
            raise Refusal(f"{count} bytes are announced, and {len(self.data) - self.position} follow")
        self.position += count
        return taken

    def number(self, count: int) -> int:
        """Take an unsigned number of so many bytes."""
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        """Take the rest of a line."""
        end = self.data.index(b"\n", self.position, self.position + 1000)
        text = self.take(end - self.position).decode()
        self.position += 1
        return text

    def pop(self) -> Any:
        """Take the uppermost value."""
        value = self.stack.pop()
        if value is _MARK:
            raise Refusal("a mark is taken for a value")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Take all values above the uppermost mark, and the mark."""
        stack = self.stack
        index = len(stack) - 1
        while stack[index] is not _MARK:
            if index == 0:
                raise Refusal("a mark is missing")
            index -= 1
        values = stack[index + 1 :]
        del stack[index:]
        return values

    def top(self, kind: type) -> Any:
        """Return the uppermost value, which must be of this kind."""
        value = self.stack[-1]
        if type(value) is not kind:
            raise Refusal(f"a {kind.__name__} is expected, and not {type(value).__name__}")
        return value

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, which alternate, into the uppermost dict."""
        target = self.top(dict)
        if len(items) % 2:
            raise Refusal("a dict has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            target[key] = value

    def push_name(self, module: Any, name: Any) -> None:
        """Push what a name of the list stands for."""
        if type(module) is not str or type(name) is not str:
            raise Refusal("a name is no text")
        try:
            self.stack.append(self.names[module, name])
        except KeyError:
            found = f"{module[:200]}.{name[:200]}"
            text = f"it holds {found!r}, which is not on the list of classes that are read, so nothing of it is"
            raise Refusal(text) from None

    def call(self) -> None:
        """Call the maker under the uppermost value, which is a tuple of arguments."""
        args, function = self.pop(), self.pop()
        if type(function) is not Maker or type(args) is not tuple:
            raise Refusal("a call of something that is not on the list")
        self.stack.append(function.make(args))

    def set_state(self) -> None:
        """Set the state of the object under the uppermost value."""
        state, target = self.pop(), self.stack[-1]
        if type(target) is dict:
            return  # attributes of an OrderedDict, such as the versions in a module's state: they are not needed
        if type(target) is not Built or target.state is not None:
            raise Refusal(f"a state is set on {type(target).__name__}")
        target.state = state

    def call_persistent(self) -> None:
        """Replace a persistent id by its object."""
        if self.persistent is None:
            raise Refusal("it refers to an object outside of it")
        self.stack.append(self.persistent(self.pop()))

    def integer(self, count: int) -> None:
        """Push a signed integer of so many bytes."""
        if count > _MOST_INTEGER_BYTES:
            raise Refusal(f"an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def check_protocol(self) -> None:
        """Check the number of the protocol."""
        if self.number(1) > 5:
            raise Refusal("its protocol is newer than 5")

    def check_frame(self) -> None:
        """Check that a frame is all there; nothing else depends on it."""
        count = self.number(8)
        if count > len(self.data) - self.position:
            raise Refusal(f"a frame of {count} bytes, of which {len(self.data) - self.position} follow")

    def tuple_of(self, count: int) -> None:
        """Make a tuple of the uppermost values."""
        values = self.stack[-count:]
        if len(values) != count or _MARK in values:
            raise Refusal("a mark is taken for a value, or a value is missing")
        self.stack[-count:] = [tuple(values)]

    def append(self, values: list[Any]) -> None:
        """Append to the uppermost list."""
        self.top(list).extend(values)

    def memoize(self, index: int) -> None:
        """Remember the uppermost value."""
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value


def _check_key(key: Any) -> None:
    """Refuse a key whose hash would take long, or run deeper than the stack: long or nested tuples."""
    items = key if type(key) is tuple else (key,)
    if len(items) > _MOST_KEY_ITEMS or not all(map(_is_plain, items)):
        raise Refusal(f"a {type(key).__name__} is the key of a dict")


def _is_plain(key: Any) -> bool:
    """Say whether a key hashes at once, and no others can be chosen to have its hash, as large integers can be."""
    return -(1 << 63) <= key < 1 << 63 if type(key) is int else type(key) in (str, float, bool, type(None), Built)


def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _append(machine: PickleMachine) -> None:
    value = machine.pop()
    machine.append([value])


def _push_global(machine: PickleMachine) -> None:
    module = machine.line()
    machine.push_name(module, machine.line())


def _push_stack_global(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push_name(module, name)


_INSTRUCTIONS: dict[int, Callable[[PickleMachine], None]] = {
    code[0]: instruction
    for code, instruction in (
        (b"\x80", lambda m: m.check_protocol()),
        (b"\x95", lambda m: m.check_frame()),
        (b"(", lambda m: m.stack.append(_MARK)),
        (b"}", lambda m: m.stack.append({})),
        (b"]", lambda m: m.stack.append([])),
        (b")", lambda m: m.stack.append(())),
        (b"N", lambda m: m.stack.append(None)),
        (b"\x88", lambda m: m.stack.append(True)),
        (b"\x89", lambda m: m.stack.append(False)),
        (b"J", lambda m: m.integer(4)),
        (b"K", lambda m: m.stack.append(m.number(1))),
        (b"M", lambda m: m.stack.append(m.number(2))),
        (b"\x8a", lambda m: m.integer(m.number(1))),
        (b"\x8b", lambda m: m.integer(m.number(4))),
        (b"G", lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0])),
        (b"\x8c", lambda m: m.stack.append(m.take(m.number(1)).decode())),
        (b"X", lambda m: m.stack.append(m.take(m.number(4)).decode())),
        (b"\x8d", lambda m: m.stack.append(m.take(m.number(8)).decode())),
        (b"C", lambda m: m.stack.append(m.take(m.number(1)))),
        (b"B", lambda m: m.stack.append(m.take(m.number(4)))),
        (b"\x8e", lambda m: m.stack.append(m.take(m.number(8)))),
        (b"t", lambda m: m.stack.append(tuple(m.pop_to_mark()))),
        (b"\x85", lambda m: m.tuple_of(1)),
        (b"\x86", lambda m: m.tuple_of(2)),
        (b"\x87", lambda m: m.tuple_of(3)),
        (b"a", _append),
        (b"e", lambda m: m.append(m.pop_to_mark())),
        (b"s", _set_item),
        (b"u", lambda m: m.set_items(m.pop_to_mark())),
        (b"c", _push_global),
        (b"\x93", _push_stack_global),
        (b"R", lambda m: m.call()),
        (b"\x81", lambda m: m.call()),
        (b"b", lambda m: m.set_state()),
        (b"Q", lambda m: m.call_persistent()),
        (b"q", lambda m: m.memoize(m.number(1))),
        (b"r", lambda m: m.memoize(m.number(4))),
        (b"\x94", lambda m: m.memoize(len(m.memo))),
        (b"h", lambda m: m.stack.append(m.memo[m.number(1)])),
        (b"j", lambda m: m.stack.append(m.memo[m.number(4)])),
    )
}
