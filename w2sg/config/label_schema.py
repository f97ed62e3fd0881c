"""Options of a language model that labels by writing a label token: ``strong.head=label_tokens``."""

from __future__ import annotations

from typing import Literal

from w2sg.config.option import Options, option


class LabelTokens(Options):
    """What it is asked, what it may answer, and what of its answer is taught."""

    loss: Literal["vocabulary", "labels"] = option(
        "vocabulary",
        "vocabulary: also that the answer is one of the label tokens, among all tokens, and what ends it | labels: the "
        "loss on the label tokens alone",
    )
    labels: list[str] | None = option(
        None,
        "the answers in the order of classes, of one token each, as [A,B]; null: A and B of pairs, False and True of "
        "two classes, 0, 1, 2 ... of more",
        min_length=2,
    )
    question: str | None = option(
        None,
        "file with a jinja template of the question: it shows prompt, first and second of pairs, or text of classes; "
        "null is that of docs/label_training.md",
    )
    chat: Literal["auto", "always", "never"] = option(
        "auto",
        "question and answer as a dialogue of the chat template: auto where the model's name says chat, instruct or it "
        "| always | never",
    )
    both_orders: bool = option(
        False, "pairs are read in both orders and the logits averaged, so that a preference for a place cancels"
    )

    def rules(self) -> list[str]:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            return [f"labels: {self.labels} are not different; name each class by a label of its own"]
        return []
