"""A trained model, ready to use: of a finished run, of a stage of a store, or of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2sg.config.programs import command
from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.models.classifier import Classifier, load_classifier
from w2sg.models.export import ORIGIN, load_merged
from w2sg.models.finished import FinishedModel, find_finished, kind_of
from w2sg.models.heads import BagOfWords, HashedWords
from w2sg.models.standalone import bag_of_words, w2sg_classifier
from w2sg.models.unreadable import quiet_loading, reading


def _listed(what: str, of: str, given: Any) -> list[Any]:
    if isinstance(given, str):  # a list of its letters, otherwise
        raise UserError(f"{what}: one text was given; give a list of {of}")
    return list(given)


@dataclass(frozen=True)
class Student:
    """A trained model with its tokenizer.

    Attributes:
        name: which system of its run it is.
        kind: ``reward`` (texts of a pair get a reward each), ``classes`` (a text gets a logit for each class), or
            ``policy`` (it writes).
        model: of transformers; of a bag of words a module of w2sg.
        tokenizer: None of a bag of words.
        max_length: tokens of a text that are read; a longer one loses its start.
    """

    name: str
    kind: str
    model: nn.Module
    tokenizer: Any
    max_length: int

    @torch.inference_mode()
    def score(self, texts: Sequence[str], batch_size: int = 16) -> Tensor:
        """[N, C] class logits of texts, or [N, 1] rewards, in fp32; [N, K] of a mixture of K experts on pairs.

        Raises:
            UserError: it writes and gives no scores.
        """
        if self.kind == "policy":
            raise UserError(f"{self.name}: it writes and gives no scores; use its model and tokenizer")
        texts = _listed("score", "texts", texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise UserError(
                f"score: {str(wrong[0])[:60]!r} is no text; give each dialogue or reply as one text, as the run's rows "
                "are (label_logits takes pairs)"
            )
        parts = [self._some(texts[k : k + batch_size]) for k in range(0, len(texts), batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, 1)

    @torch.inference_mode()
    def label_logits(self, texts: Sequence[Sequence[str]], batch_size: int = 16) -> Tensor:
        """[N, C] as a run's predictions have them: of texts one by one, or [N, 2] of pairs, the first text in front.

        Args:
            texts: tuples of one text, or of two that are compared.
        """
        rows = _listed("label_logits", "pairs, or of tuples of one text", texts)
        sizes = {0 if isinstance(row, str) else len(row) for row in rows}
        if not sizes <= {1} and not sizes <= {2}:
            raise UserError("label_logits: give tuples of one text each, or of the two texts of a pair each")
        n = max(sizes, default=1)
        flat = self.score([text for row in rows for text in row], batch_size).unflatten(0, (-1, n))
        if n == 1:
            return flat[:, 0]
        if getattr(getattr(self.model, "config", None), "experts", 0):
            return self.model.compare(flat[:, 0], flat[:, 1])
        return flat[..., 0]

    def _some(self, texts: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        if self.tokenizer is None:
            words = HashedWords(self.model.words.num_embeddings)
            rows = pack([(text,) for text in texts], words, self.max_length)
            batch = {k: v.to(device) for k, v in rows.collate(range(len(texts))).items()}
            return self.model(batch).float().view(len(texts), -1)
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        if len(empty := (batch["attention_mask"].sum(1) == 0).nonzero()):
            raise UserError(f"score: {texts[int(empty[0])]!r} has no tokens; leave it out")
        return self.model(**batch).logits.float()


def load_student(
    folder: str | Path, system: str | None = None, out: str | Path = "outputs", root: str | Path | None = None
) -> Student:
    """A trained model of a finished run (its student, if no other system is named), of a stage, or of an exported
    folder.

    Args:
        folder: the run's, the stage's in a store, or one that ``export=`` wrote.
        system: which model of the run: weak, student, ceiling, cong, ...
        out: where runs lie, for a stage: a run's report says what it is.
        root: a store to look into where the run's own has been moved.

    Raises:
        UserError: it is not there; says what there is, or how to make it.
    """
    folder, out = Path(folder), Path(out)
    kind = kind_of(folder, "folder")
    if kind == "model":
        return _exported(folder)
    if kind == "run" and system is None:
        system = "student"
    trained = find_finished(folder, system, out, Path(root) if root is not None else out / "store", "export")
    return as_student(trained)


def as_student(trained: FinishedModel, made: Classifier | None = None) -> Student:
    """A model of a finished run, loaded where it is not yet."""
    if trained.scoring is None:
        model, tokenizer = load_merged(trained)
        return Student(trained.name, "policy", model, tokenizer, trained.spec.max_length)
    made = load_classifier(trained) if made is None else made
    kind = "reward" if trained.scoring.pairs else "classes"
    return Student(trained.name, kind, made.model, made.tokenizer, trained.spec.max_length)


def _exported(folder: Path) -> Student:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import AutoModelForSequenceClassification as Auto

    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"folder: {folder} was not written by `{command('export')}` (it has no {ORIGIN}); load it with transformers"
        ) from error
    kind, name = origin.get("kind", "policy"), origin["system"]
    if (folder / "bag_of_words.py").is_file():
        read = bag_of_words.BagOfWords(folder)
        model = BagOfWords(read.buckets, kind == "reward", len(read.labels), read.scale)
        model.words.weight.data = torch.from_numpy(read.weights)
        return Student(name, kind, model.eval(), None, read.max_length)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"folder: {folder} holds adapters alone; load it as its README.md says")
    AutoConfig.register("w2sg_classifier", w2sg_classifier.W2SGClassifierConfig, exist_ok=True)  # not the folder's code
    with quiet_loading(), reading("folder", str(folder), "cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if kind == "policy":
            model = AutoModelForCausalLM.from_pretrained(folder)
        elif (folder / "w2sg_classifier.py").is_file():
            model = w2sg_classifier.W2SGClassifier.from_pretrained(folder)
        else:
            model = Auto.from_pretrained(folder)
    return Student(name, kind, model.eval(), tokenizer, origin.get("max_length", tokenizer.model_max_length))
