"""What models read of a table: packed tokens, or frozen features computed once per (model, data) and cached."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.loading import Examples
from w2sg.data.ragged import Ragged
from w2sg.data.rows import Rows, pack
from w2sg.data.table import Table
from w2sg.models.label_questions import Questions, likeliest
from w2sg.models.label_tokens import Answered
from w2sg.models.layer_probe import choose_layer
from w2sg.models.once import told
from w2sg.models.packing import rules_key, said_apart, separates_texts
from w2sg.models.reading import Reading
from w2sg.models.scorer import LanguageScorer, load_language_model
from w2sg.models.source import Source
from w2sg.store.files import read_json, write_json
from w2sg.store.shards import Found
from w2sg.training import foreseen
from w2sg.training.stage_values import holds, load_values
from w2sg.training.stages import ReadJob, Stages
from w2sg.training.tokens import encoded

log = logging.getLogger(__name__)
VERSION = 1  # part of every key: raise it when a stage's meaning changes, so that old outputs are no longer used


def content_key(table: Table) -> dict[str, Any]:
    """A table's texts as part of a cache key (not its labels, nor which reply is first, nor where it came from)."""
    return {"split": table.name, "rows": len(table), "content": table.content_hash()}


@dataclass(frozen=True)
class Beside:
    """Scores of the same texts by the same model, perhaps with more tokens at their ends, which are still to be read.

    Attributes:
        stage: folder name of their stage. table: with the whole texts. load: the model with its head.
    """

    stage: str
    table: Table
    load: Callable[[], LanguageScorer]


class InputMaker:
    """Makes the inputs of models, each once per run and, where that is costly, once per store.

    Args:
        stages: runs the reading of frozen features.
        ground_truth: the split on which ``feature_layer=auto`` chooses.
        precision: of the trainer; part of the keys.
        seed: of the weights when a model is randomly initialised.
        reading: looks at what is read.
    """

    def __init__(self, stages: Stages, ground_truth: Table, precision: str, seed: int, reading: Reading | None = None):
        self.stages, self.ground_truth, self.reading = stages, ground_truth, reading or Reading()
        self.precision, self.seed = precision, seed
        self._tokens: dict[tuple, Rows] = {}
        self._ids: dict[tuple, Ragged] = {}
        self._cut: dict[tuple, int] = {}  # texts of what was looked at
        self._states: dict[tuple, Tensor] = {}
        self._aside = False
        self._beside: dict[str, Path] = {}

    def read(self, source: Source, table: Table) -> dict[str, Any]:
        """Tokenise the table's texts, look at them, and say what of it belongs into the keys of what reads them.

        Raises:
            UserError: the tokenizer loses what they say.
        """
        _, count = self._encoded(source, table)
        return {"beginning": "kept"} if count and source.first else {}

    def _encoded(self, source: Source, table: Table) -> tuple[Ragged, int]:
        memory = self._memory(source, table)
        if memory not in self._ids:
            texts = [t for texts in table.texts for t in texts]
            key = {"version": VERSION, "tokenizer": source.tokens_key, "data": content_key(table)}
            self._ids[memory] = encoded(self.stages, f"tokens-of-{table.name}", key, source.encode, texts)
        ids = self._ids[memory]
        if self._aside and memory not in self._cut:
            return ids, sum(len(row) > source.spec.max_length for row in ids)
        if memory not in self._cut:
            self._cut[memory] = self.reading.texts(source, table, ids)
        return ids, self._cut[memory]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """For rows that a fit is measured on: no stage rests on them, and a report looks at them where they count."""
        self._aside = True
        try:
            with self.stages.aside():
                yield
        finally:
            self._aside = False

    @staticmethod
    def _memory(source: Source, table: Table) -> tuple:
        spec = source.spec
        # folders tell files apart, identities what no folder has: buckets of a bag of words, a revision of the hub's
        whose = source.folder, source.gguf, repr(sorted(source.identity.items()))
        return (*whose, spec.arch, spec.max_length, source.templated, table.content_hash())

    def tokens(self, source: Source, table: Table, scorer: nn.Module) -> Rows:
        """The table's texts as rows of this model's tokens, packed where the backbone keeps the texts apart."""
        spec = source.spec
        memory = self._memory(source, table)
        if memory not in self._tokens:
            packed = spec.share_prompt
            if spec.arch == "hf":
                wanted = packed and table.kind == "pairs"
                apart = told(lambda: separates_texts(scorer, source.config.vocab_size, spec.max_length, wanted))
                if wanted and not apart:
                    log.warning("%s", said_apart(source))
                    packed = False
            ids, _ = self._encoded(source, table)
            self._tokens[memory] = pack(table.texts, lambda _: ids, spec.max_length, packed, source.first)
        return self._tokens[memory]

    def answered(self, source: Source, table: Table, questions: Questions, targets: Tensor) -> Answered | None:
        """Questions with their likeliest answers and what ends these; None where the labels alone are taught.

        Args:
            targets: [N, C] label logits.
        """
        if source.spec.label_tokens.loss == "labels":
            return None
        answers, end = np.asarray(questions.tokens)[likeliest(targets.numpy(), table.ids)], questions.end
        ids, _ = self._encoded(source, table)
        whole = [
            np.asarray([*row, answer, *end[:-1]] if end else row, np.int32)
            for row, answer in zip(ids, answers, strict=True)
        ]
        rows = pack(table.texts, lambda _: whole, source.spec.max_length, False, source.first)
        return Answered(rows, np.tile(np.asarray(end, np.int64), (len(table), 1)))

    def layer(self, source: Source) -> int:
        """The layer that this role's head reads; ``auto`` is chosen by cross-validation on the ground-truth split."""
        spec, table = source.spec, self.ground_truth
        if spec.layer != "auto":
            return spec.layer or source.depth
        candidates = self._candidates(source)
        folder = self._features_stage(source, table, candidates)
        # which text is the better one, whatever the coin flips of this seed
        answers = np.where(table.first == 0, table.labels, 1 - table.labels) if table.kind == "pairs" else table.labels
        by_id = dict(zip(table.ids, answers.tolist(), strict=True))
        key = {
            "version": VERSION,
            "features": folder.name,
            "candidates": candidates,
            "labels": hashlib.sha256(repr(sorted(by_id.items())).encode()).hexdigest()[:16],
        }

        def work(part: Path) -> dict[str, Any]:
            ids, states = load_values(folder)
            scores = choose_layer(states, torch.tensor([by_id[i] for i in ids]), ids, table.classes)
            result = {
                "layer": candidates[int(np.argmax(scores))],
                "accuracy": {str(c): round(s, 4) for c, s in zip(candidates, scores, strict=True)},
            }
            write_json(part / "layer.json", result)
            return result

        def highest(part: Path) -> foreseen.Foreseen:
            write_json(part / "layer.json", {"layer": max(candidates)})
            return foreseen.Foreseen()

        return read_json(self.stages.compute("layer", key, work, highest) / "layer.json")["layer"]

    def features(self, source: Source, table: Table, layer: int, beside: Beside | None = None) -> Tensor:
        """[N, n, D] frozen states of the table's texts at one layer, in the table's order.

        Args:
            beside: scores that the same forward gives, where one text begins the other; `read_beside` finds them then.
        """
        layers = [layer]
        if source.spec.layer == "auto" and table.content_hash() == self.ground_truth.content_hash():
            layers = self._candidates(source)  # where the layer was chosen, its states are there already
        folder = self._features_stage(source, table, layers, beside)
        if (folder.name, layer) not in self._states:
            ids, values = load_values(folder)
            place = {i: row for row, i in enumerate(ids)}
            states = values[[place[i] for i in table.ids], :, layers.index(layer)].contiguous()
            self._states[folder.name, layer] = states
        return self._states[folder.name, layer]

    def read_beside(self, stage: str) -> Path | None:
        """The folder of features that holds the values of another stage, by its folder name; None where none does."""
        return self._beside.get(stage)

    def _more(self, source: Source, table: Table, whole: Table) -> int | None:
        """How many tokens the whole texts have after those of the table; None where no forward can be shared."""
        if source.spec.quantise is not None:  # the untrained model keeps its own weights
            return None
        short, long = (self._encoded(source, t)[0] for t in (table, whole))
        counts = {len(b) - len(a) for a, b in zip(short, long, strict=True)}
        begins = all(np.array_equal(a, b[: len(a)]) for a, b in zip(short, long, strict=True))
        if len(counts) > 1 or not begins or max(map(len, long)) > source.spec.max_length:
            return None
        more = counts.pop()
        if more and table.kind == "pairs":  # in a packed row the shorter text must end among its own tokens
            rows = pack(whole.texts, lambda _: long, source.spec.max_length)
            if (rows.sizes <= more).any():
                return None
        return more

    @staticmethod
    def _candidates(source: Source) -> list[int]:
        return sorted(set(source.spec.candidates))

    def _features_stage(self, source: Source, table: Table, layers: list[int], beside: Beside | None = None) -> Path:
        spec = source.spec
        key = {
            "version": VERSION,
            "model": {
                **source.identity,
                "max_length": spec.max_length,
                "dtype": spec.dtype,
                "random_init": self.seed if spec.random_init else None,
                **rules_key(source.config, spec.max_length, table.kind == "pairs"),
            },
            "layers": layers,
            "depth": source.depth,
            "data": content_key(table),
            "precision": self.precision,
            **self.read(source, table),
        }

        def make() -> ReadJob:
            L.seed_everything(self.seed, workers=True, verbose=False)
            if beside is not None and (more := self._more(source, table, beside.table)) is not None:
                return self._shared_job(source, table, layers, beside, more)
            scorer = load_language_model(source, table.kind == "pairs", table.classes, depth=max(layers))
            rows = self.tokens(source, table, scorer)
            examples = Examples(rows, table.ids, torch.zeros(len(table), dtype=torch.long))
            notes = {**rows.notes(spec.share_prompt), "layers": layers}
            read = partial(scorer.features, layers=layers)
            return ReadJob(scorer, read, examples, notes, foreseen=self._foreseen(source, table, layers))

        folder = self.stages.read(f"features-on-{table.name}", key, make)
        if beside is not None and holds(folder, beside.stage):
            self._beside[beside.stage] = folder
        return folder

    def _shared_job(self, source: Source, table: Table, layers: list[int], beside: Beside, more: int) -> ReadJob:
        """One forward over the whole texts gives the states where the table's texts end, and the scores."""
        scorer = beside.load()
        rows = self.tokens(source, beside.table, scorer)

        def read(batch: dict[str, Tensor]) -> Found:
            states, scores = scorer.features_and_scores(batch, layers, more)
            return Found(states, beside=scores)

        examples = Examples(rows, table.ids, torch.zeros(len(table), dtype=torch.long))
        notes = {**rows.notes(source.spec.share_prompt), "layers": layers}
        found = self._foreseen(source, table, layers, beside)
        return ReadJob(scorer, read, examples, notes, beside=beside.stage, foreseen=found)

    @staticmethod
    def _foreseen(
        source: Source, table: Table, layers: list[int], beside: Beside | None = None
    ) -> Callable[[], foreseen.Foreseen]:
        """What a plan takes for states, and for the scores that come with them."""

        def found() -> foreseen.Foreseen:
            texts = len(table.texts[0])
            states = foreseen.numbers(1, 1, 1, 1).tensors["values"]
            tensors = {"values": states.expand(len(table), texts, len(layers), source.config.hidden_size)}
            if beside is not None:
                tensors[beside.stage] = foreseen.numbers(len(table), texts if texts > 1 else table.classes).tensors[
                    "values"
                ]
            return foreseen.Foreseen(tensors)

        return found
