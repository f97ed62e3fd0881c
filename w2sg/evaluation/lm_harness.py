"""EleutherAI's lm-evaluation-harness on a trained model: its tasks, what it is asked, and its answers as rows.

Alignment may damage what a model could do before; downstream tasks show it. The harness is an extra of its own, so
nothing of it is imported before it is asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from w2sg import progress
from w2sg.config.model_schema import OWN_CHAT, ModelConfig
from w2sg.errors import UserError
from w2sg.models.export import ORIGIN, load_merged
from w2sg.models.finished import FinishedModel, find_finished, kind_of
from w2sg.models.unreadable import quiet_loading
from w2sg.store.files import read_json, write_json

RESULT = "harness.json"


@dataclass(frozen=True)
class Options:
    """What is asked of the harness; see conf/evaluate.yaml.

    Attributes:
        tasks: names of tasks, groups or tags.
        limit: examples per task; None for all.
        fewshot: examples before each question; None for the task's own number.
        batch_size: requests at a time.
        chat: ask through the chat template.
        include: a folder of task files.
    """

    tasks: Sequence[str]
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int | Literal["auto"] = 8
    chat: bool = False
    include: Path | None = None


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        name: in the table.
        model: what says where it is: a model of a run, or a saved model's folder.
        before: the same before its training; None where nothing says.
        folder: where its results go.
    """

    name: str
    model: FinishedModel | Path
    before: FinishedModel | None
    folder: Path


def writable(folder: Path) -> None:
    """Try a folder before hours are spent on what is to be written there.

    Raises:
        UserError: it cannot be made, or nothing can be written in it.
    """
    probe = folder / f".{RESULT}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"to: {folder} cannot be written ({error.strerror or error}); name another folder") from error


def find_subject(place: Path, system: str | None, out: Path, root: Path) -> Subject:
    """What a folder holds that can be evaluated.

    Raises:
        UserError: as `find_finished`.
    """
    if kind_of(place, "harness") != "model":
        trained = find_finished(place, system, out, root, "harness")
        return Subject(trained.name, trained, trained.before, trained.run)
    if system is not None:
        raise UserError(f"system: {place} is one saved model; only a run has several to choose from")
    before = None
    if (place / ORIGIN).is_file():
        origin = read_json(place / ORIGIN)
        with contextlib.suppress(KeyError, TypeError, ValidationError):  # of another version: then nothing says
            spec = ModelConfig.model_validate({**OWN_CHAT, **origin["before"]["spec"]})
            name, role, seed = origin["before"]["name"], origin["role"], origin["seed"]
            before = FinishedModel(name, spec, role, None, None, place, origin["command"], seed)
    return Subject(place.resolve().name, place, before, place)


def _without_script(path: list[str], ours: Path) -> list[str]:
    """Where modules are looked for, without a clone's folder, in which evaluate.py is.

    A wheel's folder has no such script, and the harness itself.
    """
    script = (ours / "evaluate.py").is_file()
    return [entry for entry in path if not (script and Path(entry or ".").resolve() == ours)]


@contextlib.contextmanager
def harness_imported() -> Iterator[None]:
    """Let the harness find the package ``evaluate``, which has the name of our script, and keep its log short."""
    ours = Path(__file__).resolve().parents[2]
    path, known = list(sys.path), sys.modules.get("evaluate")
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve().parent == ours:
        del sys.modules["evaluate"]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        sys.path[:] = _without_script(path, ours)
        try:
            import evaluate  # noqa: F401 (kept in sys.modules for the harness)

            sys.path[:] = path
            for part in ("lm_eval", "lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models.huggingface"):
                importlib.import_module(part)
        except ImportError as error:
            raise UserError(f"harness: lm-eval is not wholly installed ({error}); pip install lm-eval") from error
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with _counted():
            yield
    finally:
        sys.path[:] = path
        if known is not None:
            sys.modules["evaluate"] = known
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Let the harness's own bars tell `w2sg.progress` what they count, and leave out its question to git.

    It asks for the commit of the folder that the user is in, and git complains where that is no clone.
    """
    evaluator = sys.modules["lm_eval.evaluator"]
    asks, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    modules = [sys.modules[f"lm_eval.{name}"] for name in ("models.huggingface", "api.model", "api.task")]
    bars = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = _Counted
        yield
    finally:
        evaluator.get_git_commit_hash = asks
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


class _Counted:
    """What the harness calls a tqdm."""

    def __init__(self, iterable: Iterable[Any] = (), total: int | None = None, disable: bool = False, **options: Any):
        self.iterable, self.done, self.disabled = iterable, 0, disable
        if not disable:
            words = str(options.get("desc") or "asking").removeprefix("Running ").removesuffix(" requests")
            progress.count(words, len(iterable) if total is None and isinstance(iterable, Sized) else total, "requests")

    def __iter__(self) -> Iterator[Any]:
        for one in self.iterable:
            yield one
            self.update()

    def update(self, more: int = 1) -> None:
        self.done += more
        if not self.disabled:
            progress.at(self.done)

    def close(self) -> None:
        """The next bar begins where it is made."""


def task_manager(options: Options) -> Any:
    """What knows the tasks that were asked for: those of ``include``, and the harness's own.

    Raises:
        UserError: one is not among them.
    """
    from lm_eval.tasks import TaskManager

    if options.include is not None:  # reading the harness's thousands of files takes many seconds
        manager = TaskManager(include_path=str(options.include), include_defaults=False)
        if set(options.tasks) <= set(manager.all_subtasks):  # a group may hold some of the harness's own
            return manager
    manager = TaskManager(include_path=None if options.include is None else str(options.include))
    for name in options.tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 5, 0.6)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"tasks: the harness has no task '{name}'{hint}. Tasks of your own: include=FOLDER")
    return manager


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """Fresh tasks and groups with their data; each can be evaluated once.

    Raises:
        UserError: the data of one is not to be had, or it needs packages that are not there.
    """
    loaded_tasks: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise UserError(f"tasks: {name} needs more packages ({error}); the harness has extras for them") from error
        except Exception as error:  # hub, cache, loading script and task file each raise something else
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"tasks: {name} cannot be loaded ({type(error).__name__}: {reason}). The data of the harness's own "
                "tasks comes from the Hugging Face hub: without a network, fill a cache where there is one and name it "
                "with HF_HOME=FOLDER, or give task files with local data as include=FOLDER"
            ) from error
        groups = loaded.get("groups", {})
        inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        loaded_tasks += [group for group in groups.values() if group.name == name]
        loaded_tasks += [task for task in loaded["tasks"].values() if task.task_name not in inside]
    return loaded_tasks


def evaluate_tasks(model: FinishedModel | Path, manager: Any, options: Options) -> dict[str, Any]:
    """What the harness finds out about one model, as `lm_eval.simple_evaluate` returns it.

    Raises:
        UserError: the model is not to be had, or a task cannot be asked of it.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    language_model, tokenizer = load_saved(model) if isinstance(model, Path) else load_merged(model)
    if options.chat and tokenizer.chat_template is None:
        raise UserError("chat: this model's tokenizer has no chat template; leave chat=true out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = HFLM(
        pretrained=language_model.to(device), tokenizer=tokenizer, batch_size=options.batch_size, truncation=True
    )
    try:
        return lm_eval.simple_evaluate(
            model=subject,
            tasks=load_tasks(manager, options.tasks),
            task_manager=manager,
            num_fewshot=options.fewshot,
            batch_size=options.batch_size,
            limit=options.limit,
            apply_chat_template=options.chat,
        )
    except (ValueError, AssertionError) as error:  # tasks that run code, need pictures or longer texts than it reads
        raise UserError(f"tasks: the harness cannot run them: {str(error).strip().splitlines()[0]}") from error


def load_saved(folder: Path) -> tuple[nn.Module, Any]:
    """A saved language model and its tokenizer.

    Raises:
        UserError: it cannot be read, or has weights missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"harness: {folder} cannot be read ({str(error).strip().splitlines()[0]})") from error
    if loaded["missing_keys"]:
        raise UserError(f"harness: {folder} has no weights for {sorted(loaded['missing_keys'])[0]}: no language model")
    return model.eval(), tokenizer


def result_rows(system: str, results: dict[str, Any], options: Options) -> list[dict[str, Any]]:
    """One row per task, metric and filter of what the harness returned.

    Returns:
        Each with ``system, task, metric, filter, value, stderr, higher_is_better, examples, fewshot, chat, limit``,
        and in ``each`` the value per example where the value is their mean (else empty). Numbers that are not finite,
        and standard errors that the harness does not know, are None.
    """
    result = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr"):
                continue
            number = _number(value)
            result.append(
                {
                    "system": system,
                    "task": task,
                    "metric": metric,
                    "filter": how,
                    "value": number,
                    "stderr": _number(metrics.get(f"{metric}_stderr,{how}")),
                    "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                    "examples": results["n-samples"].get(task, {}).get("effective", metrics.get("sample_len")),
                    "fewshot": results["n-shot"].get(task),
                    "chat": options.chat,
                    "limit": options.limit,
                    "each": _each(results["samples"].get(task, []), metric, how, number),
                }
            )
    return result


def _number(value: Any) -> float | None:
    try:
        value = float(value)
    except (TypeError, ValueError):  # "N/A"
        return None
    return value if math.isfinite(value) else None


def _each(samples: list[dict[str, Any]], metric: str, how: str, value: float | None) -> dict[Any, float]:
    """A metric by example, if it is their mean: a perplexity or a BLEU is none."""
    values = {s["doc_id"]: _number(s.get(metric)) for s in samples if s["filter"] == how}
    if value is None or not values or None in values.values() or not np.isclose(np.mean(list(values.values())), value):
        return {}
    return values


def with_baseline(row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A row with what the model before its training gets, and the difference.

    Adds ``before, before_value, before_stderr, difference, difference_stderr``. Both answered the same examples, so
    the standard error is that of the differences by example; None where a metric is no mean over examples.
    """
    difference = None if None in (row["value"], before["value"]) else row["value"] - before["value"]
    ours, theirs, stderr = row["each"], before["each"], None
    if len(ours) > 1 and ours.keys() == theirs.keys():
        stderr = float(np.std([ours[k] - theirs[k] for k in ours], ddof=1) / math.sqrt(len(ours)))
    return {
        **row,
        "before": before["system"],
        "before_value": before["value"],
        "before_stderr": before["stderr"],
        "difference": difference,
        "difference_stderr": stderr,
    }


def write_rows(file: Path, subject: Subject, lines: list[dict[str, Any]]) -> None:
    """Put rows into the file: in place of those of the same model, task and settings, beside all others.

    Raises:
        UserError: the file is there and holds something else.
    """
    from importlib.metadata import version

    stage = subject.model.folder if isinstance(subject.model, FinishedModel) else None
    for row in lines:
        row["stage"] = None if stage is None else stage.name
        row["harness"] = version("lm-eval")
    kept: list[dict[str, Any]] = []
    if file.is_file():
        try:
            new = set(map(_identity, lines))
            kept = [row for row in read_json(file)["rows"] if _identity(row) not in new]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} holds something else than results ({error!r}); move it away") from error
    write_json(file, {"rows": kept + lines})


def _identity(row: dict[str, Any]) -> tuple:
    return tuple(row[k] for k in ("system", "stage", "task", "metric", "filter", "fewshot", "chat", "limit"))
