"""The command ``w2sg``: a verb, then settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from w2sg import stops
from w2sg.cli.help import FORMS, HELP, VERBS, asks_help, print_help
from w2sg.config.programs import JOBS, job_is
from w2sg.errors import ConfigError


def main() -> None:
    """What is typed after ``w2sg``."""
    with stops.command(last=True):
        _main(sys.argv[1:])


def _main(words: list[str]) -> None:
    from w2sg.cli.launch import readable_errors
    from w2sg.console import any_terminal

    any_terminal()
    with readable_errors():
        program = _program(words)
    program()


def _program(words: list[str]) -> Callable[[], None]:
    """What is to be called; ``sys.argv`` holds what it reads."""
    verb, *rest = words or ["help"]
    if verb in HELP:
        if rest and "=" not in rest[0] and rest[0] not in (*VERBS, *HELP, "evaluate"):
            raise ConfigError([unknown(rest[0])])
        return lambda: print_help(rest[0] if rest else None)
    if verb == "--version":
        from w2sg import __version__

        return lambda: print(f"w2sg {__version__}")
    if verb in ("--install-completion", "--complete"):
        from w2sg.cli import completion

        if verb == "--install-completion":
            completion.install(rest)
            return lambda: None
        return lambda: completion.complete(rest)
    if verb not in VERBS:
        raise ConfigError([unknown(verb)])
    if asks_help(rest):
        return lambda: print_help(verb)
    sys.argv[1:] = settings(verb, rest) if verb in JOBS else rest
    if verb in JOBS:
        job_is(verb)
    module = import_module(f"w2sg.cli.{'evaluate' if verb in JOBS else verb}")
    return module.look if verb in JOBS else module.main


def settings(verb: str, words: list[str]) -> list[str]:
    """What a job's words are in keys of conf/evaluate.yaml.

    >>> settings("store", ["why", "student-1a2b", "out=runs"])
    ['store=why', 'key=student-1a2b', 'out=runs']
    >>> settings("compare", ["outputs/loss=rkl"])
    ['runs=outputs/loss=rkl']

    Raises:
        ConfigError: there are more words than the verb takes, or too few.
    """
    keys = [JOBS[verb], *(["key"] if verb == "store" and words[:1] == ["why"] else [])]
    typed, left = [], list(words)
    for key in keys:
        place = next((place for place, word in enumerate(left) if not is_setting(word)), None)
        if place is not None:
            typed.append(f"{key}={left.pop(place)}")
    named = typed or any(word.lstrip("-+").startswith(f"{JOBS[verb]}=") for word in left)
    if verb == "check-theory" and not named:
        typed = [f"{JOBS[verb]}=all"]
    elif not named:
        raise ConfigError([f"w2sg {verb}: needs {FORMS[verb]}, as `w2sg {verb} {VERBS[verb][1][0]}`"])
    if more := [word for word in left if not is_setting(word)]:
        meant = f"did you mean to={more[0]}?" if verb == "export" else "a setting is typed key=value"
        raise ConfigError([f"{more[0]}: w2sg {verb} takes {FORMS[verb]}; {meant}"])
    return [*typed, *left]


def is_setting(word: str) -> bool:
    """Whether a word is a flag or ``key=value``, and no path, which may hold an equal sign.

    >>> is_setting("out=runs"), is_setting("outputs/loss=rkl"), is_setting("-m")
    (True, False, True)
    """
    typed = re.match(r"[+~]{0,2}([A-Za-z_][\w.@]*|hydra/[\w/]+)=", word) is not None
    return word.startswith("-") or (typed and not Path(word).exists())


def unknown(verb: str) -> str:
    """What to do about a verb that there is none of."""
    from w2sg.config.suggest import similar

    if "=" in verb:
        return f"{verb}: a verb comes first, as `w2sg train {verb}`"
    near = similar(verb, VERBS, 1)
    words = f"did you mean `w2sg {near[0]}`?" if near else f"choose one of {', '.join(VERBS)}"
    return f"{verb}: there is no such verb; {words}"


if __name__ == "__main__":
    main()
