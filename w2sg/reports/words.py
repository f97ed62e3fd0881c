"""Numbers as text: with their intervals, in sentences, and as cells of tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LEVEL = 0.05  # of tests: where p lies below it a difference is called resolved
NONE: dict[str, Any] = {"value": None, "low": None, "high": None}
SHOWN = 6  # prompts whose replies stand on a page
PROMPTS_ALONE = (
    "95 % intervals over test prompts, of one run: other seeds and training rows add to them. “Not resolved”: "
    "the interval includes no difference."
)


class Cell(NamedTuple):
    """A cell of a table on a page.

    Attributes:
        text: what it says. below: what stands under it in small letters.
        kind: "said" for a text that a model wrote (scrolls, keeps its lines), or a class of the style sheet.
        first, first_kind: the part of a text that comes first, and its class.
    """

    text: str
    below: str = ""
    kind: str = ""
    first: str = ""
    first_kind: str = ""


def short(name: str) -> str:
    """The last part of a model's name."""
    return name.rstrip("/").rpartition("/")[2]


def loss_name(target: str) -> str:
    """A loss by its dotted path: those of w2sg by their last name, others by all of it, since two may end alike."""
    return target.rpartition(".")[2] if target.startswith("w2sg.") else target


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, f"{'+' if sign else ''}.{digits}f")


def estimate(measured: Mapping[str, Any], digits: int = 3, sign: bool = False) -> str:
    """``value [low, high]``."""
    inside = f" [{number(measured['low'], digits, sign)}, {number(measured['high'], digits, sign)}]"
    return number(measured["value"], digits, sign) + (inside if measured["value"] is not None else "")


def spoken(measured: Mapping[str, Any] | float | None, digits: int = 3) -> str:
    """``value (low to high)``, for those who hear a figure."""
    found = measured if isinstance(measured, Mapping) else {"value": measured}
    if found["value"] is None:
        return "unknown"
    ends = [found.get(end) for end in ("low", "high")]
    inside = "" if None in ends else " ({} to {})".format(*(number(end, digits) for end in ends))
    return number(found["value"], digits) + inside


NOUNS = {"reply": "replies"} | {
    noun: f"{noun}s"
    for noun in (
        *("row", "run", "prompt", "example", "sample", "context", "pair", "cell", "setting", "check", "seed", "split"),
        *("label", "answer", "text", "number", "stage", "file", "question", "difference", "step"),
    )
}
_NOUN = re.compile(rf"\b({'|'.join([*NOUNS, *NOUNS.values()])})\b")


def counted(count: int, what: str) -> str:
    """A number and what it counts; the first noun of `NOUNS` in it is singular or plural, whichever was given.

    >>> counted(1, "identical replies"), counted(2, "prompt longer than max_length"), counted(1, "rows")
    ('1 identical reply', '2 prompts longer than max_length', '1 row')
    """
    one = {plural: noun for noun, plural in NOUNS.items()}

    def agree(found: re.Match) -> str:
        noun = one.get(found[0], found[0])
        return noun if count == 1 else NOUNS[noun]

    return f"{count:,} {_NOUN.sub(agree, what, count=1)}"


def judged(measured: Mapping[str, Any], null: float, digits: int = 3, sign: bool = False) -> str:
    """An estimate, and whether its interval keeps clear of ``null``."""
    if measured["value"] is None:
        return "not estimable"
    resolved = measured["low"] is not None and (measured["low"] > null or measured["high"] < null)
    return estimate(measured, digits, sign) + ("" if resolved else " (not resolved)")


def stacked(measured: Mapping[str, Any], digits: int = 3, sign: bool = False, kind: str = "f") -> Cell:
    """A table's cell: the number, and its interval below; ``kind`` is "f" or "%"."""
    value, low, high = (
        "–" if measured[key] is None else format(measured[key], f"{'+' if sign else ''},.{digits}{kind}")
        for key in ("value", "low", "high")
    )
    return Cell(value, "" if measured["low"] is None else f"{low} to {high}")


def wilson(rate: float, count: int) -> dict[str, float]:
    """A share of ``count`` with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    ends = binomtest(round(rate * count), count).proportion_ci(method="wilson")
    return {"value": rate, "low": ends.low, "high": ends.high}


def p_value(p: float) -> str:
    """To three digits, without a 0 in front."""
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def p_text(p: float) -> str:
    """``= .012`` or ``< .001``."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as rows of a table; empty values are left out."""
    rows = []
    for key, value in facts.items():
        if value is None or value == {} or value == []:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict):
            text = ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items())
        rows.append((key.replace("_", " "), text))
    return rows


def pgr_sentence(pgr: Mapping[str, Any]) -> str:
    """The performance gap recovered, or that there is no gap to speak of."""
    gap = "gap " + estimate({"value": pgr["gap"], "low": pgr["gap_low"], "high": pgr["gap_high"]}, sign=True)
    if not pgr["resolved"]:
        no_gap = pgr["gap_high"] is not None and pgr["gap_high"] < 0
        return f"performance gap recovered: {'no gap' if no_gap else 'gap not resolved'} ({gap})"
    return f"performance gap recovered: {estimate(pgr, 2)} ({gap})"


# ---------------------------------------------------------------------------------------------------------------------
# What a reader must know, wherever it is found
# ---------------------------------------------------------------------------------------------------------------------


def cut_off_warning(
    shares: Mapping[str, float], what: str = "replies", systems: Mapping[str, Mapping[str, Any]] | None = None
) -> list[str]:
    """That many replies were cut off.

    Args:
        shares: of each system's replies, by its name in words.
        what: the replies in words.
        systems: what was measured of each; a ``reward`` or verdicts (``against``) are then of unfinished text.
    """
    many = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > 0.2)
    if not many:
        return []
    measured = {key for system in (systems or {}).values() for key, value in system.items() if value}
    opinion = "rewards" if "reward" in measured else "verdicts" if "against" in measured else ""
    consequence = f", so that {opinion} are of unfinished text" if opinion else ""
    return [f"{what} cut off at max_new_tokens{consequence}: {many}"]


def unjudged(measured: Mapping[str, Any]) -> str:
    """That a win rate is not of all prompts, to stand behind it; nothing where it is.

    Args:
        measured: of one system over another: ``prompts`` that have a verdict, ``without_verdict`` that have none.
    """
    if not (lost := measured.get("without_verdict", 0)):
        return ""
    return f" on the {measured['prompts']:,} of {counted(measured['prompts'] + lost, 'prompts')} with a verdict"


def wins_cell(measured: Mapping[str, Any], key: str = "win_rate") -> Cell:
    """A table's cell: a win rate with its interval, and how many prompts it is of where some have no verdict."""
    cell, of = stacked(measured.get(key, NONE)), unjudged(measured)
    return cell._replace(below=f"{cell.below}{of}") if of else cell


def no_verdict_warning(over: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Prompts on which the judge came to no verdict.

    Args:
        over: what was measured of one system over another, by what both are called.
    """
    parts = [
        f"{name}, {lost:,} of {counted(measured['prompts'] + lost, 'prompts')}"
        for name, measured in over.items()
        if (lost := measured.get("without_verdict"))
    ]
    return (
        [f"the judge came to no verdict, and win rates are of the other prompts: {'; '.join(parts)}"] if parts else []
    )


CUT, LEFT_OUT = "longer than max_length and cut, ends of replies included", "left out"


def left_out_warning(dropped: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What was left out on the way to each stage."""
    lines = []
    for name, counts in dropped.items():
        if cut := counts.get("cut to max_length (kept)"):
            lines.append(f"{name}: {counted(cut, 'example')} {CUT}")
        if lost := [counted(n, reason) for reason, n in counts.items() if "(kept)" not in reason]:
            lines.append(f"{name}: {LEFT_OUT} {', '.join(lost)}")
    return lines


def folded(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Lines by their cause: what to read first, and all that say it.

    Lines are of one cause where they differ only in what they begin with (a stage, a folder) and in their numbers.

    >>> folded(["a: left out 1 row", "b: left out 2 rows", "another"])  # doctest: +NORMALIZE_WHITESPACE
    [('a: left out 1 row (and 1 more of the same cause)',
      ['a: left out 1 row', 'b: left out 2 rows']), ('another', ['another'])]
    """
    groups: dict[str, list[str]] = {}
    for line in lines:
        _, colon, rest = line.partition(": ")
        same = _NOUN.sub("", re.sub(r"[+-]?\d[\d,.]*%?", "", rest)) if colon else line
        groups.setdefault(same, []).append(line)
    return [
        (alike[0] + (f" (and {len(alike) - 1} more of the same cause)" if len(alike) > 1 else ""), alike)
        for alike in groups.values()
    ]


def overlap_warning(overlaps: Mapping[str, int]) -> list[str]:
    """That splits share prompts."""
    shared = {k: v for k, v in overlaps.items() if v}
    return ["prompts shared between splits: " + ", ".join(f"{k} {v}" for k, v in shared.items())] if shared else []


def position_warning(seen: Mapping[str, Any]) -> list[str]:
    """That a judge goes by position, or does not answer what it is asked.

    Args:
        seen: of verdicts that were asked for in both orders: ``position_bias``, ``flips`` and ``label_mass``.
    """
    lines = []
    bias = seen.get("position_bias")
    if bias and (bias["low"] > 0 or bias["high"] < 0):
        side = "first" if bias["value"] > 0 else "second"
        lines.append(
            f"the judge prefers what it is shown {side} (by {abs(bias['value']):.3f}; {seen['flips']:.0%} of its "
            "verdicts change with the order); both orders are averaged"
        )
    if seen.get("label_mass", 1) < 0.5:
        lines.append(
            f"the judge gives {seen['label_mass']:.1%} of its probability to the two answers that it is asked for: it "
            "may not understand the question"
        )
    return lines
