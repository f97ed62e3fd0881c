"""Colours of figures: one for each system, decoder or loss on all of a page, in the light and the dark scheme.

They differ in lightness as well as in hue, so that they stay apart for readers who see fewer colours, and each stands
out from the page by 3 to 1 at least (WCAG 2.2, 1.4.11); a test measures both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BLUE, ORANGE, TEAL, MAUVE, PLUM = "#2563eb", "#d25a00", "#0f766e", "#b45fb4", "#4b0f3c"
OLIVE, NAVY, RED, SLATE, BROWN = "#5f6400", "#1e3a8a", "#a50f2f", "#64748b", "#3f2a14"
PALETTE = (BLUE, ORANGE, TEAL, MAUVE, PLUM, OLIVE, NAVY, RED, SLATE, BROWN)
MARKERS = "osD^vPXp*h"  # for points beside the colours

INK, PAPER, NOTE, FAINT = "#000000", "#ffffff", "#475569", "#94a3b8"  # text and axes, ground, notes, grids
ON_DARK, ON_LIGHT = "#fefefe", "#0a0a0a"  # text on cells of a heat map, the same in both schemes

COLOURS = {
    "weak": SLATE,
    "student": BLUE,
    "ceiling": PLUM,
    "zero_shot": ORANGE,
    "length": RED,
    # of methods whose models write
    "base": ORANGE,
    "cong": BLUE,
    "cong_s": MAUVE,
    "weak_sft": TEAL,
    "plain": OLIVE,
    "aux_conf": NAVY,
    "wspo": BROWN,
    "guide": SLATE,
    "naive": TEAL,
    "icl": MAUVE,
    "self": OLIVE,
    "self_cot": NAVY,
    "shuffled": RED,
    "gold_exemplars": BROWN,
    # of rewards
    "implicit_per_token": OLIVE,
    "explicit": MAUVE,
}

# What each colour of a figure is on a dark page.
DARK = {
    INK: "#e2e8f0",
    PAPER: "#0f172a",
    NOTE: "#b6c2d2",
    FAINT: "#64748b",
    BLUE: "#6ea8ff",
    ORANGE: "#f5813a",
    TEAL: "#0fa18e",
    MAUVE: "#b56fe0",
    PLUM: "#f5b8e0",
    OLIVE: "#e6d04c",
    NAVY: "#5b6ee8",
    RED: "#ff5c7a",
    SLATE: "#94a3b8",
    BROWN: "#8f6a45",
}


def variable(colour: str) -> str:
    """The custom property that holds a colour on the page."""
    return f"--c{colour[1:]}"


def ink_on(red: float, green: float, blue: float, *_: float) -> str:
    """Text on a cell of this colour: the one of two that stands out more, by 4.5 to 1 at least (WCAG 2.2, 1.4.3)."""
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue))
    luminance = sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return ON_DARK if luminance < 0.18 else ON_LIGHT


class Look(NamedTuple):
    """How a system is drawn where many stand in one figure; ``key`` is the number beside its points."""

    colour: str
    marker: str
    key: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each of the names that stand on one page."""
    return {
        name: Look(colour, MARKERS[k % len(MARKERS)], str(k + 1))
        for k, (name, colour) in enumerate(assigned(names).items())
    }


def assigned(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of the names that stand on one page: its own where it has one, or the next that is free.

    With more names than colours, colours are given out again from the start.

    >>> assigned(["student", "link 1", "link 2"])
    {'student': '#2563eb', 'link 1': '#d25a00', 'link 2': '#0f766e'}
    """
    known = list(dict.fromkeys(names))
    taken = {COLOURS[name] for name in known if name in COLOURS}
    free = [colour for colour in PALETTE if colour not in taken] or list(PALETTE)
    others = [name for name in known if name not in COLOURS]
    given = {name: free[k % len(free)] for k, name in enumerate(others)}
    return {name: COLOURS.get(name) or given[name] for name in known}
