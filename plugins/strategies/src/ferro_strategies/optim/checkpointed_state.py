"""CheckpointedState: state of parameters that a checkpoint saves and loads, each rank its pieces, without messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array
from ..nn.checkpoint_piece import CheckpointPiece, piece_like_parameter
from ..nn.checks import first_few
from ..nn.module import Module
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
    is_applied = False  # whether the parameters hold something else than the weights that are trained

    def __init__(self, parameters: Sequence[Parameter], module: Module | None = None) -> None:
        super().__init__(parameters, module)
        self._names: dict[int, str] = {}  # of parameters by their `id`, in a checkpoint
        self._is_loading = False

    def __getstate__(self) -> dict[str, object]:
        """Leave out, for copies and pickle, what belongs to this object's parameters."""
        return {**super().__getstate__(), "_names": {}, "_is_loading": False}

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
        self._check_not_averaged()
        if not self._is_loading:
            self._check_savable()
        self._is_loading = False
        self.check_fits()
        self._complete_states()
        self._names = {id(parameter): names[id(parameter)] for parameter in self.parameters if id(parameter) in names}
        pieces: dict[str, CheckpointPiece] = {}
        named = self.names_in_checkpoint()
        for name, parameter, arrays in zip(named, self.parameters, self.state, strict=True):
            if name is None:
                continue
            for kind, array in arrays.items():
                key = f"{name}.{kind}"
                if key in pieces:
                    raise UsageError(
                        f"{type(self).__name__}: two of its parameters are called {name!r}. Give them different "
                        "names, such as those of one module that holds both."
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
        self._is_loading = True
        self._complete_states()

    def checkpoint_optimizer_parameters(self) -> list[Parameter]:
        """List the parameters, so that a checkpoint can choose their names."""
        return list(self.parameters)

    def begin_checkpoint_states(self, names: Iterable[str]) -> None:
        """Begin the state of parameters anew, of which the checkpoint that was loaded has none.

        Args:
            names: their names in `checkpoint_optimizer_arrays`.
        """
        chosen = set(names)
        for index, name in enumerate(self.names_in_checkpoint()):
            if name in chosen:
                self.state[index] = self.initial_state(index)

    def names_in_checkpoint(self) -> list[str | None]:
        """Name each parameter as the last `checkpoint_optimizer_arrays` did; None for those that it left out.

        Raises:
            UsageError: it is not known how a parameter of a pipeline is called.
        """
        found: list[str | None] = []
        for index, parameter in enumerate(self.parameters):
            name = self._names.get(id(parameter))
            if name is None and parameter.stages is not None:
                # A pipeline names one of several copies of a parameter on one rank; the others follow it. An empty
                # parameter stands for those of a rank that has nothing to train.
                if not parameter.tied_copy and parameter.data.size:
                    raise UsageError(
                        f"{type(self).__name__}: parameter {parameter.name!r} is a part of a pipeline, where its "
                        "position is another on each rank. Put the pipeline into the state that is saved or loaded, "
                        "too."
                    )
                found.append(None)
            else:
                found.append(str(index) if name is None else name)
        return found

    def checkpoint_values(self) -> dict[str, object]:
        """Copy settings, counts and the place in a schedule."""
        return {name: array.tolist() for name, array in self.settings_state().items()}

    def load_checkpoint_values(self, value: Any) -> None:
        """Restore what `checkpoint_values` copied, after `check_checkpoint_values`."""
        self.check_checkpoint_values(value)
        self.load_settings(_arrays(self.fitted_checkpoint_values(value)))

    def fitted_checkpoint_values(self, value: Any) -> Any:
        """Return the values of a checkpoint as they fit this object.

        Raises:
            UsageError: they do not fit.
        """
        return value

    def check_checkpoint_values(self, value: Any) -> None:
        """Refuse values that cannot be loaded.

        Raises:
            UsageError: a setting is missing, unexpected, or out of its range.
        """
        own = type(self).__name__
        if not isinstance(value, Mapping):
            raise UsageError(f"{own}: expected the settings of a checkpoint, got {value!r:.80}.")
        if faults := self.settings_faults(_arrays(self.fitted_checkpoint_values(value))):
            raise UsageError(f"{own}: the settings of the checkpoint do not fit: {'; '.join(first_few(faults))}.")

    def copy_state(self, source: Parameter, target: Parameter) -> None:
        """Give a parameter, which is a copy of another one, a copy of that one's state, if both are known here."""
        index_of = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        if id(source) in index_of and id(target) in index_of:
            arrays = self.state[index_of[id(source)]]
            self.state[index_of[id(target)]] = {name: array.copy() for name, array in arrays.items()}

    def _complete_states(self) -> None:
        for index, parameter in enumerate(self.parameters):
            if parameter.requires_grad:
                parameter.materialize()
                self._complete_state(index)

    def _check_savable(self) -> None:
        """Refuse to save what a training could not go on from.

        Raises:
            UsageError: so it is.
        """

    def _check_not_averaged(self) -> None:
        owners = {id(owner): owner for parameter in self.parameters for owner in parameter.state_owners}
        if any(getattr(owner, "is_applied", False) for owner in owners.values()):
            raise UsageError(
                f"{type(self).__name__}: the parameters have their averages inside EMA.applied(), so a checkpoint "
                "would not hold the weights that are trained. Save and load outside the block; inside it a state of "
                "the model alone can be saved, with the averages. Nothing was saved or loaded."
            )

    def _complete_state(self, index: int) -> None:
        """Make those arrays of the parameter at this position that are not there yet."""
        state = self.state[index]
        if not state:
            state.update(self.initial_state(index))


def _arrays(value: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(item) for name, item in value.items()}
