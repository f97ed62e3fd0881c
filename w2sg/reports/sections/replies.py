"""What the systems replied to a few prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import SHOWN, Cell, number

Row = Mapping[str, Any]  # a reply: system, prompt_id, prompt, reply, finished, tokens, and what was measured of it
# What may have been measured of a reply, in words, with the sign shown or not.
MEASURED = {
    "explicit": ("reward", True),
    "reward": ("reward", True),
    "over_plain": ("preferred to plain", False),
    "over_base": ("preferred to untrained", False),
    "implicit_per_token": ("implicit per token", True),
}


class RepliesShown(Section):
    """Replies to the first prompts in the order of their hashes (report.json: ``examples``).

    Args:
        root: the top-level key that holds them, as "text".
        rows: of samples.parquet. prompts: ids and texts, in their order.
        drafts: the part of a reply that another model drafted, by system and prompt id.
    """

    key, template, texts = "replies", "replies.html", True

    def __init__(
        self,
        root: str,
        rows: Sequence[Row] = (),
        prompts: Iterable[tuple[str, str]] = (),
        drafts: Mapping[tuple[str, str], str] | None = None,
    ):
        self.root, shown = root, []
        for prompt_id, text in list(prompts)[:SHOWN]:
            replies = [{k: v for k, v in row.items() if k != "prompt"} for row in rows if row["prompt_id"] == prompt_id]
            for reply in replies:
                if (draft := (drafts or {}).get((reply["system"], prompt_id))) is not None:
                    reply["draft"] = draft
            shown.append({"prompt": text, "replies": replies})
        super().__init__(content={root: {"examples": shown}})

    def show(self, report: Report) -> dict[str, Any]:
        """A table for each prompt; the settings of a sweep fold away."""
        examples = report[self.root]["examples"]
        shown = []
        for example in examples:
            swept = [r for r in example["replies"] if r["system"].startswith("alpha ")]
            others = [r for r in example["replies"] if not r["system"].startswith("alpha ")]
            shown.append((example["prompt"].strip(), _table(report, others), _table(report, swept) if swept else None))
        drafted = any("draft" in reply for example in examples for reply in example["replies"])
        return {"examples": shown, "drafted": drafted}


def _table(report: Report, replies: Sequence[Row]) -> tuple[list[str], list[tuple[Any, ...]]]:
    columns = {key: words for key, words in MEASURED.items() if any(r.get(key) is not None for r in replies)}
    rows = []
    for reply in replies:
        text, draft = reply["reply"].strip(), reply.get("draft")
        if draft is not None and reply["reply"].startswith(draft):
            cell = Cell(reply["reply"][len(draft) :], kind="said", first=draft, first_kind="draft")
        else:
            cell = Cell(text, kind="said")
        tokens = "–" if reply["tokens"] is None else f"{reply['tokens']:,}"
        measured = (number(reply.get(key), 3, sign) for key, (_, sign) in columns.items())
        cut = Cell(tokens, "" if reply["finished"] else "cut off")
        rows.append((name_of(report, reply["system"]), *measured, cut, cell))
    return ["", *(words for words, _ in columns.values()), "tokens", "reply"], rows
