"""The place of a function (module, file and name), by which another process finds and runs it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

from ferro.errors import UsageError

_LOADED_AS = "ferro_rank_functions"


def locate(function: Callable[..., object]) -> dict[str, str]:
    """Return the module, file and name by which another process finds `function`.

    Raises:
        UsageError: it is not a function at the top level of a file.
    """
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, FunctionType) or "." in name or name == "<lambda>":
        raise UsageError(
            f"run_ranks: {name} cannot be sent to other processes, which load it by file and "
            "name: give a function defined at the top level of a file, and pass what it needs "
            "through args="
        )
    path = Path(inspect.getfile(function)).absolute()
    if not path.is_file():
        raise UsageError(f"run_ranks: {name} comes from {path}, which is no file to load it from")
    return {"module": function.__module__, "path": str(path), "name": name}


def load(place: dict[str, str]) -> Callable[..., object]:
    """Return the function at a place, importing its module, or else loading its file.

    Raises:
        UsageError: the file has no such function.
    """
    module = _imported(place["module"], place["path"]) or _from_file(place["path"])
    function = getattr(module, place["name"], None)
    if not callable(function):
        raise UsageError(f"{place['path']} has no function {place['name']!r} at its top level")
    return function  # type: ignore[no-any-return]


def _imported(name: str, path: str) -> ModuleType | None:
    """Import the module by its name where that finds the same file."""
    if name == "__main__":
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or Path(spec.origin) != Path(path):
        return None
    return importlib.import_module(name)


def _from_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_LOADED_AS, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_LOADED_AS] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
