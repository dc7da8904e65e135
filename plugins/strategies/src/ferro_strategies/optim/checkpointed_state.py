"""CheckpointedState: state of parameters that a checkpoint saves and loads, each rank its pieces, without messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array
from ..nn.checkpoint_piece import CheckpointPiece, piece_like_parameter
from ..nn.checks import first_few
from ..nn.parameter import Parameter
from .state import ParameterState


class CheckpointedState(ParameterState):
    """The base of optimizers and of averages of weights, with the methods by which a checkpoint reads and writes them.

    An array is cut as its parameter is, and is called "<name of the parameter>.<name of the array>", so it fits the
    plain optimizer of the plain module, and any other strategy. Settings and counts are values, the same on all ranks.

    Attributes:
        checkpoint_values_by_rank: False: the values are the same on all ranks.
    """

    checkpoint_values_by_rank: ClassVar[bool] = False

    def checkpoint_optimizer_arrays(self, names: Mapping[int, str]) -> dict[str, CheckpointPiece]:
        """Describe this rank's pieces of the arrays of all parameters.

        A parameter that is trained and has no state yet gets the state that its first step would make.

        Args:
            names: the names of parameters by their `id`, from `Module.checkpoint_parameters`. A parameter that is not
                among them is called by its position in `parameters`.

        Raises:
            UsageError: the state does not fit what a parameter holds, as in an FSDP model's pass; or it is not known
                where a piece lies, or how a parameter of a pipeline is called.
        """
        self.check_fits()
        self.prepare_checkpoint_load()
        pieces: dict[str, CheckpointPiece] = {}
        for index, (parameter, arrays) in enumerate(zip(self.parameters, self.state, strict=True)):
            name = names.get(id(parameter))
            if name is None and parameter.stages is not None:
                # A pipeline names one of several copies of a parameter on one rank; the others follow it. An empty
                # parameter stands for those of a rank that has nothing to train.
                if parameter.tied_copy or parameter.data.size == 0:
                    continue
                raise UsageError(
                    f"{type(self).__name__}: parameter {parameter.name!r} is a part of a pipeline, where its position "
                    "is another on each rank. Put the pipeline into the state that is saved or loaded, too."
                )
            for kind, array in arrays.items():
                key = f"{index if name is None else name}.{kind}"
                if key in pieces:
                    raise UsageError(
                        f"{type(self).__name__}: two of its parameters are called {name!r}, because they are of two "
                        "modules. Give each module an optimizer of its own, or put both into one module."
                    )
                if kind in self.whole_arrays:
                    pieces[key] = CheckpointPiece.whole(array, on_all_ranks=parameter.stages is None)
                else:
                    pieces[key] = piece_like_parameter(parameter, array)
        return pieces

    def prepare_checkpoint_load(self) -> None:
        """Make the state of all parameters that are trained, so that a checkpoint can be loaded into it.

        It is the state from which a first step begins, so that it changes no result.
        """
        for index, parameter in enumerate(self.parameters):
            if parameter.requires_grad:
                parameter.materialize()
                self._complete_state(index)

    def checkpoint_values(self) -> dict[str, object]:
        """Copy settings, counts and the place in a schedule."""
        return {name: array.tolist() for name, array in self.settings_state().items()}

    def load_checkpoint_values(self, value: Any) -> None:
        """Restore what `checkpoint_values` copied, after `check_checkpoint_values`."""
        self.check_checkpoint_values(value)
        self.load_settings(_arrays(value))

    def check_checkpoint_values(self, value: Any) -> None:
        """Refuse values that cannot be loaded.

        Raises:
            UsageError: a setting is missing, unexpected, or out of its range.
        """
        own = type(self).__name__
        if not isinstance(value, Mapping):
            raise UsageError(f"{own}: expected the settings of a checkpoint, got {value!r:.80}.")
        if faults := self.settings_faults(_arrays(value)):
            raise UsageError(f"{own}: the settings of the checkpoint do not fit: {'; '.join(first_few(faults))}.")

    def copy_state(self, source: Parameter, target: Parameter) -> None:
        """Give a parameter, which is a copy of another one, a copy of that one's state, if both are known here."""
        index_of = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        if id(source) in index_of and id(target) in index_of:
            arrays = self.state[index_of[id(source)]]
            self.state[index_of[id(target)]] = {name: array.copy() for name, array in arrays.items()}

    def _complete_state(self, index: int) -> None:
        """Make those arrays of the parameter at this position that are not there yet."""
        state = self.state[index]
        if not state:
            state.update(self.initial_state(index))


def _arrays(value: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(item) for name, item in value.items()}
