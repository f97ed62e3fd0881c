"""Colours of figures can be told from the page and from each other, in both schemes, with any kind of sight."""

import doctest
from itertools import combinations

import numpy as np
import pytest

from w2sg.compare import label_figures
from w2sg.reports import colours, figures, words
from w2sg.reports.colours import COLOURS, DARK, NOTE, PALETTE, PAPER, assigned

# What is left of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "full": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
SCHEMES = {"light": {colour: colour for colour in DARK}, "dark": DARK}


def linear(colour):
    parts = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """WCAG 2.2: the ratio of relative luminances."""
    low, high = sorted(linear(colour) @ XYZ[1] for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    scaled = XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_stand_out_from_the_page_and_from_each_other(scheme):
    shown = SCHEMES[scheme]
    assert all(contrast(shown[colour], shown[PAPER]) >= 3 for colour in PALETTE)
    assert contrast(shown[NOTE], shown[PAPER]) >= 4.5  # text
    for seen in SIGHT.values():
        places = {colour: lab(np.array(seen) @ linear(shown[colour])) for colour in PALETTE}
        assert min(np.linalg.norm(places[a] - places[b]) for a, b in combinations(PALETTE, 2)) > 7


def test_names_of_one_page_share_no_colour_while_there_are_enough():
    given = assigned(["weak", "student", "ceiling", "link 1", "link 2", "link 3"])
    assert len(set(given.values())) == 6
    assert given["student"] == COLOURS["student"]
    assert assigned(["student", "a", "b"]) == assigned(["student", "a", "b", "a"])
    assert len(assigned(map(str, range(30)))) == 30


def test_examples_of_words_and_figures_hold():
    results = [doctest.testmod(module) for module in (words, colours, figures, label_figures)]
    assert [result.failed for result in results] == [0] * 4
    assert all(result.attempted for result in results)
