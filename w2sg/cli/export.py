"""One trained model of a finished run as an ordinary folder: `w2sg export RUN to=FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.config.schema import TrainConfig
from w2sg.console import Plain
from w2sg.data.splits import load_tables
from w2sg.errors import TrainingError, UserError
from w2sg.models.export import export_model
from w2sg.models.finished import FinishedModel, find_finished, kind_of, report_of
from w2sg.models.student import as_student, load_student
from w2sg.reports.model_card import model_card

ROWS = 16  # test rows on which an exported classifier is compared with its run
EQUAL = 1e-4  # of logits, for models and runs in fp32 on a CPU
ROUNDED = 0.1  # where either was in bfloat16 or on a GPU


def print_export(
    place: Path, to: Path, system: str | None, out: Path, root: Path, console: Plain, adapter: bool = False
) -> None:
    """Export, compare with what the run predicted, and say what was written.

    Args:
        place: a finished run, or a stage of a store.
        to: the new folder. system: which model of the run.
        out, root: as `w2sg.models.finished.find_finished` has them.
        adapter: write adapters alone.

    Raises:
        UserError: as `find_finished` and `export_model`; ``place`` is a saved model already; or the folder says
            something else than the run.
    """
    if kind_of(place, "export") == "model":
        raise UserError(f"export: {place} is a saved model already; name a finished run, or a stage of a store")
    trained = find_finished(place, system, out, root)
    content = report_of(trained.run)
    texts, own, reason = _rows(trained, content) if trained.scoring is not None else ([], None, "")
    said: list[str] = []
    console.say(f"export: reading {trained.name}, then writing it" + " and comparing it with its run" * bool(texts))

    def finish(part: Path, about: dict[str, Any]) -> None:
        if trained.scoring is not None and not adapter:
            said.append(_compared(trained, content, part, texts, own) if texts else f"not compared: {reason}")
        elif trained.folder is not None and trained.spec.train == "lora" and not adapter:
            said.append("its adapters are merged, and it says what it said with them")
        card = model_card(content, trained, about, to.name, said, texts[0] if texts else ())
        (part / "README.md").write_text(card, encoding="utf-8")

    files = export_model(trained, to, adapter, [text for row in texts for text in row], finish)
    size = sum(file.stat().st_size for file in files) / 1e6
    stage = "as it was found" if trained.folder is None else trained.folder.name
    console.say(f"{trained.name} ({stage}) of {trained.spec.name} written to {to}: {len(files)} files, {size:.1f} MB")
    for line in said:
        console.say(line)
    console.say(f"how to load it, and how texts must look: {to / 'README.md'}")


def _rows(trained: FinishedModel, content: dict[str, Any]) -> tuple[list[tuple[str, ...]], np.ndarray | None, str]:
    """Some test rows as the run's models read them, the first reply in front; what the run predicted of them, if that
    is in its files; and why there are none.
    """
    predicted = _predictions(trained.run)
    name = next((n for n in predicted if n.replace("_", "-") == trained.name and n in content["metrics"]), None)
    if "text" in predicted:
        texts = [(text,) for text in predicted["text"]]
    elif "first_text" in predicted:
        texts = list(zip(predicted["first_text"], predicted["second_text"], strict=True))
    else:
        try:
            config = TrainConfig.model_validate(content["config"])
            test = load_tables(config.dataset.model_dump(by_alias=True), config.seed).test
        except (UserError, ValueError) as error:
            line = next(iter(str(error).splitlines()), "")
            return [], None, f"the run's files have no texts, and its test rows cannot be read again ({line})"
        texts = [row if len(row) == 1 else (row[f], row[1 - f]) for row, f in zip(test.texts, test.first, strict=True)]
        if name is not None and list(test.ids) != list(predicted["id"]):
            return [], None, "the test rows are others than when the run was made"
    if trained.scoring.pairs != (len(texts[0]) == 2):
        return [], None, "the test rows are of another kind than what it was trained on"
    order = np.argsort([max(map(len, row)) for row in texts], kind="stable")
    places = np.unique(order[np.linspace(0, len(order) - 1, min(ROWS, len(order))).astype(int)])
    own = None if name is None else np.array([predicted[name][k] for k in places], np.float64)
    return [texts[k] for k in places], own, ""


def _predictions(run: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    if not (run / "predictions.parquet").is_file():
        return {}
    with open(run / "predictions.parquet", "rb") as file:  # pyarrow takes no path that is not UTF-8
        return pq.read_table(file).to_pydict()


def _compared(
    trained: FinishedModel, content: dict[str, Any], part: Path, texts: Sequence[Sequence[str]], own: np.ndarray | None
) -> str:
    """See to it that the written folder says of test rows what the run did; in words, how near it is.

    Raises:
        TrainingError: it says something else.
    """
    logits = load_student(part).label_logits(texts).double().numpy()
    what = "the run's own predictions"
    if own is None:
        own, what = as_student(trained).label_logits(texts).double().numpy(), "the model before it was written"
    if logits.shape[1] == 2 and own.ndim == 1:
        logits = logits[:, 0] - logits[:, 1]
    apart = float(np.abs(logits - own).max())
    precision = content["config"].get("trainer", {}).get("precision", "32-true")
    rounded = trained.spec.dtype != "float32" or precision != "32-true" or "gpu" in content.get("versions", {})
    limit = (ROUNDED if rounded else EQUAL) * max(1.0, float(np.abs(own).max()))
    if not apart <= limit:
        raise TrainingError(
            f"export: the folder says something else than {what}: logits of {len(texts)} test rows differ by up to "
            f"{apart:.2g} and not {limit:.2g}; nothing was written"
        )
    line = f"equal to {what} on {len(texts)} test rows: logits differ by at most {apart:.1e}"
    return line if apart <= EQUAL else f"{line} (bfloat16 or a GPU rounds otherwise)"
