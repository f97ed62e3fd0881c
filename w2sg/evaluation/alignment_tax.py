"""The alignment tax: what a decoder costs on questions that have an answer, beside plain samples."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.data.messages import Dialogue, unmarked
from w2sg.data.replies import Prompts, Replies, prompt_id
from w2sg.decoding.decoders import Decoder
from w2sg.errors import UserError
from w2sg.metrics.bootstrap import Bootstrap, difference_interval
from w2sg.metrics.intervals import mcnemar

if TYPE_CHECKING:
    from w2sg.experiment.decode import Decoders
    from w2sg.models.trained import Trained

LETTERS = string.ascii_uppercase
BEFORE, AFTER = "([{'\"“‘*_`", ".,;:!?)]}'\"”’*_`"  # not every mark: -5 is not 5


@dataclass(frozen=True)
class Questions:
    """Questions with one answer each.

    Attributes:
        prompts: as dialogues. answers: [N] texts, of which a reply must be one, normalised, to be right.
        choices: [N] how many there are to choose from; 0 where there are none. right: [N] the place of the right one.
    """

    prompts: Prompts
    answers: list[set[str]]
    choices: np.ndarray
    right: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


def read_questions(file: Path) -> Questions:
    """A JSONL file of ``{question, choices, answer}`` (the answer a choice, its letter, or its place from 0) or of
    ``{question, answer}``.

    Raises:
        UserError: it cannot be read, or a line is not one; names the first such line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"method.evaluation.tax: {file} cannot be read ({getattr(error, 'strerror', None) or error}); name a "
            "JSONL file of {question, choices, answer} or {question, answer}"
        ) from error
    ids: dict[str, int] = {}
    texts, answers, choices, right = [], [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"method.evaluation.tax: line {number} of {file}"
        text, options, answer = _question(line, where)
        if (earlier := ids.setdefault(prompt_id(text), number)) != number:
            raise UserError(f"{where} asks what line {earlier} asks; remove one of them")
        texts.append(text)
        choices.append(len(options))
        right.append(answer if options else 0)
        accepted = [answer]
        if options:
            accepted = [LETTERS[answer], f"{LETTERS[answer]}. {options[answer]}"]
            if options[answer].strip().upper() not in LETTERS[: len(options)]:  # a letter names a choice
                accepted.append(options[answer])
        answers.append({normalised(each) for each in accepted})
    if not texts:
        raise UserError(f"method.evaluation.tax: {file} holds no questions; name another file, or null")
    if len({count > 0 for count in choices}) > 1:
        raise UserError(f"method.evaluation.tax: in {file} some questions have choices and some none; split the file")
    return Questions(Prompts("tax", list(ids), texts), answers, np.array(choices), np.array(right))


def _question(line: str, where: str) -> tuple[Dialogue, list[str], Any]:
    """The dialogue, the choices, and the answer: the place of a choice, or a text where there are none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where} has no question; each line is {{question, choices, answer}} or {{question, answer}}")
    options, answer = row.get("choices") or [], row.get("answer")
    question = unmarked(row["question"].strip())
    if not options:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not normalised(str(answer)):
            raise UserError(f"{where}: its answer must be a text or a number (got {answer!r}); mend or remove it")
        return Dialogue.of_messages([("user", question)]), [], str(answer)
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise UserError(f"{where}: choices must be a list of texts (got {options!r}); mend or remove it")
    if not 2 <= len(options) <= len(LETTERS) or len({normalised(o) for o in options}) < len(options):
        raise UserError(f"{where}: between 2 and {len(LETTERS)} different choices are needed (got {options!r})")
    letters = LETTERS[: len(options)]
    place = answer
    if isinstance(answer, str):
        named = [k for k, option in enumerate(options) if option.strip() == answer.strip()]
        place = named[0] if named else letters.find(answer.strip()) if len(answer.strip()) == 1 else -1
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(options):
        raise UserError(
            f"{where}: its answer must be a choice, its letter (A to {letters[-1]}) or its place from 0 (got "
            f"{answer!r}); mend or remove it"
        )
    listed = "\n".join(f"{letter}. {unmarked(o.strip())}" for letter, o in zip(letters, options, strict=True))
    text = f"{question}\n\n{listed}\n\nAnswer with the letter of the right choice alone."
    return Dialogue.of_messages([("user", text)]), [o.strip() for o in options], place


def normalised(text: str) -> str:
    """Lower case, single spaces, words without brackets, quotes and stops around them.

    >>> normalised(" (B)  Paris, France. ")
    'b paris france'
    """
    return " ".join(word.lstrip(BEFORE).rstrip(AFTER) for word in text.casefold().split()).strip()


def alignment_tax(decoders: Decoders, decoder: Decoder, plain: Decoder, questions: Questions) -> dict[str, Any]:
    """Accuracies of plain samples and of a decoder on the same questions.

    ``decoded`` is the share of replies that are the answer, normalised. ``scored``, where choices are given and the
    decoder has logits of its own, is the share of questions whose right letter is the likeliest: eft's tilted logits
    differ from the sum of log-probabilities by a number that all letters share.

    Returns:
        ``questions``, ``kind``, and of each way of measuring ``accuracy`` by system, and, where a decoder is compared,
        ``difference`` (paired) and ``p`` (exact McNemar).
    """
    systems: dict[str, Decoder] = {"plain": plain}
    if not decoder.is_plain:
        systems[decoder.kind] = decoder
    decoded: dict[str, dict[str, bool]] = {}
    for name, how in systems.items():
        stage = name if how is plain else how.stage
        replies = decoders.write(f"tax-{stage}", how, questions.prompts).replies
        answers = dict(zip(questions.prompts.ids, questions.answers, strict=True))
        decoded[name] = {i: normalised(text) in answers[i] for i, text in zip(replies.ids, replies.texts, strict=True)}
    multiple = bool(questions.choices[0])
    tax: dict[str, Any] = {
        "kind": "multiple choice" if multiple else "exact match",
        "questions": len(questions),
        "decoded": _compared(decoded),
    }
    if multiple and decoder.law().has_logits:
        scored = {name: _by_letters(decoders, questions, how.law().tilt) for name, how in systems.items()}
        tax["scored"] = _compared(scored)
    return tax


def _compared(right: dict[str, dict[str, bool]]) -> dict[str, Any]:
    """Accuracies on the questions that all systems had room for."""
    common = sorted(set.intersection(*map(set, right.values())))
    columns = {name: np.array([hits[i] for i in common], np.float64) for name, hits in right.items()}
    bootstrap = Bootstrap(len(common))
    tax: dict[str, Any] = {"accuracy": {name: bootstrap.share(column).as_dict() for name, column in columns.items()}}
    for name, column in columns.items():
        if name != "plain":
            tax["difference"] = bootstrap.mean(column - columns["plain"]).as_dict()
            ends = tax["difference"]["low"], tax["difference"]["high"]
            low, high = difference_interval(column, columns["plain"], bootstrap, ends)
            tax["difference"] |= {"low": low, "high": high}
            tax["p"] = mcnemar(column, columns["plain"])["p"]
    return tax


def _by_letters(decoders: Decoders, questions: Questions, beta: float) -> dict[str, bool]:
    """Whether the right letter is the likeliest, by the strong model's logits, moved by beta times the pair's."""
    from w2sg.models.trained import reading_as

    strong, pair = decoders.strong, decoders.pair
    scores = _letters(decoders, strong, questions)
    if beta:
        # the pair reads what the strong model reads, as in decoding
        tuned, untuned = (
            _letters(decoders, reading_as(writer, strong), questions) for writer in (pair.tuned, pair.untuned)
        )
        scores = {i: letters + beta * (tuned[i] - untuned[i]) for i, letters in scores.items()}
    right = dict(zip(questions.prompts.ids, questions.right.tolist(), strict=True))
    return {i: int(letters.argmax()) == right[i] for i, letters in scores.items()}


def _letters(decoders: Decoders, writer: Trained, questions: Questions) -> dict[str, np.ndarray]:
    """Log-probabilities of the letters of each question as the next token."""
    rows = [
        (i, prompt, LETTERS[k])
        for i, prompt, count in zip(questions.prompts.ids, questions.prompts.texts, questions.choices, strict=True)
        for k in range(count)
    ]
    ids, prompts, letters = (list(column) for column in zip(*rows, strict=True))
    written = writer.source.chat.replies(letters)
    # some tokenizers write the space before a letter as a token of its own
    if len({(len(row), *row[:-1].tolist()) for row in written}) > 1:
        raise UserError(
            f"method.evaluation.tax: the letters of the choices do not differ in one token alone for "
            f"{writer.source.spec.name}; give questions without choices"
        )
    zeros = np.zeros(len(rows), np.int64)
    row_ids = [f"{i}:{letter}" for i, letter in zip(ids, letters, strict=True)]
    replies = Replies(row_ids, prompts, letters, zeros.astype(bool), zeros, zeros, {})
    run, name = decoders.run, "tax-letters"
    values, sizes, _ = run.token_values(f"{name}-by-{writer.name}", writer, replies, name)
    last = values.double().numpy()[np.cumsum(sizes.numpy()) - 1]
    scores: dict[str, list[float]] = {}
    for place, value in zip(run.encode(writer.source, replies, name).kept, last, strict=True):
        scores.setdefault(ids[place], []).append(float(value))
    return {i: np.array(values) for i, values in scores.items()}
