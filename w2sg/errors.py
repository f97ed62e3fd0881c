"""Errors that a user can mend: bad input, and code from outside w2sg. Any other is a bug and keeps its traceback."""

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Bad input. The message names what is wrong and says how to fix it."""


class ConfigError(UserError):
    """Every problem of one configuration, reported at once.

    Args:
        problems: one line each, ``"key: what is wrong and what to do"``.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        words = f"Invalid configuration ({len(problems)} problems):\n" + "\n".join(f"  {p}" for p in problems)
        super().__init__(problems[0] if len(problems) == 1 else words)


class TrainingError(UserError):
    """Training cannot continue, for instance because a loss is not finite. Finished stages are kept."""


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# -- code from outside ------------------------------------------------------------------------------------------------


class OutsideError(UserError):
    """Code from outside w2sg failed. Its cause is what that code raised; HYDRA_FULL_ERROR=1 shows the traceback."""


def path_of(thing: Any) -> str:
    """The dotted path of a class or function, also where `functools.partial` binds its options; else of its class."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


@contextlib.contextmanager
def calling(thing: Any, hook: str = "") -> Iterator[None]:
    """Around a call of what may be from outside w2sg: its error becomes one line with the hook and the user's line.

    Args:
        thing: the function, class or object that is called. hook: the method, where it is one.

    Raises:
        OutsideError: it raised anything but a `UserError`, and is from outside.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        path = path_of(thing)
        if path.startswith("w2sg.") or type(error).__name__ == "OutOfMemoryError":  # a smaller batch mends that
            raise
        what = type(error).__name__ + (f": {first_line(error)}" if str(error).strip() else "")
        raise OutsideError(f"{path}{hook and f'.{hook}'}: {what}{_place(error, path)}") from error


def _place(error: Exception, path: str) -> str:
    """The last line of the thing's own file that an error went through."""
    file = next(
        (getattr(sys.modules.get(part), "__file__", None) for part in _starts(path) if part in sys.modules), None
    )
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if lines else ""


def _starts(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def name_hooks(kind: type, base: type) -> None:
    """Let every method that a class from outside overrides be called as by `calling`.

    Args:
        kind: the class. base: whose methods are its hooks.
    """
    if path_of(kind).startswith("w2sg."):
        return
    for name, hook in list(vars(kind).items()):
        if name not in vars(base):
            continue
        if inspect.isfunction(hook):
            setattr(kind, name, _named(hook, kind))
        elif isinstance(hook, property) and hook.fget is not None:
            setattr(kind, name, hook.getter(_named(hook.fget, kind)))


def _named(hook: Callable[..., Any], kind: type) -> Callable[..., Any]:
    @functools.wraps(hook)
    def call(*args: Any, **options: Any) -> Any:
        with calling(kind, hook.__name__):
            return hook(*args, **options)

    return call
