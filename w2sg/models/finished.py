"""Models of finished runs: found by a run's report or a stage of the store, and not yet loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from w2sg.config import renamed
from w2sg.config.model_schema import OWN_CHAT, ModelConfig
from w2sg.errors import UserError
from w2sg.models.source import Source, find
from w2sg.store.files import read_json
from w2sg.store.soundness import KEY, MANIFEST, problem
from w2sg.store.weights import weights


@dataclass(frozen=True)
class Scoring:
    """What a model that labels gives.

    Attributes:
        pairs: one reward for each text of a pair, or else one logit for each class of a text.
        classes: C, 2 for pairs.
        layer: of the frozen states that its head reads; None where it reads tokens.
    """

    pairs: bool
    classes: int
    layer: int | None


@dataclass(frozen=True)
class FinishedModel:
    """A model of a finished run, found and not yet loaded: one that writes, or one that labels.

    Attributes:
        name: as the run's stages call it; "base" and "untuned" are models before any training.
        spec: configuration of the model that training started from.
        role: "weak" or "strong".
        folder: of the stage that trained it; None where nothing did.
        before: the model that it is compared with, None where it is that one itself.
        run: the folder of the run.
        command: what the run was started by.
        seed: of the run.
        scoring: what it gives where it labels; None where it writes.
    """

    name: str
    spec: ModelConfig
    role: str
    folder: Path | None
    before: FinishedModel | None
    run: Path
    command: str
    seed: int
    scoring: Scoring | None = None

    def origin(self) -> dict[str, Any]:
        """What `ORIGIN` holds."""
        base = None if self.before is None else {"name": self.before.name, "spec": self.before.spec.model_dump()}
        kind = "policy" if self.scoring is None else "reward" if self.scoring.pairs else "classes"
        return {
            "kind": kind,
            "max_length": self.spec.max_length,
            "system": self.name,
            "stage": None if self.folder is None else self.folder.name,
            "command": self.command,
            "seed": self.seed,
            "role": self.role,
            "before": base,
        }


def kind_of(place: Path, option: str) -> str:
    """What a folder is: a "run", a "stage" of a store or a saved "model".

    Raises:
        UserError: it is none of these, or not there.
    """
    if not place.is_dir():
        raise UserError(f"{option}: there is no folder {place}")
    for file, kind in (("report.json", "run"), (MANIFEST, "stage"), ("config.json", "model")):
        if (place / file).is_file():
            return kind
    if (place / ".hydra").is_dir():
        raise UserError(f"{option}: the run in {place} is not finished (no report.json); start its command again")
    raise UserError(f"{option}: {place} is no finished run (report.json), no stage of a store and no saved model")


def find_finished(place: Path, system: str | None, out: Path, root: Path, option: str = "export") -> FinishedModel:
    """Find a model of a run folder by its system, or the one of a stage's folder.

    Of a method that labels, its systems are found and, by their stages' names, whatever else it trained (``member0``).
    Of a method that writes, its systems are, and the reward models that judged or guided it, by their stages' names.

    Args:
        place: a finished run's folder, or a stage's folder of the store.
        system: which of the run's models; a stage's folder needs none.
        out: where runs lie, for a stage: a run's report says what it is.
        root: a store to look into where the run's own has been moved.
        option: the key that ``place`` was given as, for error messages; models that label are for ``export`` alone.

    Raises:
        UserError: it is not there; says what there is, or how to make it anew.
    """
    if kind_of(place, option) == "stage":
        name = _plain(place.name.rpartition("-")[0])
        if system is not None and _plain(system) != name:
            raise UserError(f"system: {place} is the stage of {name}, not of {system}; leave system out")
        run = _run_of(place, out, option)
        return _of_run(run, name, [place.parent], option)
    stores = [Path(report_of(place)["config"]["store"]), root, place.parent / "store"]
    return _of_run(place, system, stores, option)


def _of_run(run: Path, system: str | None, stores: list[Path], option: str) -> FinishedModel:
    content = report_of(run)
    config = content["config"]
    common = {"run": run, "command": content["command"], "seed": config["seed"]}
    systems = _systems(content)
    scorers = _scorers(content, stores) if option == "export" else {}
    if not systems and option != "export":
        raise UserError(
            f"{option}: the models of {run} score texts and do not write (method={content.get('method')}); this is for "
            "runs of methods that train language models, such as method=cong and method=refine"
        )
    weak, strong = (_spec(config[role], run) for role in ("weak", "strong"))
    aligned = weak.untuned is not None  # the weak model was found aligned, and so was the one before
    untuned = weak.model_copy(update={"name": weak.untuned, "revision": None}) if aligned else weak
    names = ["untuned", *map(_plain, systems)] if systems else ["base"] if strong.arch == "hf" else []
    if system == "student" and "text" in content:  # of a method that writes it has a name of its own
        system = content["text"]["student"]
    choices = list(dict.fromkeys([*names, *scorers] if systems else [*scorers, *names]))
    if system is None or _plain(system) not in choices:
        raise UserError(f"system: {_unknown(content, system, run)}: {', '.join(choices)}")
    name = _plain(system)
    if name in scorers and name not in names:
        return _scorer(content, name, scorers[name], stores, common)
    base = FinishedModel("base", strong, "strong", None, None, **common)
    before = FinishedModel("untuned", untuned, "weak", None, None, **common)
    if name in ("base", "untuned"):
        return base if name == "base" else before
    stage = _stage_named(content, name)
    folder = None if stage is None else _stage_folder(stage, stores, name, content["command"])
    start, role = (before, "weak") if name == "weak" else (base, "strong")
    spec = weak if role == "weak" else strong
    if folder is not None:
        spec = _as_it_was(spec, folder, role)
    return FinishedModel(name, spec, role, folder, start, **common)


def _unknown(content: dict[str, Any], system: str | None, run: Path) -> str:
    """Why a system is none that can be had, in words before the list of those that can."""
    if system is None:
        return "say which model of the run you mean"
    if _plain(system) == "zero-shot":
        return "zero_shot is the strong model as it was found, asked a question; export system=base"
    if system in content.get("metrics", {}):
        if "models" not in content:
            return (
                f"the report of {run} is of an earlier version, which did not note the stage of {system}; start the "
                f"run again, which computes nothing twice ({content['command']}); until then there are"
            )
        return f"{system} is not one trained model, and cannot be written; name one of them"
    return f"this run has no {system}"


def _stage_named(content: dict[str, Any], name: str) -> str | None:
    return next((s["key"] for s in content["stages"] if s["name"] == name), None)


def _systems(content: dict[str, Any]) -> list[str]:
    """The language models of a run, by what its report calls them; none where its models only score."""
    if "text" in content:
        return list(content["text"]["systems"])
    if "decoding" in content:  # nothing is trained but the small model, where it was not found aligned
        return ["weak", "base"]
    trained = list(content.get("refinement", {}).get("trained", ()))
    if trained and content["config"]["method"]["answers"] is None:
        return ["weak", *trained]
    return trained


def _plain(system: str) -> str:
    """A system's name as its stage has it."""
    return system.replace("_", "-")


def report_of(run: Path) -> dict[str, Any]:
    """What the report.json of a finished run holds, with the names that options have today.

    Raises:
        UserError: it is no report of a run.
    """
    try:
        content = read_json(run / "report.json")
        content["config"] = renamed.tree(content["config"], quiet=True)
        content["config"]["store"], content["stages"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{run / 'report.json'} is no report of a run ({error!r})") from error
    return content


def _spec(values: dict[str, Any], run: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate({**OWN_CHAT, **values})
    except ValidationError as error:
        what = error.errors()[0]
        raise UserError(
            f"{run / 'report.json'} was written by another version: {'.'.join(map(str, what['loc']))}: {what['msg']}"
        ) from error


def _run_of(stage: Path, out: Path, option: str) -> Path:
    """The newest finished run that used a stage."""
    places = [place for place in dict.fromkeys([stage.parent.parent, out]) if place.is_dir()]
    reports = {file.resolve(): None for place in places for file in place.rglob("report.json")}
    for file in sorted(reports, key=lambda file: -file.stat().st_mtime):
        if any(s["key"] == stage.name for s in report_of(file.parent)["stages"]):
            return file.parent
    raise UserError(
        f"{option}: no finished run below {' or '.join(map(str, places))} names the stage {stage.name}, so nothing "
        "says which tokenizer and base it has; give the folder of its run, or that of the runs as out="
    )


def _stage_folder(stage: str, stores: list[Path], name: str, command: str) -> Path:
    again = f"start the run again, which makes what is missing and nothing else: {command}"
    looked = list(dict.fromkeys(stores))
    folder = next((store / stage for store in looked if (store / stage).is_dir()), None)
    if folder is None:
        raise UserError(
            f"system: the stage of {name}, {stage}, is not in {' or '.join(map(str, looked))}: it was pruned, or the "
            f"store was moved. Say where the store is with root=, or {again}"
        )
    if wrong := problem(folder):
        raise UserError(f"system: the stage of {name}, {folder}, is damaged ({wrong}); {again}")
    weights(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Models that label
# ---------------------------------------------------------------------------------------------------------------------


def _scorers(content: dict[str, Any], stores: list[Path]) -> dict[str, str]:
    """Models that label, by what they may be called here -> the stage that trained them."""
    found = {_plain(n): m["stage"] for n, m in content.get("models", {}).items() if m["stage"] is not None}
    if "models" not in content and content.get("method") == "finetune":  # an earlier report: systems are their stages
        found = {n: key for n in content.get("metrics", {}) if (key := _stage_named(content, n)) is not None}
    for record in content["stages"]:
        folder = next((store / record["key"] for store in stores if (store / record["key"] / KEY).is_file()), None)
        if folder is not None and {"labels", "objective"} <= read_json(folder / KEY).keys():
            found.setdefault(_plain(record["name"]), record["key"])
    return found


def _scorer(
    content: dict[str, Any], name: str, stage: str, stores: list[Path], common: dict[str, Any]
) -> FinishedModel:
    """A model that was trained on labels, with the settings that its stage was made with."""
    folder = _stage_folder(stage, stores, name, content["command"])
    key = read_json(folder / KEY)
    run, learned = common["run"], key["model"]
    noted = next((m for m in content.get("models", {}).values() if m["stage"] == stage), None)
    if noted is not None:
        spec, role = _spec(noted["model"], run), noted["role"]
    else:
        role = _role_of(content, learned, name)
        spec = _spec(content["config"][role], run)
    same = ("train", "max_length", "dtype", "layers", "dropout", "random_init", "head", "quantise", "load")
    changes = {key: learned[key] for key in same if key in learned}
    spec = spec.model_copy(update={"quantise": None, "load": None, "head": "linear", "layer": None, **changes})
    spec = spec.model_copy(update={"device_map": None, "max_memory": None, "tp_plan": None})  # of that run's machine
    if "hub" in learned:
        spec = spec.model_copy(update={"name": learned["hub"], "revision": learned["revision"]})
    if spec.train == "lora" and spec.random_init:
        raise UserError(f"{role}.random_init: adapters on a base drawn at random say nothing without it; use tune=full")
    known = {k: learned[k] for k in ("files", "gguf") if k in learned}
    if known and spec.train != "full":
        here = source_of(spec, role).identity
        if known != {k: v for k, v in here.items() if k in known}:
            raise UserError(
                f"{role}.name: {spec.name} is not the model any more that {folder.name} was trained on; put that one "
                "back"
            )
    if "label_tokens" in key:  # a language model, which answers with a label
        before = FinishedModel("base", spec, role, None, None, **common)
        return FinishedModel(name, spec, role, folder, before, **common)
    scoring = Scoring(key["data"]["kind"] == "pairs", key["data"]["classes"], learned.get("layer"))
    return FinishedModel(name, spec, role, folder, None, **common, scoring=scoring)


def _role_of(content: dict[str, Any], learned: dict[str, Any], name: str) -> str:
    """Whose model a stage trained that no system of the run has: a judge's, or a member's of a committee."""
    config = content["config"]
    if "buckets" in learned:
        return next(role for role in ("weak", "strong") if config[role]["arch"] == "bow")
    judge = config["method"].get(name) if isinstance(config["method"], dict) else None
    if isinstance(judge, dict) and judge.get("model") in ("weak", "strong"):
        return judge["model"]
    specs = {role: config[role] for role in ("strong", "weak") if config[role]["arch"] != "bow"}
    for role, values in specs.items():
        identity = source_of(ModelConfig.model_validate({**OWN_CHAT, **values}), role).identity
        if all(learned.get(k) == v for k, v in identity.items()):
            return role
    raise UserError(
        f"system: {name} was trained from a model that is neither weak nor strong as they are now; put that one back"
    )


def _starts(folder: Path) -> Iterator[dict[str, Any]]:
    """The keys of a stage and of those that it started from, as far as they are still there."""
    while (folder / KEY).is_file():
        key = read_json(folder / KEY)
        yield key
        if "stage" not in key.get("start", {}):
            return
        folder = folder.parent / key["start"]["stage"]


def _as_it_was(spec: ModelConfig, folder: Path, role: str) -> ModelConfig:
    """The base's configuration, with the hub's commit that training started from where that is known.

    Raises:
        UserError: the base is no longer the one that the adapters were trained on.
    """
    keys = list(_starts(folder))
    begun = keys[-1].get("start", {})
    if spec.train == "lora" and spec.random_init:
        raise UserError(f"{role}.random_init: adapters on a base drawn at random say nothing without it; use tune=full")
    if begun.get("hub"):
        return spec.model_copy(update={"revision": begun["revision"]})
    known = {k: begun[k] for k in ("files", "gguf") if k in begun}
    if (
        known
        and spec.train == "lora"
        and known != {k: v for k, v in source_of(spec, role).identity.items() if k in known}
    ):
        raise UserError(
            f"{role}.name: {spec.name} is not the model any more that {folder.name} has adapters for; put that one back"
        )
    return spec


def check_whole(trained: FinishedModel) -> None:
    """Refuse to make one model of weights in few bits and what was trained on them.

    Raises:
        UserError: it was trained so.
    """
    if (load := trained.spec.load) is not None and trained.folder is not None:
        adapters = "; adapter=true writes its adapters alone" if trained.spec.train == "lora" else ""
        raise UserError(
            f"{trained.name}: it was trained on {trained.spec.name} in {load} ({trained.role}.load), of which no whole "
            f"model is made without a loss{adapters}"
        )


def source_of(spec: ModelConfig, role: str) -> Source:
    try:
        return find(spec, role)
    except UserError as error:
        raise UserError(
            f"the model that the training started from is needed, at least its tokenizer: {error}"
        ) from error
