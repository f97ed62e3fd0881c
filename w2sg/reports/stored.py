"""What every report.json holds, whichever method wrote it: whether a file is one."""

from __future__ import annotations

from typing import Any

NEEDED = {"metrics": dict, "config": dict, "diagnostics": dict, "stages": list}  # in every report.json
MAYBE = ("summary", "text", "decoding", "refinement")


def no_report(content: Any) -> str | None:
    """What is of another kind than in every report; None where all is as it should be."""
    words = {dict: "object", list: "list"}
    if not isinstance(content, dict):
        return "it holds no object"
    kinds = {k: kind for k, kind in NEEDED.items() if k in content}
    kinds |= {k: dict for k in MAYBE if content.get(k) is not None}
    wrong = [f"{key} is no {words[kind]}" for key, kind in kinds.items() if not isinstance(content[key], kind)]
    return ", ".join(wrong) or None
