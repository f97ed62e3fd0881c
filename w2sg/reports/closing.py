"""The last lines of a run on the terminal: what came out, where the page is, and which command to try next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2sg import progress
from w2sg.config.programs import command
from w2sg.console import Plain
from w2sg.live import clock
from w2sg.reports.words import folded

LOSSES, SEEDS = "ce,rkl,conf_ce", "0,1,2"
_notes_said: set[str] = set()  # of the runs of this process


def notes(content: Mapping[str, Any]) -> list[str]:
    """What a user must know of a run; the runs of a sweep share most of it, and it is said once."""
    lines = [line for line, _ in folded([*content["warnings"], *content.get("unread", ())])]
    if progress.sweep() is None:
        return lines
    fresh = [line for line in lines if line not in _notes_said]
    _notes_said.update(fresh)
    return fresh


def show_closing(content: Mapping[str, Any], out: Path, typed: Sequence[str], console: Plain) -> None:
    """Print what stands below the tables of a run; of a run in a sweep, its one line."""
    place, seconds = progress.sweep(), progress.elapsed()
    took = "" if seconds is None else f" in {clock(seconds)}"
    if place is not None:
        parts = [place.place, place.label, *result(content), "" if seconds is None else clock(seconds)]
        console.say(" · ".join(filter(None, parts)))
        return
    if content["verdict"]:
        console.say(content["verdict"], words=True)
    found = sum(stage["cached"] for stage in content["stages"])
    console.say(f"report: {relative(out / 'report.html')}")
    for line in next_commands(content, out, typed):
        console.say(f"next: {line}")
    console.say(f"{len(content['stages'])} stages{took}, {found} of them found in the store")


def result(content: Mapping[str, Any]) -> list[str]:
    """The numbers of a run in a few words: accuracy and PGR, or the first columns of its summary."""
    student = content["metrics"].get("student", {}).get("accuracy")
    if student is None:
        columns = [(name, v["value"]) for name, v in content["summary"].items() if v["value"] is not None]
        return [f"{name} {value:.3f}" for name, value in columns[:2]]
    pgr = content.get("pgr", {})
    if pgr.get("value") is None or not pgr.get("resolved", True):
        return [f"accuracy {student:.3f}", "PGR not resolved"]
    ends = [pgr.get("low"), pgr.get("high")]
    interval = "" if None in ends else " [{:.2f}, {:.2f}]".format(*ends)
    return [f"accuracy {student:.3f}", f"PGR {pgr['value']:.2f}{interval}"]


def next_commands(content: Mapping[str, Any], out: Path, typed: Sequence[str]) -> list[str]:
    """Commands that are worth trying after this one, each to be typed as it is."""
    compare = command("compare", shlex.quote(relative(out.parent)))
    words = [shlex.quote(word) for word in typed if not _is(word, "seed")]
    if "decoding" in content:
        kept = [word for word in words if not _is(word, "decoder")]
        if len(words) == len(kept):  # an experiment chose the decoder, with options that another may not have
            return [compare]
        other = "search" if content["decoding"]["decoder"]["kind"] != "search" else "best_of_n"
        return [command("decode", f"decoder={other}", *kept), compare]
    losses = [] if content["method"] != "finetune" else [f"loss={LOSSES}"]
    kept = [word for word in words if not (losses and _is(word, "loss"))]
    return [command("train", "-m", *kept, *losses, f"seed={SEEDS}"), compare]


def _is(word: str, group: str) -> bool:
    key = word.strip("'").lstrip("+~").partition("=")[0]
    return key == group or key.startswith(f"{group}.")


def relative(path: Path) -> str:
    """A path from the working folder, where that is shorter.

    >>> relative(Path.cwd() / "outputs")
    'outputs'
    """
    inside = os.path.relpath(path)
    return inside if len(inside) < len(str(path)) else str(path)
