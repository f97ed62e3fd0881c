"""The check of a configuration before any work.

`check` reports every problem of a configuration at once, before anything is downloaded or trained; `w2sg.config.schema`
says what may stand where.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from w2sg.config import plugins
from w2sg.config.data_schema import DATASET_KEYS, DatasetConfig
from w2sg.config.evaluate_schema import EvaluateConfig
from w2sg.config.machine import (
    attention_problems,
    device_problems,
    load_problems,
    optimizer_problems,
    place_problems,
)
from w2sg.config.option import MISSING, Options, defaults_of, hint_of, options_class
from w2sg.config.programs import command
from w2sg.config.schema import TrainConfig
from w2sg.config.server_schema import server_problems
from w2sg.config.suggest import similar, unknown_key
from w2sg.errors import ConfigError, UserError
from w2sg.printable import printable

# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------

MISSING_HINTS = {
    "name": " (a hub id, a folder or a .gguf file)",
    "path": " (a hub id, a folder or a .jsonl, .json, .csv or .parquet file)",
}


def check(cfg: Any, choices: Mapping[str, str] | None = None) -> TrainConfig:
    """Validate a composed configuration and report everything that is wrong with it at once.

    Args:
        cfg: what Hydra composed (a DictConfig), or the same as plain dictionaries.
        choices: the file chosen in each group, where Hydra chose.

    Raises:
        ConfigError: one line per problem, each with its key and what to do.
    """
    config, container, problems = _validate(TrainConfig, cfg)
    pair, models = (choices or {}).get("pair", "none"), [(choices or {}).get(role) for role in ("weak", "strong")]
    if pair not in ("none", "_".join(map(str, models))):
        problems.append(
            f"pair: {pair} is contradicted by weak={models[0]} strong={models[1]}; choose another pair=, or pair=none "
            "with both models"
        )
    if (name := _misnamed(container, (choices or {}).get("dataset"))) is not None:
        problems.append(
            f"dataset.name: it only names the rows, which are those of dataset={choices['dataset']}; for those of "
            f"{name} choose dataset={name}, and in a file of yours that builds on it set name: {choices['dataset']}"
        )
    problems += plugins.clashes(choices or {})
    method = container.get("method")
    if isinstance(method, dict) and method.get("_target_") == DECODE and container.get("decoder") is None:
        raise ConfigError([f"method: a decoder is measured by `{command('decode')}`; choose another method"])
    if (choices or {}).get("judge") is not None and isinstance(method, dict) and _has_another_judge(method):
        problems.append(
            f"judge: {method.get('_target_')} has an option judge of its own and does not read judge="
            f"{choices['judge']}; leave that out, or set method.judge"
        )
    for key in ("method", "loss", "dataset"):
        if isinstance(node := container.get(key), dict):
            problems += target_problems(key, node, container)
    problems += _cross_problems(container)
    if config is not None:
        problems += server_problems(config.server, config.method)
    if config is not None and not problems:  # what the method itself has to say, where its options are in order
        module = importlib.import_module(pkgutil.resolve_name(config.method["_target_"]).__module__)
        problems += getattr(module, "problems", lambda _: [])(config)
    if problems:
        raise ConfigError(problems)
    return config


def _has_another_judge(method: Mapping[str, Any]) -> bool:
    """Whether a method's option ``judge`` is something else than what the group of judges chooses."""
    if isinstance(judge := method.get("judge", {}), dict):
        return bool(judge) and judge.keys().isdisjoint(("kind", "_target_"))
    try:  # a plain value was typed: by its default it is another option, or a judge that is wrongly given
        default = defaults_of(pkgutil.resolve_name(method["_target_"])).get("judge", MISSING)
    except (ImportError, AttributeError, ValueError, KeyError):
        return False
    return default != MISSING and not isinstance(default, dict)


def _misnamed(container: dict[str, Any], chosen: str | None) -> str | None:
    """The file of conf/dataset whose name was typed for the rows of another one."""
    dataset = container.get("dataset")
    name = dataset.get("name") if isinstance(dataset, dict) else None
    if chosen in (None, "local", "questions", name) or not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        return None  # a file may be a copy of one of the others
    return name if name in plugins.files("dataset") else None


def check_evaluate(cfg: Any) -> EvaluateConfig:
    """The same for what looks at runs."""
    config, _, problems = _validate(EvaluateConfig, cfg)
    if problems:
        raise ConfigError(problems)
    return config


def check_options(kind: type[Options], options: Mapping[str, Any]) -> Any:
    """The same for one class of options, from Python."""
    known = {field.alias or name: name for name, field in kind.model_fields.items()}
    wrong = [name for name in options if name not in known and name not in known.values()]
    problems = [f"{name}: no such option{_meant(name, known)}" for name in wrong]
    checked, _, more = _validate(kind, {name: value for name, value in options.items() if name not in wrong})
    if problems := problems + more:
        raise ConfigError(problems)
    return checked


def _meant(name: str, known: Iterable[str]) -> str:
    near = similar(name, list(known))
    return f"; did you mean {near[0]}?" if near else f"; the options: {', '.join(known)}"


def _validate(schema: type[Options], cfg: Any) -> tuple[Any, dict[str, Any], list[str]]:
    """The typed configuration (None where it is wrong), its plain values, and what is wrong, one line per key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = OmegaConf.create(cfg)
    try:
        missing = OmegaConf.missing_keys(cfg)
        container = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{getattr(error, 'full_key', None) or '?'}: {str(error).splitlines()[0]}"]) from error
    problems = [f"{key}: needs a value{MISSING_HINTS.get(key.rpartition('.')[2], '')}" for key in sorted(missing)]
    try:
        return schema.model_validate(container), container, problems
    except ValidationError as error:
        errors_of: dict[str, list[dict[str, Any]]] = {}
        for e in error.errors():
            errors_of.setdefault(_key(e, container), []).append(e)
        for key, errors in errors_of.items():
            if key not in missing:
                problems += _explain(key, errors, container, _section(schema, key))
    return None, container, problems


def _key(error: dict[str, Any], container: Any) -> str:
    """The dotted key of an error; its ``loc`` also names the members of unions, which no user typed."""
    parts, node = [], container
    for part in error["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            parts.append(str(part))
            node = node[part]
        elif error["type"] == "missing":
            parts.append(str(part))
    return ".".join(parts)


def _section(annotation: Any, key: str) -> list[str]:
    """The keys of the section that a dotted key names; none where it is no section."""
    for part in filter(None, key.split(".")):
        fields = {field.alias or name: field.annotation for name, field in _fields(annotation).items()}
        annotation = fields.get(part)
    return list(_fields(annotation))


def _fields(annotation: Any) -> dict[str, Any]:
    """The fields of a section; of several kinds of one, those of all."""
    if inspect.isclass(annotation) and issubclass(annotation, Options):
        return {field.alias or name: field for name, field in annotation.model_fields.items()}
    fields: dict[str, Any] = {}
    for part in getattr(annotation, "__args__", ()):
        fields |= _fields(part)
    return fields


def _explain(key: str, errors: list[dict[str, Any]], tree: dict[str, Any], section: Sequence[str] = ()) -> list[str]:
    """Lines for one key; it has several errors where several types would do.

    Args:
        tree: the configuration, among whose keys an unknown one may have its namesake.
        section: the keys that stand below this one.
    """
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "extra_forbidden":
        return [f"{key}: no such key here{unknown_key(key, _without(tree, key.split('.')))}"]
    if section and not isinstance(value, dict):
        typed = f"{key}={value}" if isinstance(value, str) else f"{key}=..."
        names = ", ".join(section)
        return [f"{key}: a section with the keys {names}; set one of them in place of {typed}"]
    if kind == "missing":
        return [f"{key}: needs a value"]
    if kind == "value_error":  # our own rules name the key below this one themselves
        rules = errors[0]["msg"].removeprefix("Value error, ").split("\n")
        return [f"{key}.{rule}".removeprefix(".") for rule in rules]
    if kind == "string_type" and isinstance(value, int | float):
        return [f"{key}: {value} is not text; where it is meant to be, quote it twice: '{key}=\"{value}\"'"]
    hint = "; nothing is written null" if value == "None" else ""
    if isinstance(value, list) and any(e["type"] in NUMBERS for e in errors):
        hint = f"; to run each of several values: -m {key}={','.join(map(str, value))}"
    return [f"{key}: {_messages(errors)} (got {value!r}){hint}"]


NUMBERS = ("float_type", "int_type", "greater_than")


def _without(tree: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """A configuration without one of its keys, which is no model for itself."""
    if len(parts) == 1:
        return {k: v for k, v in tree.items() if k != parts[0]}
    inside = tree.get(parts[0])
    return {**tree, parts[0]: _without(inside, parts[1:])} if isinstance(inside, dict) else tree


def _messages(errors: list[dict[str, Any]]) -> str:
    return " or ".join(message[0].lower() + message[1:] for message in (e["msg"] for e in errors))


CALLED_WITH = {"method": 1, "judge": 1, "loss": 3, "dataset": 0}  # the run; logits, weak logits and progress
DECODE = "w2sg.methods.decode.decode"
OWN_GROUPS = {"refine", "decoder"}  # options of methods that are typed as groups of their own
HYDRA_KEYS = {"_target_", "_partial_", "_convert_"}


def target_problems(key: str, node: dict[str, Any], tree: Mapping[str, Any] | None = None) -> list[str]:
    """What keeps a ``_target_`` node from being called: a wrong path, or options that the function does not take."""
    target = node.get("_target_")
    if not isinstance(target, str):
        return [f"{key}._target_: needs the dotted path of a function; choose {key}=<one of conf/{key}>"]
    try:
        function = plugins.resolve(target)
    except UserError as error:
        return [f"{key}._target_: {error}"]
    if not callable(function):
        return [f"{key}._target_: {target} is not callable; name a function"]
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C
        return []
    given = {k: v for k, v in node.items() if k not in HYDRA_KEYS}
    if key == "dataset":
        given = {k: v for k, v in given.items() if k not in DATASET_KEYS}
    supplied = [object()] * CALLED_WITH[key]
    try:
        first = set(signature.bind_partial(*supplied).arguments)
    except TypeError as error:
        return [f"{key}._target_: {target} cannot serve as a {key} ({error}); see those in conf/{key}"]
    if options_class(function) is not None and "options" not in first:
        return _type_problems(key, {"": options_class(function)}, {"": given}, tree or {})
    options = {name: p for name, p in signature.parameters.items() if name not in first and p.kind is not p.VAR_KEYWORD}
    takes = ", ".join(options) or "no options"
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        unread = sorted(given.keys() - options.keys())
        problems += [f"{key}.{k}: {target} takes {takes}; leave it out" for k in unread if k != "judge"]
        if "judge" in unread:  # a group that is typed as judge=
            problems.append(f"judge: {target} judges nothing; leave it out, or use method=cong or refine")
    for name, parameter in options.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if required and name not in given:
            problems.append(f"{key}.{name}: {target} needs a value; give it with +{key}.{name}=")
    in_schema = _fields(DatasetConfig).keys() | {"columns"} if key == "dataset" else set()
    if never := sorted(DATASET_KEYS & options.keys() if key == "dataset" else ()):
        problems.append(f"{key}._target_: {target} has a parameter {never[0]}, which w2sg keeps for itself; rename it")
    types = {name: hint_of(function, name) for name in given if name in options and name not in in_schema}
    return problems + _type_problems(key, types, given, tree or {})


def _type_problems(
    key: str, types: Mapping[str, Any], options: Mapping[str, Any], others: Mapping[str, Any]
) -> list[str]:
    """Options that are not of their types; where there is none, nothing is known.

    Args:
        key: of the node that has the options.
        types: name -> type; a class of all options has the name "".
        options: name -> value.
        others: the whole configuration.
    """
    problems = []
    for name, kind in types.items():
        value = options[name]
        try:
            TypeAdapter(kind).validate_python(value, strict=not isinstance(value, list | dict))
        except ValidationError as error:
            errors_of: dict[str, list[dict[str, Any]]] = {}
            for e in (e for e in error.errors() if e["input"] != MISSING):  # said already, as what needs a value
                errors_of.setdefault(".".join(filter(None, (name, _key(e, value)))), []).append(e)
            for path, errors in errors_of.items():
                section = _section(kind, path.removeprefix(name).removeprefix("."))
                full, others = f"{key}.{path}".rstrip("."), {**others, key: value if not name else options}
                if _is_read(path.partition(".")[0], options.get("", options), others):  # typed without the method's key
                    full, others = path, _without(others, full.split("."))
                problems += _explain(full, errors, others, section)
        except PydanticUserError:  # an annotation that it does not know
            continue
    return problems


def _is_read(group: str, options: Any, container: Mapping[str, Any]) -> bool:
    """Whether a method's option is what was chosen in the group of its name, and no option of its own."""
    chosen = container.get(group) if group in OWN_GROUPS else None
    return chosen is not None and isinstance(options, Mapping) and options.get(group) == chosen


def _cross_problems(container: dict[str, Any]) -> list[str]:
    """Rules that span several sections, each looked at where the sections that it reads are in order."""
    problems = _path_problems(container)
    sections: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        name = field.alias or name
        if name in container and inspect.isclass(field.annotation) and issubclass(field.annotation, Options):
            with contextlib.suppress(ValidationError):
                sections[name] = field.annotation.model_validate(container[name])
    training, dataset = sections.get("optim"), sections.get("dataset")
    method = container.get("method")
    if container.get("decoder") is not None and not _is_read("decoder", method, container):
        problems.append(f"decoder: read by `{command('decode')}` alone; leave it out")
    if container.get("refine") is not None and not _is_read("refine", method, container):
        problems.append("refine: read by method=refine alone; add that, or leave refine out")
    hard = dataset is not None and dataset.noise.kind == "hard_flip" and dataset.noise.rate > 0
    if hard and training and training.hard_label_clamp is None and training.label_smoothing == 0:
        problems += _hard_label_problems(container.get("loss"))
    strong = sections.get("strong")
    if training and strong and training.select_on == "gold" and getattr(training, strong.train).validation == 0:
        problems.append(
            "optim.select_on: there is nothing to select by while no rows are held out; set "
            f"optim.{strong.train}.validation_fraction above 0, or select_on=weak"
        )
    if "trainer" in sections:
        trainer, plan = sections["trainer"], sections.get("plan")
        elsewhere = plan is not None and plan.only  # what a plan is for need not be on this machine
        if elsewhere and plan.gpu is not None:
            trainer = trainer.model_copy(update={"accelerator": "gpu"})
        problems += [] if elsewhere else device_problems(trainer)
        roles = {role: sections[role] for role in ("weak", "strong") if role in sections}
        trains = isinstance(method, dict) and "decoder" not in method  # decoders leave models as they are
        for role, model in roles.items():
            problems += [] if elsewhere else attention_problems(role, model, trainer)
            problems += load_problems(role, model, trainer)
            problems += place_problems(role, model, trainer, trains and model.train != "head")
        cut = {m.train for m in roles.values() if m.arch == "hf" and m.train != "head"}
        for mode in sorted({m.train for m in roles.values()}) if training else ():
            name = getattr(training, mode).optimizer
            problems += optimizer_problems(f"optim.{mode}", name, trainer, mode in cut)
    return problems


def _hard_label_problems(loss: Any) -> list[str]:
    """What a loss that is marked `w2sg.losses.needs_soft_labels` says to hard labels."""
    from w2sg.losses import takes_hard_labels

    target = loss.get("_target_") if isinstance(loss, dict) else None
    try:
        taken = not isinstance(target, str) or takes_hard_labels(plugins.resolve(target))
    except UserError:  # as `target_problems` says
        return []
    if taken:
        return []
    return [
        f"optim.hard_label_clamp: {target} is infinite on hard labels (dataset.noise.kind=hard_flip); set it (0.001 "
        "is the paper's gamma)"
    ]


def _path_problems(container: dict[str, Any]) -> list[str]:
    """Folders whose weights no library would open: safetensors, pyarrow and tokenizers take UTF-8 alone."""
    places = {"out": container.get("out"), "store": container.get("store")}
    for role in ("weak", "strong"):
        node = container.get(role)
        places[f"{role}.name"] = node.get("name") if isinstance(node, dict) else None
    problems = []
    for key, value in places.items():
        try:
            if isinstance(value, str):
                os.fsencode(value).decode()
        except UnicodeDecodeError:
            problems.append(f"{key}: {printable(value)} has bytes in it that are no UTF-8; rename it")
        except UnicodeEncodeError:  # an ASCII locale, into which the name came from elsewhere
            continue
    return problems
