"""The typed shape of ``dataset``: where rows come from, sizes of splits, label noise, and zero-shot questions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, PositiveInt

from w2sg.config.option import Options, option


class NoiseConfig(Options):
    """Noise on the labels that the student trains on.

    Which rows are hit depends on (seed, row id), so the rows at rate 0.1 are a subset of those at 0.2.
    """

    kind: Literal["none", "flip", "shrink", "hard_flip", "class_conditional"] = option(
        "none", "none | flip | shrink | hard_flip | class_conditional"
    )
    rate: float = option(0.0, "share of rows that are hit", ge=0.0, le=1.0)
    shrink: float = option(-1.0, "kind=shrink: w becomes 1/C + shrink (w - 1/C)", ge=-1.0, le=1.0)
    rates: list[float] | None = option(None, "kind=class_conditional: one rate for each class of label")

    def rules(self) -> list[str]:
        problems = []
        if self.kind == "none" and self.rate > 0:
            problems.append("rate: a rate without a kind does nothing; set dataset.noise.kind=flip, or another")
        if self.kind == "class_conditional":
            if self.rates is None:
                problems.append("rates: class_conditional noise needs one rate per class, as [0.1,0.3]")
            if self.rate > 0:
                problems.append("rate: not read by class_conditional noise; use dataset.noise.rates alone")
        elif self.rates is not None:
            problems.append("rates: read only by dataset.noise.kind=class_conditional; use dataset.noise.rate")
        if any(not 0 <= rate <= 1 for rate in self.rates or []):
            problems.append(f"rates: each lies between 0 and 1 (got {self.rates})")
        return problems


class Sizes(Options):
    """Examples per split; null takes all there are."""

    ground_truth: PositiveInt | None = option(None, "trains the weak model", alias="weak_train")
    transfer: PositiveInt | None = option(None, "is labelled by the weak model, and trains the student")
    test: PositiveInt | None = option(None, "measures")


class ZeroShotConfig(Options):
    """What the untrained strong model is asked after each text, for its zero-shot score."""

    question: str = option(..., "comes after the text")
    answers: list[str] = option(..., "pairs: the worse, the better; classes: one for each", min_length=2)


# what it is called in code and in keys; typed weak_train
Split = Annotated[
    Literal["ground_truth", "transfer", "test"],
    BeforeValidator(lambda name: "ground_truth" if name == "weak_train" else name),
]


class Difficulty(Options):
    """Easy to hard: some splits get the easy rows, the others the hard ones."""

    column: str = option(..., "the column with each row's difficulty, a number")
    most: float = option(..., "rows of at most this are easy", allow_inf_nan=False)
    easy: list[Split] = option(..., "splits that get the easy rows, as [weak_train, transfer]", min_length=1)

    def rules(self) -> list[str]:
        if len(set(self.easy)) != len(self.easy) or len(self.easy) == 3:
            return ["easy: splits with easy rows, each once, and one must be left for the hard ones; as [weak_train]"]
        return []


# What a column of the user's own data may be, under any name (`w2sg.data.forms` reads them).
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "messages",
    "text",
    "label",
    "system",
    "history",
    "score_chosen",
    "score_rejected",
)


# read by the framework, not by the loader
DATASET_KEYS = {"name", "sizes", "split_seed", "strict", "max_chars", "difficulty", "zero_shot", "noise", "also"}


class Also(Options):
    """A second test set, in place of its name alone."""

    name: str | None = option(None, "names it in tables; null: its dataset or file")
    dataset: str | None = option(None, "how its rows are read, as a choice of dataset=; null by their columns (local)")
    path: str | None = option(None, "a hub id, a folder or a file; null: the dataset's own")
    subset: str | None = option(None, "one of its subsets")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    columns: dict[str, str] | None = option(None, "names of its columns, as dataset.columns")
    size: PositiveInt | None = option(None, "rows at most; null: as dataset.sizes.test")


class DatasetConfig(Options):
    model_config = ConfigDict(
        extra="allow", populate_by_name=False
    )  # added to that of Options: a loader may have options of its own; `check` binds them to it

    name: str = option(..., "names the rows in reports")
    target: str = option(
        ...,
        "the loader: a function (path, subset, revision) -> w2sg.data.sources.Source; other keys go to it as options",
        alias="_target_",
    )
    path: str | None = option(
        ...,
        "a hub id, a folder or a file (.jsonl .jsonl.gz .json .csv .parquet); a folder with weak_train, transfer and "
        "test files gives the three splits as they are; null reads an installed package",
    )
    subset: str | None = option(None, "one of the hub's configurations of the dataset, where it has several")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    sizes: Sizes = option(Sizes(), "examples per split; null takes all there are")
    split_seed: int = option(
        0, "decides which prompts go to which split; which of two replies is first is decided by seed"
    )
    strict: bool = option(False, "true refuses a bad row instead of dropping and counting it")
    max_chars: PositiveInt | None = option(
        40000, "longer texts are dropped and counted, whatever the tokenizer; null keeps them all"
    )
    difficulty: Difficulty | None = option(
        None, "{column: level, most: 3, easy: [weak_train, transfer]} gives these splits the easy rows; null does not"
    )
    zero_shot: ZeroShotConfig | None = option(
        None, "what the untrained strong model is asked after each text, for its zero-shot score; null asks nothing"
    )
    noise: NoiseConfig = option(NoiseConfig(), "noise on the labels that the student trains on")
    also: list[str | Also] = option(
        [],
        "second test sets, which nothing is trained on: names of datasets, files, or "
        "{name: helpful, dataset: hh_rlhf, path: FOLDER, size: 500}; their test file where there is one, else all rows",
    )

    def rules(self) -> list[str]:
        columns = (self.model_extra or {}).get("columns")
        if columns is None:
            return []
        shown = "{prompt: my_question, chosen: my_good, rejected: my_bad}"
        if not isinstance(columns, dict) or not columns or not all(isinstance(v, str) and v for v in columns.values()):
            return [f"columns: give the names of columns, as {shown}; null reads them by their own names"]
        unknown = [name for name in columns if name not in FIELDS]
        return [f"columns: there is no field {name!r}; choose among {', '.join(FIELDS)}" for name in unknown]
