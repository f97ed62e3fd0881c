"""What was typed, as Hydra's grammar wants it.

Sweep agents write ``--lr=0.1``; a path may hold brackets, commas, equal signs and letters of any script; ``-m`` may
stand anywhere. None of that is the user's to know. A command that Hydra reads as it is meant is not touched, so that
its run keeps its folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from w2sg.config import renamed
from w2sg.config.suggest import similar
from w2sg.errors import ConfigError

ALONE = {
    "--help": "-h",
    "--hydra-help": "",
    "--version": "",
    "--resolve": "",
    "--run": "-r",
    "--multirun": "-m",
    "--shell-completion": "-sc",
}
FOLDERS = ("out", "store", "root", "to")  # keys of folders that are made where they are missing
WITH_VALUE = {
    "--cfg": "-c",
    "--package": "-p",
    "--config-path": "-cp",
    "--config-name": "-cn",
    "--config-dir": "-cd",
    "--experimental-rerun": "",
}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # what may follow --info

# Keys whose value is text whatever it looks like: names, paths and questions.
TOP_TEXTS = {"out", "root", "runs", "export", "harness", "annotations", "of", "to", "include", "key", "system"}
TEXTS = re.compile(
    r"(weak|strong)\.(name|before_alignment|revision|chat_template)|dataset\.(path|subset|revision|difficulty\.column)"
    r"|dataset\.zero_shot\.question|plan\.file|logger\.(project|entity|group)|method\.(\w*instruction|answers|evaluation\.tax)"
    r"|refine\.\w*instruction|(method\.)?judge\.(model|tuned|untuned|question)|method\.alignment\.judge\.model"
    r"|(decoder|method\.decoder)\.(guide\.model|server\.(url|model|tokenizer))|server\.(url|model|key_variable)"
)


@dataclass
class Typed:
    """A command line, taken apart.

    Attributes:
        flags: Hydra's own, each with its value.
        overrides: ``key=value``, as Hydra reads them.
        multirun: whether commas are sweeps.
        sweeps: whether the program can be swept.
    """

    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    sweeps: bool = True

    @property
    def arguments(self) -> list[str]:
        """For Hydra's parser, which takes flags before overrides; `w2sg.config.plugins` adds the folder by itself."""
        flags, kept = iter(self.flags), []
        for flag in flags:
            if flag in ("--config-dir", "-cd"):
                next(flags)
            elif not flag.startswith(("--config-dir=", "-cd=")):
                kept.append(flag)
        return kept + self.overrides

    @property
    def folder(self) -> Path | None:
        """The user's folder of conf files, from ``--config-dir``."""
        name = self.value("--config-dir")
        return None if name is None else Path(name)

    def has(self, *names: str) -> bool:
        """Whether one of these flags was given."""
        return any(flag.partition("=")[0] in names for flag in self.flags)

    def value(self, name: str) -> str | None:
        """What was given with a flag of `WITH_VALUE`."""
        for place, flag in enumerate(self.flags):
            start, equals, value = flag.partition("=")
            if start in (name, WITH_VALUE[name]):
                return value if equals else self.flags[place + 1]
        return None


def typed(arguments: Sequence[str], sweeps: bool = True) -> Typed:
    """Take a command line apart: Hydra's flags, and ``key=value`` with or without dashes before it.

    Args:
        arguments: ``sys.argv[1:]``.
        sweeps: whether the program can be swept; where it cannot, a comma is always part of a value.

    Raises:
        ConfigError: a flag that there is none of.
    """
    line, problems, left = Typed(sweeps=sweeps), [], list(arguments)
    one = {name: name for name in ALONE} | {short: name for name, short in ALONE.items() if short}
    two = {name: name for name in WITH_VALUE} | {short: name for name, short in WITH_VALUE.items() if short}
    while left:
        word = left.pop(0)
        start, equals, value = word.partition("=")
        if word in one:
            line.flags.append(word)
        elif start in two:
            line.flags.append(word)
            if not equals:
                if not left:
                    problems.append(f"{word}: needs a value")
                else:
                    line.flags.append(left.pop(0))
        elif start in ("--info", "-i"):
            line.flags.append(word)
            if not equals and left and left[0] in INFO:
                line.flags.append(left.pop(0))
        elif not word.startswith("-"):
            line.overrides.append(word)
        elif re.fullmatch(r"--?[A-Za-z_][\w./@-]*", start) and (equals or _takes_next(start, left)):
            line.overrides.append(f"{_key(start)}={value if equals else left.pop(0)}")
        else:
            problems.append(f"{word}: {_no_flag(word)}")
    if problems:
        raise ConfigError(problems)
    line.overrides = [_at_home(renamed.override(override)) for override in of_judges(line.overrides)]
    line.multirun = sweeps and (
        line.has("--multirun", "-m")
        or any(o.lstrip("+").replace(" ", "").lower() == "hydra.mode=multirun" for o in line.overrides)
        or any(_sweeps(o, line.folder) for o in line.overrides)
    )
    line.overrides = [quoted(override, line.multirun) for override in line.overrides]
    return line


def _at_home(override: str) -> str:
    """``out=~/runs`` with the home folder's path; a shell leaves the tilde as it is after ``=``."""
    key, _, value = override.partition("=")
    return f"{key}={Path(value).expanduser()}" if key in FOLDERS and value.startswith("~") else override


def _takes_next(word: str, left: Sequence[str]) -> bool:
    """Whether ``--key value`` was meant."""
    if not left or similar(word, [*ALONE, *WITH_VALUE, "--info"], 1, 0.8):
        return False
    following = left[0]
    return bool(re.match(r"-[\d.]", following)) or not (following.startswith("-") or "=" in following)


def _key(word: str) -> str:
    """A key after its dashes, which agents also write for the underscores in it."""
    return word.lstrip("-").replace("-", "_") if "/" not in word and "@" not in word else word.lstrip("-")


def _no_flag(word: str) -> str:
    near = similar(word, [*ALONE, *WITH_VALUE, "--info"], 1)
    return "there is no such flag; " + (f"did you mean {near[0]}?" if near else "a setting is typed key=value")


def _sweeps(override: str, folder: Path | None) -> bool:
    """Whether an experiment is a sweep of its own: then commas typed beside it are sweeps."""
    key, _, name = override.partition("=")
    if key.lstrip("+") != "experiment":
        return False
    from w2sg.config.plugins import files

    try:
        return any("MULTIRUN" in file.read_text(encoding="utf-8") for file in files("experiment", folder)[name.strip()])
    except (OSError, ValueError, KeyError):
        return False


def of_judges(overrides: Sequence[str]) -> list[str]:
    """Settings of a judge, which may be typed like those of any group, under the keys that they have.

    >>> of_judges(["judge@method.judge=llm", "judge.model=gpt2"])
    ['judge=llm', 'method.judge.model=gpt2']
    >>> of_judges(["judge._target_=mine.Longest", "judge.most=5"])
    ['judge=mine.Longest', 'method.judge.most=5']
    """
    typed = [
        re.sub(r"^(judge@method\.judge|(method\.)?judge\._target_)=", "judge=", override) for override in overrides
    ]
    return [re.sub(r"^([+~]{0,2})judge\.", r"\1method.judge.", override) for override in typed]


# ---------------------------------------------------------------------------------------------------------------------
# Quotes
# ---------------------------------------------------------------------------------------------------------------------


def is_text(key: str) -> bool:
    """Whether the value of a key is text: a path, a name, a question."""
    return key in TOP_TEXTS or TEXTS.fullmatch(key) is not None


def quoted(override: str, multirun: bool = False) -> str:
    """An override whose text Hydra would take for something else, in quotes; with ``-m`` a comma parts two values.

    >>> quoted("export=outputs/loss=rkl,seed=1")
    "export='outputs/loss=rkl,seed=1'"
    >>> quoted("strong.name=a,b", multirun=True), quoted("seed=1,2"), quoted("out=runs/first")
    ('strong.name=a,b', 'seed=1,2', 'out=runs/first')
    """
    key, equals, value = override.partition("=")
    if not equals or not is_text(key.lstrip("+")):
        return override
    parsed = _parsed(override)
    if parsed is not None and not parsed.is_sweep_override() and isinstance(parsed.value(), str | None):
        return override
    if multirun and parsed is not None and parsed.is_sweep_override():
        values = list(parsed.value().list) if parsed.is_choice_sweep() else []
        if all(value is None or isinstance(value, str) or hasattr(value, "with_quotes") for value in values):
            return override
    parts = re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|[^,])+", value)
    if multirun and len(parts) > 1:
        return f"{key}=" + ",".join(_in_quotes(part) if _odd(part) else part for part in parts)
    return f"{key}={_in_quotes(value)}"


def _odd(value: str) -> bool:
    parsed = _parsed(f"key={value}")
    return parsed is None or parsed.is_sweep_override() or not isinstance(parsed.value(), str)


def _in_quotes(value: str) -> str:
    """A value in quotes, where ``${name}`` still is another key's value, and every other dollar is itself."""
    from hydra.core.override_parser.types import Quote, QuotedString

    value = re.sub(r"\$\{(?![\w.]+(:[^{}]*)?\})", r"\\${", value)
    return QuotedString(text=value, quote=Quote.single).with_quotes()


@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parsed(override: str) -> Any:
    """The override as Hydra reads it; None where it cannot."""
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(override)
    except HydraException:
        return None


def sweep_in(override: str) -> bool:
    """Whether an override has several values, each of which is a run of its own."""
    parsed = _parsed(override)
    return parsed is not None and parsed.is_sweep_override()


def problem_of(override: str, multirun: bool, sweeps: bool = True, group: bool = False) -> str | None:
    """Why Hydra cannot read an override, in one line; None where it can.

    Args:
        multirun: whether commas are sweeps.
        sweeps: whether the program can be swept.
        group: whether the key is a group, of which one file is chosen.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+~") or override
    if not equals and not override.startswith("~"):
        return f"{override}: a setting is typed key=value"
    parsed = _parsed(override)
    if parsed is None:
        if not re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w./@:-]*", key):
            return f"{name}: no key is written like that; a setting is typed key=value"
        if re.match(r"""\{\s*["']""", value):
            return f"{name}: {value} cannot be read; keys stand without quotes and after a colon a space, as {{a: 1}}"
        return f"{name}: {value} cannot be read; text with signs in it stands in quotes of its own: '{key}=\"...\"'"
    chosen = parsed.value() if group and equals and not parsed.is_sweep_override() else None
    if isinstance(chosen, list) and len(chosen) != 1:  # of which Hydra would lay one over the other
        return f"{name}: {value} is a list; choose one, as {name}={chosen[0] if chosen else '...'}"
    if parsed.is_sweep_override() and not multirun:
        if group or not sweeps:
            again = "add -m to run each of them, or choose one" if sweeps else "give one"
            return f"{name}: {value} are several values; {again}"
        return (
            f"{name}: {value} are several values; add -m to run each of them, or write [{value}] for a list, or "
            f"'{key}=\"{value}\"' for text with commas"
        )
    return None
