"""Conf files and code from outside: those of the user and of installed packages.

The user's are read first: a folder given by ``--config-dir``, then ``./conf`` of the working folder. A file of theirs
with the name of a shipped one is read in its place, which is said once.

A package offers its folder by an entry point of the group ``w2sg.plugins``. The entry point's value is the dotted name
of the folder, as ``mine.conf``. The code that its files name is imported once one of them is chosen.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from w2sg.config.suggest import listed, similar
from w2sg.console import Plain
from w2sg.errors import ConfigError, UserError
from w2sg.stops import PARENT

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).resolve().parents[1]
# The shipped files: w2sg/conf of an installed wheel, conf/ beside w2sg/ in a clone.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
ENTRY_POINTS = "w2sg.plugins"
_given: list[Path] = []  # the folder given by --config-dir; Hydra composes from a global place as well
_alone: list[bool] = []  # whether only shipped files count; see `shipped_alone`


@cache
def packaged() -> dict[str, Path]:
    """The folders of installed packages by the names of their entry points; an unusable one is left out and named."""
    folders = {}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            specification = find_spec(entry.value)
            places = list(specification.submodule_search_locations or ()) if specification else []
            reason = "there is no such folder" if not places else ""
        except Exception as error:  # the package above the folder is imported, and may raise anything
            reason = f"{type(error).__name__}: {error}"
        if not reason and not any(Path(places[0]).rglob("*.yaml")):
            reason = f"{places[0]} has no .yaml file; list them as package data"
        if reason:
            log.warning("the plugin %s = %s is left out: %s", entry.name, entry.value, reason)
        else:
            folders[entry.name] = Path(places[0]).resolve()
    return folders


def own(users: Path | None = None) -> list[Path]:
    """The user's folders of conf files, the one that counts first.

    Args:
        users: as given by ``--config-dir``; None for the folder that `use` was given.
    """
    here = Path.cwd() / "conf"
    found = [*(_given if users is None else [users.resolve()]), *([here.resolve()] if here.is_dir() else [])]
    return [] if _alone else [folder for folder in dict.fromkeys(found) if folder != CONF.resolve()]


@contextlib.contextmanager
def shipped_alone() -> Iterator[None]:
    """Leave out the user's files, where a result is compared with a known one."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def folders(users: Path | None = None) -> list[Path]:
    """Every folder of conf files; of two files of one name, the first counts.

    Args:
        users: as in `own`.
    """
    return list(dict.fromkeys([*own(users), CONF, *packaged().values()]))


def files(group: str, users: Path | None = None) -> dict[str, list[Path]]:
    """The choices of a group, each with its files.

    Args:
        group: as it is typed: ``weak`` and ``strong`` are chosen among the files of ``model``.
        users: as in `own`.
    """
    folder = {"weak": "model", "strong": "model"}.get(group, group.partition("@")[0].strip("/"))
    choices: dict[str, list[Path]] = {}
    for conf in folders(users):
        for file in sorted((conf / folder).glob("*.yaml")):
            if not file.stem.startswith("_"):
                choices.setdefault(file.stem, []).append(file)
    return dict(sorted(choices.items()))


def use(users: Path | None) -> None:
    """Let Hydra search the user's folders and those of packages, and Python import what lies in the current folder.

    Call before Hydra composes anything.

    Args:
        users: the folder given by ``--config-dir``.

    Raises:
        ConfigError: there is no such folder.
    """
    if users is not None and not users.is_dir():
        raise ConfigError([f"--config-dir: there is no folder {users.absolute()}"])
    _given[:] = [] if users is None else [users.resolve()]
    for folder in own():
        _say_overridden(folder)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file of the user's hides a package

    from hydra.core.plugins import Plugins

    Plugins.instance().register(_search_path_plugin())


@cache
def _search_path_plugin() -> type:
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class Folders(SearchPathPlugin):
        """Puts the user's folders before the shipped one, and those of packages after it."""

        def manipulate_search_path(self, search_path) -> None:
            for folder in reversed(own()):
                provider = "command-line" if folder in _given else "working folder"
                search_path.prepend(provider=provider, path=f"file://{folder}", anchor="main")
            for name, folder in packaged().items():
                search_path.append(provider=f"{ENTRY_POINTS}: {name}", path=f"file://{folder}")

    return Folders


def _say_overridden(folder: Path) -> None:
    """Say once which of a user's files are read in place of others of their names."""
    theirs = [CONF, *packaged().values()]
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.yaml"))
    others = {name: [other / name for other in theirs if (other / name).is_file()] for name in names}
    taken = [name for name in names if any(o.read_bytes() != (folder / name).read_bytes() for o in others[name])]
    if taken and PARENT not in os.environ:
        shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        read = "is read in place of w2sg's" if len(taken) == 1 else "are read in place of w2sg's of those names"
        _note(f"{', '.join(str(shown / name) for name in taken)} {read}")


@cache
def _note(line: str) -> None:
    Plain(stderr=True).say(line, "note: ", "yellow")


def clashes(choices: Mapping[str, str]) -> list[str]:
    """Choices of a run that are files of several folders, of which only one would be read.

    Args:
        choices: the file chosen in each group.
    """
    problems = {}
    for group, choice in choices.items():
        several = files(group).get(str(choice), [])
        several = [file for file in several if any(file.is_relative_to(folder) for folder in own())] or several
        if len({file.read_bytes() for file in several}) > 1:
            problems[several[0]] = (
                f"{group}: {choice} is a file of {listed([str(file) for file in several])}; rename all but one of them"
            )
    return list(problems.values())


def resolve(target: str) -> Any:
    """What the dotted path of a ``_target_`` names.

    Raises:
        UserError: it names nothing, or its module cannot be imported; says what may be meant.
    """
    if not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"there is no {target or 'name'}; a function is named module.function")
    first, *rest = target.split(".")
    module, missing = _imported(first, target)
    if module is None:
        if hidden := _hidden(target):
            raise UserError(f"there is no {target}: {hidden}")
        raise UserError(f"there is no {target} ({missing}); put your module into {os.getcwd()} or on PYTHONPATH")
    path = first
    while rest and (inner := _imported(f"{path}.{rest[0]}", target)[0]) is not None:
        module, path = inner, f"{path}.{rest.pop(0)}"
    thing = module
    for name in rest:
        try:
            thing = getattr(thing, name)
        except AttributeError as error:
            if hidden := _hidden(target):
                raise UserError(f"there is no {target}: {hidden}") from error
            near = similar(target.rpartition(".")[2], [name for name in vars(module) if name[0] != "_"])
            meant = f"; did you mean {listed([f'{path}.{name}' for name in near])}?" if near else ""
            raise UserError(f"there is no {target} ({error}){meant}") from error
    return thing


def _imported(path: str, target: str) -> tuple[ModuleType | None, str]:
    """The module of a dotted path; or None, and Python's words, where there is no such module.

    Raises:
        UserError: there is one, and it cannot be imported; names the file and the line at fault.
    """
    try:
        return importlib.import_module(path), ""
    except ModuleNotFoundError as error:
        if error.name is not None and f"{path}.".startswith(f"{error.name}."):
            return None, str(error)
        raise UserError(f"{path} cannot be imported: {error}{_place(error, target)}") from error
    except Exception as error:  # whatever the user's module raises when it is imported
        raise UserError(f"{target}: {type(error).__name__}: {error}{_place(error, target)}") from error


def _place(error: Exception, target: str) -> str:
    """The file and the line of a user's module that raised an error when it was imported."""
    if isinstance(error, SyntaxError):  # which says so itself
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    places = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    if not places:
        return ""
    users = [place for place in places if Path(place.filename).stem in target.split(".")]
    refused = Path(places[-1].filename).is_relative_to(PACKAGE)  # a class that w2sg does not take
    place = users[-1] if refused and users else places[-1]
    file = Path(place.filename)
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f" ({shown}, line {place.lineno})"


def source_of(thing: Any, target: str) -> str:
    """The source text that decides what a function or class from outside w2sg does, for cache keys.

    It is the thing's own text; where that names anything else of its file, the whole file, since that may change, too.

    Raises:
        UserError: the source cannot be read, as of something typed into an interpreter.
    """
    thing = inspect.unwrap(thing)
    try:
        text = inspect.getsource(thing)
        module = inspect.getmodule(thing)
        named = {node.id for node in ast.walk(ast.parse(textwrap.dedent(text))) if isinstance(node, ast.Name)}
        values = [vars(module)[name] for name in named & set(vars(module)) - {thing.__name__}]
        others = [value for value in values if not inspect.ismodule(value)]
        if any(getattr(value, "__module__", module.__name__) == module.__name__ for value in others):
            text = inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise UserError(f"{target}: its source cannot be read, so its results cannot be cached") from error
    return text


def _hidden(target: str) -> str:
    """That a module of the current folder is hidden by another one of its name."""
    first = target.partition(".")[0]
    users = Path.cwd() / f"{first}.py"
    imported = getattr(sys.modules.get(first), "__file__", None)
    if not users.is_file() or imported is None or Path(imported).resolve() == users.resolve():
        return ""
    return f"{first} is {imported}, which hides {users}; rename yours"
