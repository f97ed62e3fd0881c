"""A model that labels, made into a classifier of transformers: body and head in one, adapters merged."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.models.finished import FinishedModel, check_whole, source_of
from w2sg.models.heads import BagOfWords, LinearHead, MixtureHead, load_head
from w2sg.models.scorer import LanguageScorer, load_language_model, load_scorer
from w2sg.models.source import Source
from w2sg.models.standalone.w2sg_classifier import W2SGClassifier, W2SGClassifierConfig
from w2sg.models.unreadable import quiet_loading
from w2sg.store.weights import weights

MARKUP = re.compile(r"[<\[|｜].*[>\]|｜]")  # what a token for filling looks like that no text has by chance
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # merging in bf16 rounds every weight that adapters touch


@dataclass(frozen=True)
class Classifier:
    """A model that labels, in memory, as it can be exported.

    Attributes:
        model: of transformers: a ``...ForSequenceClassification``, or a `W2SGClassifier` where there is none that gives
            the same; or a `BagOfWords`.
        tokenizer: cuts long texts on the left and fills on the right; None of a bag of words.
        constant: what its rewards are lower by than the run's own, where its head has no place for that.
        notes: what a reader has to know of it, a line each.
    """

    model: nn.Module
    tokenizer: Any = None
    constant: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def ordinary(self) -> bool:
        """Whether transformers alone loads it."""
        return not isinstance(self.model, (W2SGClassifier, BagOfWords))


def load_classifier(trained: FinishedModel, seen: Collection[str] = ()) -> Classifier:
    """A model that labels, whole.

    Args:
        seen: texts that it reads: the token for filling is one that ends none of them.

    Raises:
        UserError: its base is not to be had, or merging its adapters changes what it says.
    """
    check_whole(trained)
    scoring, source = trained.scoring, source_of(trained.spec, trained.role)
    pairs, classes, saved = scoring.pairs, scoring.classes, weights(trained.folder)
    if source.spec.arch == "bow":
        return Classifier(load_scorer(source, pairs, classes, saved).eval())
    if scoring.layer is not None:
        made = _with_head(trained, source, load_head(saved))
    else:
        scorer = load_scorer(source, pairs, classes, saved)
        model = _merged(trained, scorer)
        made = Classifier(model)
        if not _known(source.config):
            made = Classifier(_own(model, model.score.weight, model.score.bias), notes=[_no_class(model)])
    tokenizer = copy.deepcopy(source.tokenizer)
    set_to_read(tokenizer, trained.spec.max_length)
    _fill_with(tokenizer, made.model, {row[-1] for row in source.encode(list(seen)) if len(row)} if seen else set())
    config = made.model.config
    config.problem_type = "regression" if pairs else "single_label_classification"
    names = [f"expert {k}" for k in range(config.num_labels)] if pairs else list(map(str, range(classes)))
    if pairs and config.num_labels == 1:
        names = ["reward"]
    config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    return Classifier(made.model.eval(), tokenizer, made.constant, made.notes)


def set_to_read(tokenizer: Any, max_length: int) -> None:
    """Let a tokenizer cut texts as they are cut in training, at their start, and fill batches on the right."""
    settings = {"truncation_side": "left", "padding_side": "right", "model_max_length": max_length}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for name, value in settings.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # what save_pretrained writes


def _known(config: Any) -> bool:
    """Whether transformers has a class for sequence classification of this architecture, with a head called score."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    made = KNOWN.get(type(config), None)  # where it has none, one of ours stands there once it was needed
    return made is not None and getattr(sys.modules[made.__module__], made.__name__, None) is made


def _no_class(model: nn.Module) -> str:
    return f"transformers has no class for sequence classification of {model.config.model_type}"


def _tokens() -> dict[str, Any]:
    """A few tokens that any model can read."""
    ids = torch.arange(1, 9)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@torch.no_grad()
def _merged(trained: FinishedModel, scorer: LanguageScorer) -> nn.Module:
    """The scorer's model, its adapters merged into it."""
    model = scorer.model
    if scorer._plain is model:
        return model
    tokens = _tokens()
    with quiet_loading():
        expected = model(**tokens).logits.float()
        model = model.merge_and_unload(safe_merge=True)
        found = model(**tokens).logits.float()
    if not (found - expected).norm() <= CLOSE[model.dtype] * expected.norm():
        raise UserError(f"{trained.name}: its adapters cannot be merged: merged, it says something else than with them")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Heads on frozen states
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _with_head(trained: FinishedModel, source: Source, head: LinearHead) -> Classifier:
    """Body and head in one. The head's standardisation becomes part of its weights and of a constant."""
    scoring = trained.scoring
    if trained.spec.random_init:
        L.seed_everything(trained.seed, workers=True, verbose=False)
    scorer = load_language_model(source, scoring.pairs, scoring.classes, depth=scoring.layer)
    model, last = scorer.model, scoring.layer == source.full_depth
    weight = head.score.weight / head.std
    bias = -(weight @ head.mean)
    if isinstance(head, MixtureHead):
        return Classifier(_own(model, weight, bias, last, head), notes=["its head is a mixture of experts"])
    if not last:
        return Classifier(
            _own(model, weight, bias, last),
            notes=[
                f"its head reads the states of block {scoring.layer} without the final norm that every class of "
                "transformers has"
            ],
        )
    if not _known(source.config):
        return Classifier(_own(model, weight, bias, last), notes=[_no_class(model)])
    model.score.weight.copy_(weight)
    if _into_norm(model, weight, bias):
        return Classifier(model)
    if scoring.pairs:
        return Classifier(model, constant=float(bias))
    return Classifier(_own(model, weight, bias, last), notes=["its head has a constant, which no such class has"])


@torch.no_grad()
def _into_norm(model: nn.Module, weight: Tensor, bias: Tensor) -> bool:
    """Move a head's constant into that of the body's last norm, where it has one; whether that could be done.

    States move by the smallest vector c with ``weight @ c = bias``, so what the head says moves by ``bias``.
    """
    norms = [m for m in model.base_model.modules() if isinstance(m, nn.LayerNorm) and m.bias is not None]
    if not norms:
        return False
    move = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(weight.double() @ move, bias.double(), atol=1e-8, rtol=1e-6):
        return False
    tokens = _tokens()
    before, kept = model.base_model(**tokens).last_hidden_state.clone(), norms[-1].bias.clone()
    norms[-1].bias.add_(move.to(kept.dtype))
    moved = (model.base_model(**tokens).last_hidden_state - before).double()
    if torch.allclose(moved, move.expand_as(moved), atol=1e-4, rtol=1e-3):
        return True
    norms[-1].bias.copy_(kept)  # it is not the last thing that states go through
    return False


def _own(
    model: nn.Module, weight: Tensor, bias: Tensor | None = None, final_norm: bool = True, head: Any = None
) -> W2SGClassifier:
    """The body under a head of ours, for what transformers has no class for."""
    mixture = isinstance(head, MixtureHead)
    experts = len(head.weights) if mixture else 0
    pairs = weight.shape[0] == (experts or 1)
    config = W2SGClassifierConfig(
        backbone=model.config.to_dict(),
        final_norm=final_norm,
        experts=experts,
        num_labels=weight.shape[0] if pairs or not mixture else weight.shape[0] // experts,
        problem_type="regression" if pairs else "single_label_classification",
        pad_token_id=model.config.pad_token_id,
    )
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        made = W2SGClassifier(config)
    made.backbone = model.base_model
    made.score = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    with torch.no_grad():
        made.score.weight.copy_(weight)
        made.score.bias.zero_() if bias is None else made.score.bias.copy_(bias)
        if mixture:
            made.weights = nn.Parameter(head.weights.detach().clone())
    return made


def _fill_with(tokenizer: Any, model: nn.Module, ends: Collection[int]) -> None:
    """Give tokenizer and model a token for filling: the classes of transformers read a text up to its last other token,
    so it must end no text.
    """
    known = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    wanted = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, *known]
    rows = model.get_input_embeddings().num_embeddings
    usable = [i for i in wanted if i is not None and i < rows and i not in ends and MARKUP.fullmatch(known.get(i, ""))]
    if usable:
        tokenizer.pad_token = known[usable[0]]
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        if tokenizer.pad_token_id >= rows:
            model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    if isinstance(model, W2SGClassifier):
        rows = model.get_input_embeddings().num_embeddings
        model.backbone.config.update({"pad_token_id": tokenizer.pad_token_id, "vocab_size": rows})
        model.config.backbone = model.backbone.config.to_dict()
