"""The program of a cluster's rank: it runs the functions that come through its standard input, a socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import traceback

from ferro.launch.messages import Inbox, frame, pack, unpack
from ferro.runtime import lifecycle

_READ_BYTES = 1024 * 1024


def main() -> None:
    """Run one function after another, until the other end closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it interrupts functions only
    with _channel() as channel:
        inbox = Inbox()
        while data := channel.recv(_READ_BYTES):
            inbox.receive(data)
            for message in inbox.take():
                if message:
                    channel.sendall(frame(_answer(message)))
                else:  # another rank failed
                    lifecycle.abandon()
    lifecycle.shutdown()


def _channel() -> socket.socket:
    """Take the socket from standard input, which programs find empty."""
    channel = socket.socket(fileno=os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return channel


def _answer(message: bytes) -> bytes:
    """Run a function; pack its result, or its error with the traceback as text."""
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            function, arguments = unpack(message)
            packed = pack((function(*arguments), "", "", None), "the result")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except BaseException as error:  # noqa: BLE001 - raised again by the process at the other end
        lifecycle.abandon()  # the other ranks must not wait for this one
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function
        packed = _packed_error(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return packed


def _packed_error(error: BaseException) -> bytes:
    text, line = "".join(traceback.format_exception(error)), traceback.format_exception_only(error)[0].strip()
    with contextlib.suppress(Exception):  # an exception that cannot be pickled, or not be made again
        packed = pack((None, text, line, error if isinstance(error, Exception) else None), line)
        unpack(packed)
        return packed
    return pack((None, text, line, None), line)
