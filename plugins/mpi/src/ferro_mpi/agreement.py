"""Agreement: before data moves all ranks make sure that they make the same call.

Who has returned from it knows that all others are in the call, too: MPI's collectives can be used
then, which neither notice another call nor give up waiting.

On one host each rank writes one word on the board and looks at the others': the call's digest with
a number of the turn. Words are used in turns: whoever writes the next but one has seen that all
have written the next, and so have read this.

    turn       0             1             2 (as 0)
    rank 0     word 0   →    word 1   →    word 0
    rank 1     word 0   →    word 1   →    …

Small operands can come along: a rank writes its own into its slot before its word, and reads the
others' once all have come. So a collective takes one meeting of all ranks, not two; that counts
where ranks are more than cores and each meeting means some switches between processes.

Where ranks share no memory, the default of `ferro.Backend` serves: labels go round as messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ferro import PeerLost
from ferro.collectives.label import Call, mismatch
from ferro.types import Array
from ferro_mpi.board import Board
from ferro_mpi.waiting import Lookout, Pause

_TURN_BITS = 16
_TURNS = (1 << _TURN_BITS) - 1
_DIGEST_BYTES = 5  # with the turn's bits it stays a positive 64-bit number
_MOST_REMEMBERED = 1024
_PROGRESS = 16  # looks after which MPI is let go on


class BoardAgreement:
    """Agreement on the board.

    Args:
        board: the group's.
        lookout: ends the waits.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, board: Board, lookout: Lookout, rank: int, world_size: int) -> None:
        self._board = board
        self._words = board.words
        self._lookout = lookout
        self._rank = rank
        self._world_size = world_size
        self._turn = 0
        self._views: list[dict[tuple[np.dtype, int], Sequence[Array]]] = [{}, {}]
        self._known: dict[bytes, int] = {}
        self._shown = [b"", b""]
        self._own = [board.word(rank, turn) for turn in (0, 1)]
        others = [other for other in range(world_size) if other != rank]
        self._others = [[(board.word(r, turn), r) for r in others] for turn in (0, 1)]
        self._cells = [[cell for cell, _ in places] for places in self._others]

    def share(self, call: Call, operand: Array, deadline: float) -> Sequence[Array]:
        """Agree, and return all ranks' operands: to be read, not written, until the next call.

        Args:
            call: what this rank calls.
            operand: at most `Board.slot_bytes`; of the same dtype and size on ranks that agree.
            deadline: absolute `time.monotonic()` second.
        """
        turn = (self._turn + 1) & 1
        key = (operand.dtype, operand.size)
        views = self._views[turn].get(key) or self._view(turn, operand)
        views[self._rank][...] = operand
        self(call, deadline)
        return views

    def __call__(self, call: Call, deadline: float) -> None:
        """See `Backend.agree`."""
        label = call.packed or call.label()
        digest = self._known.get(label) or self._learn(label)
        self._turn = number = self._turn + 1
        turn = number & 1
        if self._shown[turn] is not label:
            self._board.show_label(label, turn)
            self._shown[turn] = label
        word = digest | (number & _TURNS)
        words = self._words
        words[self._own[turn]] = word
        for cell in self._cells[turn]:
            if words[cell] != word:
                self._wait(call, word, turn, deadline)
                return

    def _wait(self, call: Call, word: int, turn: int, deadline: float) -> None:
        """Wait for those that have not come, and look at what they call."""
        words, looks, let_run = self._words, self._lookout.looks, self._lookout.let_run
        for cell, rank in self._others[turn]:
            for _ in range(looks):
                if words[cell] == word:
                    break
                let_run()
            else:
                self._wait_for(call, word, turn, cell, rank, deadline)

    def _wait_for(
        self, call: Call, word: int, turn: int, cell: int, rank: int, deadline: float
    ) -> None:
        words, look = self._words, self._lookout.look
        pause = Pause()
        count = 0
        while (there := words[cell]) != word:
            if there & _TURNS == word & _TURNS:
                raise mismatch(self._rank, call, rank, self._board.label(rank, turn))
            look(deadline, (rank,))
            if self._board.left(rank) and words[cell] == there:
                raise PeerLost(f"rank {rank} has left the group", peer=rank)
            count += 1
            if count % _PROGRESS == 0:
                self._lookout.progress()
            pause()

    def _view(self, turn: int, operand: Array) -> Sequence[Array]:
        """Return the slots of a turn as operands like this one; remembered."""
        views = [
            self._board.slot(rank, turn)[: operand.nbytes].view(operand.dtype)
            for rank in range(self._world_size)
        ]
        if len(self._views[turn]) >= _MOST_REMEMBERED:
            self._views[turn].clear()
        self._views[turn][operand.dtype, operand.size] = views
        return views

    def _learn(self, label: bytes) -> int:
        digest = hashlib.blake2b(label, digest_size=_DIGEST_BYTES).digest()
        if len(self._known) >= _MOST_REMEMBERED:
            self._known.clear()
        found = self._known[label] = int.from_bytes(digest, "big") << _TURN_BITS
        return found
