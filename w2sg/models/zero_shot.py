"""What a pretrained model says before anybody trained it: the baseline that needs no supervisor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from w2sg.data.table import Table
from w2sg.data.tokens import ids_after
from w2sg.errors import UserError
from w2sg.models.backbones import logit_scale, named_scales, softcap_of
from w2sg.models.loading import load_transformer
from w2sg.models.once import told
from w2sg.models.scorer import LanguageScorer
from w2sg.models.source import Source

if TYPE_CHECKING:
    from w2sg.config.data_schema import ZeroShotConfig


def why_not(source: Source, table: Table, zero_shot: ZeroShotConfig | None) -> str | None:
    """Why a model has no zero-shot score on a table; None where it has one."""
    if zero_shot is None:
        return "dataset.zero_shot asks nothing"
    if source.spec.arch != "hf":
        return f"{source.spec.name} was never pretrained"
    if source.spec.random_init:
        return "its weights are drawn at random"
    if source.spec.layers is not None:
        return f"only {source.spec.layers} of its blocks are kept, which cannot answer"
    if table.kind == "classes" and len(zero_shot.answers) != table.classes:
        return f"dataset.zero_shot.answers names {len(zero_shot.answers)} answers for {table.classes} classes"
    return None


def questioned(table: Table, question: str) -> Table:
    """The table with a question after each text; long texts lose their start, never the question."""
    return replace(table, texts=[tuple(text + question for text in texts) for texts in table.texts])


def answer_tokens(tokenizer: Any, answers: list[str]) -> list[int]:
    """The first token of each answer, as it goes on a text."""
    return [ids[0] for ids in ids_after(tokenizer, "x:", answers)]


def answers_key(source: Source, answers: list[str]) -> dict[str, Any]:
    """What else an answer depends on, as part of a cache key: empty for models whose answers were always read so.

    Tokens are named where an answer is other tokens by itself than after a text (SentencePiece), and scales where
    logits are more than the output layer's.
    """
    alone = source.tokenizer(answers, add_special_tokens=False)["input_ids"]
    tokens = answer_tokens(source.tokenizer, answers)
    key: dict[str, Any] = {} if tokens == [ids[0] for ids in alone] else {"answer_tokens": tokens}
    if (cap := softcap_of(source.config)) is not None:
        key["softcap"] = cap
    return key | ({"logit_scales": scales} if (scales := named_scales(source.config)) else {})


class _Capped(nn.Linear):
    """Logits of answers that are bent one by one, and only then compared."""

    def __init__(self, width: int, answers: int, cap: float, pairs: bool):
        super().__init__(width, answers)
        self.cap, self.pairs = cap, pairs

    def forward(self, states: Tensor) -> Tensor:
        logits = self.cap * torch.tanh(super().forward(states) / self.cap)
        return logits[..., -1:] - logits[..., :1] if self.pairs else logits


def load_zero_shot(source: Source, pairs: bool, answers: list[str]) -> LanguageScorer:
    """The untouched language model as a scorer: its own output rows for the answers are the head.

    The score of a pair's text is the logit of the last answer minus that of the first; a class's logit is that of its
    answer. Of an answer with several tokens the first one counts.

    Raises:
        UserError: two answers begin with the same token, or the model has no language head.
    """
    from transformers import AutoModelForCausalLM

    # rounding of weights (quantise) is for what is trained; the answers are those of the model as it was found
    spec = source.spec.model_copy(update={"quantise": None, "train": "full"})
    tokenizer = source.tokenizer
    model, drawn = load_transformer(AutoModelForCausalLM, replace(source, spec=spec), frozen=True)
    if drawn:  # a saved classifier, say: its answers would be random
        raise UserError(
            f"{spec.name} has no weights for {drawn[0]}, so it cannot answer; set dataset.zero_shot=null (finished "
            "stages are kept)"
        )
    first = answer_tokens(tokenizer, answers)
    if len(set(first)) < len(first):
        raise UserError(
            f"dataset.zero_shot.answers: {answers} begin with the same token for {spec.name}; choose others, or set "
            "dataset.zero_shot=null"
        )
    output = model.get_output_embeddings()
    if output is None:
        raise UserError(f"{spec.name} has no language head to ask; set dataset.zero_shot=null")
    weight, bias = output.weight.detach()[first].float(), getattr(output, "bias", None)
    bias = weight.new_zeros(len(first)) if bias is None else bias.detach()[first].float()
    scale, cap = told(lambda: logit_scale(model)), softcap_of(source.config)
    weight, bias = weight * scale, bias * scale
    if pairs and cap is None:
        weight, bias = weight[-1:] - weight[:1], bias[-1:] - bias[:1]
    head = nn.Linear(weight.shape[1], len(weight)) if cap is None else _Capped(weight.shape[1], len(weight), cap, pairs)
    head.to(weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    for name, child in list(model.named_children()):
        if child is output:
            delattr(model, name)  # the rows of the answers are all that is read of it
    model.score = head
    return LanguageScorer(model, pairs, source.full_depth).eval()
