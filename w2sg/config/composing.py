"""Composing what was typed, before Hydra runs anything: every problem of every run at once, one line each.

Hydra stops at the first key or choice that it does not know, and says so in words of its own. Here each override is
tried alone, and the nearest real key or choice is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from w2sg.config import outputs, plugins, renamed
from w2sg.config.choices import aliases, file_problem, options, unknown_choice
from w2sg.config.defaults_source import is_code
from w2sg.config.evaluate_schema import keys_read
from w2sg.config.programs import JOBS, command
from w2sg.config.suggest import ELSEWHERE, exists, leaves, listed, nearest, unknown_key
from w2sg.config.typed import Typed, problem_of
from w2sg.errors import ConfigError

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
HERE = ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins.hydra_joblib_launcher")
PROGRAMS = ("train", "decode", "evaluate")  # and the files of conf/ that they start from
Check = Callable[[Any, Mapping[str, str]], Any]
NULL_SECTIONS = ("chat_template_kwargs", "columns", "zero_shot", "difficulty")  # keys below them are given at once


class Settled(NamedTuple):
    """What a command line asks for.

    Attributes:
        mode: of Hydra, as it is configured; None where that does not say.
        jobs: the overrides of each run of a sweep; None for a run that stands alone, and where a sweeper decides as it
            goes.
    """

    mode: Any
    jobs: list[list[str]] | None


def settle(name: str, typed: Typed, check: Check | None) -> Settled:
    """Compose and check every run that a command line asks for.

    Args:
        name: the file of conf/ that the program starts from.
        typed: the command line.
        check: what looks at a composed run and its choices; None composes alone.

    Raises:
        ConfigError: everything that is wrong with any of the runs.
    """
    import hydra
    from hydra.types import RunMode

    _tree.cache_clear()
    aliases.cache_clear()
    problem_in = {
        o: problem_of(o, typed.multirun, typed.sweeps, _is_group(o)) or (file_problem(o) if _is_group(o) else None)
        for o in typed.overrides
    }
    if problems := [p for p in problem_in.values() if p]:
        with _conf():
            problems += _refused(name, [o for o, p in problem_in.items() if p is None and not _is_sweep(o)], check)
        raise ConfigError(problems)
    with _conf():
        single = [o for o in typed.overrides if not _is_sweep(o)]
        try:
            cfg = hydra.compose(name, overrides=single, return_hydra_config=True)
        except _refusals() as error:
            raise ConfigError(_explained(name, [single], error, check)) from error
        mode = cfg.hydra.mode
        if not typed.multirun and mode != RunMode.MULTIRUN:
            if check is not None:
                try:
                    _checked(cfg, check)
                except ConfigError as error:
                    raise ConfigError(_of_added(name, single, error.problems)) from error
            return Settled(mode, None)
        if cfg.hydra.sweeper._target_ != BASIC:
            return Settled(mode, None)
        try:
            jobs = _jobs(cfg, typed.overrides)
        except _refusals() as error:
            raise ConfigError([f"the sweep cannot be taken apart: {str(error).strip().splitlines()[0]}"]) from error
        if check is not None and not str(cfg.hydra.launcher._target_).startswith(HERE):
            check = None  # runs on other machines: this one may lack what they have
        places_of: dict[str, list[int]] = {}
        for place, job in enumerate(jobs):
            try:
                cfg = hydra.compose(name, overrides=job, return_hydra_config=True)
            except _refusals() as error:
                raise ConfigError(_explained(name, jobs, error, None)) from error
            try:
                if check is not None:
                    _checked(cfg, check)
            except ConfigError as error:
                for problem in error.problems:
                    places_of.setdefault(problem, []).append(place)
        if places_of:
            raise ConfigError([p + _which(places, jobs) for p, places in places_of.items()])
        return Settled(mode, jobs)


def composed(name: str, runs: Sequence[Sequence[str]], check: Check) -> list[Any]:
    """What ``check`` makes of each run's overrides, which were settled before."""
    import hydra

    with _conf():
        return [_checked(hydra.compose(name, overrides=list(run), return_hydra_config=True), check) for run in runs]


def _conf() -> Any:
    """The folder that configurations are composed from."""
    from hydra import initialize_config_dir

    return initialize_config_dir(str(plugins.CONF), version_base="1.3")


def _checked(cfg: Any, check: Check) -> Any:
    from omegaconf import open_dict

    choices, unwritable = cfg.hydra.runtime.choices, outputs.problem(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    try:
        checked = check(cfg, choices)
    except ConfigError as error:
        raise ConfigError([*error.problems, *([unwritable] if unwritable else [])]) from error
    if unwritable:
        raise ConfigError([unwritable])
    return checked


def _of_added(name: str, overrides: Sequence[str], problems: Sequence[str]) -> list[str]:
    """Problems in which a key that was typed with a + is explained as the same key without it."""
    explained = list(problems)
    for override in (o for o in overrides if o.startswith("+") and not _group(o)):
        key = _parse(override).key_or_group
        others = tuple(o for o in overrides if o is not override and not o.startswith("+"))
        new = not exists(key, _tree(name, others) or {})
        for place, problem in enumerate(problems):
            if new and f"{key}.".startswith(f"{problem.partition(':')[0]}."):
                explained[place] = _problem(name, override.lstrip("+"), others)
    return list(dict.fromkeys(explained))


def _is_sweep(override: str) -> bool:
    return _parse(override).is_sweep_override()


def _jobs(cfg: Any, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's sweeper takes them apart."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    loader = GlobalHydra.instance().config_loader()  # which knows what glob(*) stands for
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *overrides])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [[o for o in job if not o.startswith("hydra.mode=")] for job in jobs]


def _which(places: Sequence[int], jobs: Sequence[Sequence[str]]) -> str:
    """The runs of a sweep that have a problem, where not all have."""
    if len(places) == len(jobs):
        return ""
    common = set.intersection(*map(set, jobs))
    differing = " ".join(o for o in jobs[places[0]] if o not in common)
    return f" (in {len(places)} of {len(jobs)} runs: {differing}{', ...' if len(places) > 1 else ''})"


# ---------------------------------------------------------------------------------------------------------------------
# What Hydra refuses, explained
# ---------------------------------------------------------------------------------------------------------------------


def _refusals() -> tuple[type[Exception], ...]:
    """What composing raises, in Hydra's and OmegaConf's words."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException, ValueError


def _explained(name: str, jobs: Sequence[Sequence[str]], error: Exception, check: Check | None) -> list[str]:
    """Every override that cannot be composed; where each alone can, the first line of what Hydra says."""
    problems: dict[str, None] = {}
    seen: set[str] = set()
    for job in jobs:
        if not set(job) <= seen:
            problems |= dict.fromkeys(_refused(name, job, check, seen))
            seen |= set(job)
    return list(problems) or [f"the command line cannot be composed: {str(error).strip().splitlines()[0]}"]


def _refused(
    name: str, overrides: Sequence[str], check: Check | None, before: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    """What is wrong with each override that the others leave impossible, and then with those that compose.

    Args:
        before: overrides that were looked at in another run.
    """
    problems, kept = [], []
    unusable: set[str] = set()  # groups whose code cannot be used, so that nothing is known of their keys
    groups = [o for o in overrides if _group(o)]
    for override in groups:
        if _tree(name, (*kept, override)) is not None:
            kept.append(override)
        elif override not in before:
            problems.append(_problem(name, override, kept))
            unusable |= {group for group, _, choice in [override.partition("=")] if is_code(group, choice)}
    if "method" in unusable:
        return problems
    chosen = tuple(kept)
    for override in (o for o in overrides if o not in groups and o.lstrip("+~").partition(".")[0] not in unusable):
        parsed, tree = _parse(override), _tree(name, chosen) or {}
        whole = not parsed.is_delete() and not parsed.is_add() and not isinstance(parsed.value(), dict)
        known = whole and exists(parsed.key_or_group, tree)  # faster than composing them one by one
        if known or _tree(name, (*chosen, override)) is not None:
            kept.append(override)
        elif override not in before:
            problems.append(_problem(name, override, chosen))
    if check is not None and problems and name != "evaluate":
        import hydra

        try:
            _checked(hydra.compose(name, overrides=kept, return_hydra_config=True), check)
        except ConfigError as error:
            problems += _of_added(name, kept, error.problems)
    return problems


@cache
def _tree(name: str, overrides: tuple[str, ...]) -> dict[str, Any] | None:
    """The plain values that overrides compose to; None where they do not."""
    import hydra
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(hydra.compose(name, overrides=list(overrides)))
    except _refusals():
        return None


@cache
def _parse(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def _is_group(override: str) -> bool:
    """Whether a file is chosen by an override, which may be one that cannot be parsed."""
    key = override.partition("=")[0].lstrip("+~")
    return "." not in key and bool(options(key))


def _group(override: str) -> str | None:
    """The group whose file an override chooses."""
    key = _parse(override).key_or_group
    return key if "." not in key and options(key) else None


def _problem(name: str, override: str, kept: Sequence[str]) -> str:
    """Why one override cannot be composed with those that are kept, and what to type in its place."""
    parsed = _parse(override)
    key, value = parsed.key_or_group, None if parsed.is_delete() else parsed.value()
    tree = _tree(name, tuple(kept)) or {}
    group = _group(override)
    if name == "evaluate" and key.startswith("decoder."):
        kinds = [f"decoder={value}"] if key == "decoder.kind" and value in options("decoder") else []
        kinds = kinds or _holders("decode", key, ()) or ["decoder=..."]
        return f"{key}: no decoder is chosen; type {listed(kinds)} as well"
    if group is not None and value in (None, "") and not parsed.is_delete():
        if group in ("experiment", "judge", "refine"):  # which are null where nothing is typed, and cannot be typed so
            return f"{group}: leave {override} out where none is meant, or choose one, as {group}={options(group)[0]}"
        return f"{group}: needs a choice, as {group}={options(group)[0]}"
    if group is not None and name != "evaluate":
        wrong = [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        wrong = [v for v in wrong if v not in options(group)]
        if wrong and group not in ("model", "measure", "alignment"):
            return f"{group}: {unknown_choice(group, wrong[0])}"
    known = exists(key, tree) or any(k.rpartition(".")[2] == key for k in leaves(tree))
    ours = group is None and (known or (key in ELSEWHERE and bool(nearest(key, tree))))
    others = [] if ours else [other for other in PROGRAMS if other != name and _reads(other, override)]
    readers = [_program(other, override) for other in others]
    if readers:
        return f"{key}: is read by {' and '.join(readers)}" + ("" if name == "train" else ", and not here")
    if parsed.is_add() and exists(key, tree):
        return f"{key}: is there already; leave out the + before it"
    if group is not None and parsed.is_add() and _tree(name, (*kept, override.lstrip("+"))) is not None:
        return f"{key}: is chosen already; leave out the + before it"
    if parsed.is_delete() and exists(key, tree):
        return f"{key}: cannot be left out while it has no value; leave ~{key} out"
    if parsed.is_delete():
        return f"{key}: there is nothing of that name to leave out{unknown_key(key, tree)}"
    if group is not None:
        near = [k + str(value) for k in ELSEWHERE.get(group, ())]
        return f"{group}: is no choice here{f'; did you mean {listed(near)}?' if near else ''}"
    if isinstance(value, Mapping) and exists(key, tree):
        inner = [f"{key}.{part}" for part in map(str, value)]
        wrong = [(k, v) for k, v in zip(inner, value.values(), strict=True) if not exists(k, tree)]
        if wrong:
            return f"{wrong[0][0]}: no such key{_meant(name, *wrong[0], tree, kept)}"
        return f"{key}: {override} cannot be taken over; set its keys one by one"
    return f"{key}: no such key{_meant(name, key, value, tree, kept)}"


def _program(name: str, override: str) -> str:
    """What is typed for a program that reads an override; of those that look at runs, for the one of its key."""
    if name != "evaluate":
        return f"`{command(name)}`"
    key, _, value = override.lstrip("+~").partition("=")
    own = {verb: value for verb, read in JOBS.items() if read == key}
    verbs = own or {verb: f"... {override}" for verb, read in JOBS.items() if key in keys_read(read)}
    return listed([f"`{command(verb, words)}`" for verb, words in (verbs or {"compare": "..."}).items()])


def _reads(name: str, override: str) -> bool:
    """Whether another program would take an override."""
    if _group(override):
        return _tree(name, (override,)) is not None
    return exists(_parse(override).key_or_group, _tree(name, ()))


def _meant(name: str, key: str, value: Any, tree: Mapping[str, Any], kept: Sequence[str]) -> str:
    """What an unknown key may be meant for."""
    parts = key.replace("/", ".").split(".")
    if parts[0] == "hydra":
        return f" of Hydra's; `{command('train', '--cfg hydra')}` shows them"
    if exists(dotted := ".".join(parts), tree):
        return f"; did you mean {dotted}={value}?"
    groups = {*tree, "experiment", "pair"}
    for part in parts:  # a group typed as a key
        if part in groups and options(part) and str(value) in options(part):
            return f"; did you mean {part}={value}?"
    if part := next((p for p in parts[1:] if p in groups and options(p)), None):
        return f"; did you mean {part}=? ({unknown_choice(part, str(value))})"
    for count in range(1, len(parts)):
        if exists(start := ".".join(parts[:count]), tree) and not exists(f"{start}.{parts[count]}", tree):
            node: Any = tree
            for part in parts[:count]:
                node = node[part]
            if node is None and parts[count - 1] in NULL_SECTIONS:
                return f"; {start} is null: write '{start}={{{parts[count]}: {value}}}'"
            if node is not None and not isinstance(node, Mapping):
                near = [k for k in nearest(key, tree) if k.rpartition(".")[2] == parts[-1]]
                return f"; {start} is one value{f'; did you mean {listed(near)}?' if near else ''}"
    if holders := _holders(name, key, kept):
        return f" of {_chosen(tree, parts[0], kept)}; it is of {listed(holders)}"
    alone = not nearest(key, tree) or (len(parts) > 1 and parts[0] not in tree)
    if alone and (others := _elsewhere(name, key, tree, kept)):
        return f"; did you mean {listed(others)}?"
    return unknown_key(renamed.new_key(key), tree, value)


def _holders(name: str, key: str, kept: Sequence[str]) -> list[str]:
    """The choices of the group that a key begins with that have the key."""
    group = key.partition(".")[0]
    section = key.partition(".")[2]
    if group not in ("method", "decoder", "refine", "loss", "dataset", "judge") or not section:
        return []
    others = [o for o in kept if _group(o) != group]
    trees = {choice: _tree(name, (*others, f"{group}={choice}")) for choice in options(group)}
    return [f"{group}={choice}" for choice, tree in trees.items() if tree is not None and exists(key, tree)]


def _elsewhere(name: str, key: str, tree: Mapping[str, Any], kept: Sequence[str]) -> list[str]:
    """Keys of other methods that end like this one, each with its method."""
    if name != "train" or any(k.endswith(f".{key}") for k in leaves(tree)):
        return []
    methods_of: dict[str, list[str]] = {}
    others = [o for o in kept if _group(o) != "method"]
    for choice in options("method"):
        for other in leaves(_tree(name, (*others, f"method={choice}")) or {}):
            if other.endswith(f".{key}"):
                methods_of.setdefault(other, []).append(f"method={choice}")
    return [f"{other} (of {listed(methods)})" for other, methods in methods_of.items()]


def _chosen(tree: Mapping[str, Any], group: str, kept: Sequence[str]) -> str:
    typed = [o for o in kept if _group(o) == group]
    if typed:
        return typed[-1].lstrip("+")
    node = tree.get(group)
    target = str((node or {}).get("_target_", "")).rpartition(".")[2] if isinstance(node, Mapping) else ""
    return f"{group}={target}" if target in options(group) else f"this {group}"
