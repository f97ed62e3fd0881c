"""The part of every page that shows what models read, and how much of it is cut."""

from __future__ import annotations

import html
from typing import Any

from w2sg.reports.html import table


def reading_section(reading: dict[str, Any] | None) -> list[str]:
    """Examples as the models read them, and the shares of texts that lose their start; nothing for older reports."""
    if not reading or not (reading["cut"] or reading["examples"]):
        return []
    parts = ["<h2>What the models read</h2>"]
    rows = [
        (
            found["model"],
            found["split"].replace("_", " "),
            f"{found['max_length']:,}",
            f"{found['texts']:,}",
            f"{found['cut']:,} ({found['cut'] / max(found['texts'], 1):.1%})",
            f"{found['alike']:,}" if found["alike"] else "–",
        )
        for found in reading["cut"]
    ]
    if rows:
        head = ("model", "texts of", "max_length", "texts", "lose their start", "pairs that are one text then")
        parts.append(table(head, rows))
    titles = [f"{html.escape(example['model'])}: {html.escape(example['kind'])}" for example in reading["examples"]]
    for k, example in enumerate(reading["examples"]):
        parts += [f"<h3>{titles[k]}</h3>"] if titles[k] not in titles[:k] else []
        parts.append(f"<pre class=said>{html.escape(example['text'])}</pre>")
    if reading["examples"]:
        parts.append("<p class=note>As the model reads them, special tokens included; not chosen by content.</p>")
    return parts
