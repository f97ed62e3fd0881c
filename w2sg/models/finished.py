"""Language models of finished runs: found by a run's report or a stage of the store, and not yet loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from w2sg.config import renamed
from w2sg.config.schema import OWN_CHAT, ModelConfig
from w2sg.errors import UserError
from w2sg.models.source import Source, find
from w2sg.store.files import read_json
from w2sg.store.soundness import KEY, MANIFEST, problem


@dataclass(frozen=True)
class FinishedModel:
    """A language model of a finished run, found and not yet loaded.

    Attributes:
        name: as the run's stages call it; "base" and "untuned" are models before any training.
        spec: configuration of the model that training started from.
        role: "weak" or "strong".
        folder: of the stage that trained it; None where nothing did.
        before: the model that it is compared with, None where it is that one itself.
        run: the folder of the run.
        command: what the run was started by.
        seed: of the run.
    """

    name: str
    spec: ModelConfig
    role: str
    folder: Path | None
    before: FinishedModel | None
    run: Path
    command: str
    seed: int

    def origin(self) -> dict[str, Any]:
        """What `ORIGIN` holds."""
        base = None if self.before is None else {"name": self.before.name, "spec": self.before.spec.model_dump()}
        return {
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

    Args:
        place: a finished run's folder, or a stage's folder of the store.
        system: which of the run's models; a stage's folder needs none.
        out: where runs lie, for a stage: a run's report says what it is.
        root: a store to look into where the run's own has been moved.
        option: the key that ``place`` was given as, for error messages.

    Raises:
        UserError: it is not there; says what there is, or how to make it anew.
    """
    if kind_of(place, option) == "stage":
        name = place.name.rpartition("-")[0]
        if system is not None and _plain(system) != name:
            raise UserError(f"system: {place} is the stage of {name}, not of {system}; leave system out")
        run = _run_of(place, out, option)
        return _of_run(run, name, [place.parent], option)
    stores = [Path(_report(place)["config"]["store"]), root, place.parent / "store"]
    return _of_run(place, system, stores, option)


def _of_run(run: Path, system: str | None, stores: list[Path], option: str) -> FinishedModel:
    content = _report(run)
    systems = _systems(content)
    if not systems:
        raise UserError(
            f"{option}: the models of {run} score texts and do not write (method={content.get('method')}); this is for "
            "runs of methods that train language models, such as method=cong and method=refine"
        )
    config = content["config"]
    weak, strong = (_spec(config[role], run) for role in ("weak", "strong"))
    aligned = weak.untuned is not None  # the weak model was found aligned, and so was the one before
    untuned = weak.model_copy(update={"name": weak.untuned, "revision": None}) if aligned else weak
    names = ["untuned", *map(_plain, systems)]
    if system is None or _plain(system) not in names:
        problem = "say which model of the run you mean" if system is None else f"this run has no {system}"
        raise UserError(f"system: {problem}: {', '.join(names)}")
    name = _plain(system)
    common = {"run": run, "command": content["command"], "seed": config["seed"]}
    base = FinishedModel("base", strong, "strong", None, None, **common)
    before = FinishedModel("untuned", untuned, "weak", None, None, **common)
    if name in ("base", "untuned"):
        return base if name == "base" else before
    stage = next((s["key"] for s in content["stages"] if s["name"] == name), None)
    folder = None if stage is None else _stage_folder(stage, stores, name, content["command"])
    start, role = (before, "weak") if name == "weak" else (base, "strong")
    spec = weak if role == "weak" else strong
    if folder is not None:
        spec = _as_it_was(spec, folder, role)
    return FinishedModel(name, spec, role, folder, start, **common)


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


def _report(run: Path) -> dict[str, Any]:
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
        if any(s["key"] == stage.name for s in _report(file.parent)["stages"]):
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
    return folder


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


def source_of(spec: ModelConfig, role: str) -> Source:
    try:
        return find(spec, role)
    except UserError as error:
        raise UserError(
            f"the model that the training started from is needed, at least its tokenizer: {error}"
        ) from error
