"""The figures of docs/concepts: `python docs/figures/concepts.py` draws them; a test compares them with this file.

Each has a card behind it, so that it is legible on any page, and follows the reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

from w2sg.losses import cross_entropy, forward_kl, reverse_cross_entropy, reverse_kl

HERE = Path(__file__).resolve().parent
STYLE = """
.card{fill:#f8fafc;stroke:#cbd5e1} text{fill:#1e293b;font:14px system-ui,sans-serif} .small{font-size:12px}
.bold{font-weight:600} .mid{text-anchor:middle} .end{text-anchor:end} .quiet{fill:#475569}
.line{stroke:#475569;stroke-width:1.5;fill:none} .thin{stroke:#94a3b8;stroke-width:1;fill:none} .tip{fill:#475569}
.dash{stroke-dasharray:5 4}
.data{fill:#e2e8f0;stroke:#94a3b8} .weak{fill:#fde68a;stroke:#b45309} .strong{fill:#bfdbfe;stroke:#1d4ed8}
.gold{fill:#bbf7d0;stroke:#15803d} .plain{fill:#fff;stroke:#94a3b8}
.c1{stroke:#1d4ed8} .c2{stroke:#b45309} .c3{stroke:#15803d} .c4{stroke:#be185d} .curve{stroke-width:2.5;fill:none}
@media (prefers-color-scheme:dark){
.card{fill:#1e2433;stroke:#475569} text{fill:#e2e8f0} .quiet{fill:#a8b4c6} .line{stroke:#a8b4c6} .tip{fill:#a8b4c6}
.data{fill:#334155;stroke:#94a3b8} .weak{fill:#713f12;stroke:#fbbf24} .strong{fill:#1e3a8a;stroke:#60a5fa}
.gold{fill:#14532d;stroke:#4ade80} .plain{fill:#1e2433;stroke:#94a3b8}
.c1{stroke:#60a5fa} .c2{stroke:#fbbf24} .c3{stroke:#4ade80} .c4{stroke:#f472b6}}
"""


@dataclass
class Figure:
    """An SVG of fixed size, drawn from the top left; lengths are in pixels."""

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """A box with centred lines of text, the first one bold."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
        self.parts.append(f'<rect {shape} class="{kind}"/>')
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line, "mid" + (" small" if number else " bold"))

    def arrow(self, *points: tuple[float, float], kind: str = "line") -> None:
        """A line through points, which ends in a tip."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}" marker-end="url(#tip)"/>')

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        self.parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="7" class="{kind}" stroke-width="2"/>')

    def svg(self) -> str:
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                f'<defs>{tip}<path d="M0,0 L8,4 L0,8 z" class="tip"/></marker></defs>',
                f'<rect x="1" y="1" width="{self.width - 2}" height="{self.height - 2}" rx="10" class="card"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def splits() -> Figure:
    """Which model learns from which split."""
    figure = Figure("Three splits: who learns from which, and who is tested on which", 720, 300)
    for x, name, use in [
        (24, "weak_train", "ground truth"),
        (260, "transfer", "texts, and ground truth"),
        (496, "test", "ground truth"),
    ]:
        figure.box(x, 24, 200, 50, "data", name, use)
    figure.box(24, 120, 200, 50, "weak", "weak supervisor", "learns ground truth")
    figure.box(260, 120, 200, 50, "strong", "strong student", "learns weak labels")
    figure.box(260, 220, 200, 50, "gold", "strong ceiling", "learns ground truth")
    figure.box(496, 120, 200, 150, "plain", "accuracy", "of all three,", "on the same rows,", "which none has seen")
    figure.arrow((124, 74), (124, 118))
    figure.arrow((224, 145), (258, 145))
    figure.text(224, 192, "weak labels", "mid small quiet")
    figure.arrow((360, 74), (360, 118))
    figure.text(368, 101, "texts", "small quiet")
    figure.arrow((460, 49), (478, 49), (478, 245), (462, 245))
    figure.text(470, 206, "ground truth", "end small quiet")
    figure.arrow((596, 74), (596, 118))
    return figure


def pgr() -> Figure:
    """A gap that is recovered in part, and one that is not significant."""
    figure = Figure("PGR is the share of the weak-ceiling gap that the student recovers", 720, 300)

    def panel(left: float, title: str, accuracies: tuple[float, float, float]) -> list[float]:
        figure.text(left, 34, title, "bold")
        places = [left + (value - 0.6) * 780 for value in accuracies]
        for number, (name, kind, x) in enumerate(
            zip(("weak", "student", "ceiling"), ("weak", "strong", "gold"), places, strict=True)
        ):
            y = 70 + 38 * number
            figure.text(left, y + 4, name, "small quiet")
            figure.line((x - 24, y), (x + 24, y))
            for end in (x - 24, x + 24):
                figure.line((end, y - 5), (end, y + 5))
            figure.dot(x, y, kind)
        figure.line((left, 176), (left + 312, 176), kind="thin")
        for tick in range(5):
            figure.text(left + 78 * tick, 192, f"{0.6 + tick / 10:.1f}", "mid small quiet")
        return places

    low, got, high = panel(30, "The gap is significant", (0.72, 0.80, 0.88))
    panel(384, "The gap is within noise", (0.84, 0.85, 0.86))
    for end, y, words in [(got, 216, "student − weak = 0.08"), (high, 240, "the gap = 0.16")]:
        figure.line((low, y), (end, y))
        for x in (low, end):
            figure.line((x, y - 4), (x, y + 4))
        figure.text(end + 8, y + 4, words, "small")
    figure.text(30, 276, "PGR = 0.08 / 0.16 = 0.5", "bold")
    figure.text(384, 220, "A gap that may be zero divides into any", "small")
    figure.text(384, 240, "number, so no PGR is reported.", "small")
    figure.text(384, 276, "The report says “gap not resolved”", "bold")
    return figure


def stages() -> Figure:
    """Two runs that share all stages but one."""
    figure = Figure("Two runs share every stage but the student", 720, 300)
    figure.text(24, 34, "train.py loss=ce", "bold")
    figure.text(24, 270, "train.py loss=rkl", "bold")
    shared = [("features", "of the strong model", "data"), ("weak", "fit on weak_train", "weak")]
    shared += [("weak labels", "of transfer", "weak"), ("ceiling", "fit on transfer", "gold")]
    figure.box(184, 92, 342, 120, "plain")
    for number, (name, what, kind) in enumerate(shared):
        figure.box(194 + 164 * (number % 2), 100 + 54 * (number // 2), 156, 48, kind, name, what)
    figure.text(24, 140, "The store", "bold")
    figure.text(24, 160, "computed by the", "small quiet")
    figure.text(24, 176, "first run, found", "small quiet")
    figure.text(24, 192, "by the second", "small quiet")
    for y, loss, start in [(22, "ce", 92), (230, "rkl", 212)]:
        figure.box(358, y, 150, 48, "strong", "student", f"loss={loss}")
        figure.box(546, y, 150, 48, "plain", "report.html", "and report.json")
        figure.arrow((508, y + 24), (544, y + 24))
        figure.arrow((433, start), (433, y + 50 if y < 92 else y - 2), kind="line" if y < 92 else "line dash")
    figure.text(442, 86, "computed", "small quiet")
    figure.text(442, 225, "cache hits", "small quiet")
    return figure


def losses() -> Figure:
    """Forward and reverse losses over the student's probability, from w2sg.losses themselves."""
    figure = Figure("Forward and reverse losses against a soft and a confident weak label", 720, 330)
    kinds: list[tuple[str, str, Callable]] = [("ce", "c1", cross_entropy), ("kl", "c3", forward_kl)]
    kinds += [("rce", "c2", reverse_cross_entropy), ("rkl", "c4", reverse_kl)]
    s = torch.linspace(0.01, 0.99, 99)
    for left, weak in ((56, 0.7), (398, 0.98)):
        figure.text(left, 34, f"weak label {weak:g}", "bold")
        figure.line((left, 50), (left, 260), (left + 290, 260), kind="thin")
        figure.text(left + 145, 294, "student's probability of the class", "mid small quiet")
        for tick in (0.0, 0.5, 1.0):
            figure.text(left + 290 * tick, 276, f"{tick:g}", "mid small quiet")
        for tick in (0, 1, 2, 3):
            figure.text(left - 8, 264 - 70 * tick, str(tick), "end small quiet")
        at = left + 290 * weak
        figure.line((at, 50), (at, 260), kind="thin dash")
        labels = torch.tensor([weak, 1 - weak]).log().expand(len(s), 2)
        for name, colour, loss in kinds:
            values = loss(torch.stack([s, 1 - s], 1).log(), labels).tolist()
            points = [(left + 290 * x, 260 - 70 * y) for x, y in zip(s.tolist(), values, strict=True) if y <= 3]
            dashed = " dash" if name in ("kl", "rkl") else ""
            figure.line(*points, kind=f"curve {colour}{dashed}")
    for number, (name, colour, _) in enumerate(kinds):
        x = 150 + 120 * number
        figure.line((x, 313), (x + 34, 313), kind=f"curve {colour}" + (" dash" if name in ("kl", "rkl") else ""))
        figure.text(x + 42, 318, name, "bold")
    figure.text(330, 34, "loss in nats", "end small quiet")
    return figure


def decoding() -> Figure:
    """Who writes which part of a reply."""
    figure = Figure("Who writes which part of a reply, decoder by decoder", 720, 330)
    rows = [
        ("sampling", "ssssssss", "the strong model alone"),
        ("best_of_n", "ssssssss", "n whole replies; the guide takes one"),
        ("search", "ss|ss|ss|ss", "at each bar the guide keeps the best W"),
        ("eft", "mmmmmmmm", "strong logits + β (tuned − untuned)"),
        ("wsd", "wwwsssss", "the guide drafts, the strong continues"),
        ("nudging", "wsswssws", "they alternate word by word"),
    ]
    fill = {"s": "strong", "w": "weak", "m": "gold"}
    for number, (name, reply, words) in enumerate(rows):
        y = 24 + 42 * number
        figure.text(24, y + 20, name, "bold")
        x = 120.0
        for letter in reply:
            if letter == "|":
                figure.line((x + 2, y - 2), (x + 2, y + 32))
                x += 8
            else:
                figure.box(x, y + 2, 30, 26, fill[letter])
                x += 34
        figure.text(432, y + 20, words, "small")
    legend = [("strong", "strong model, frozen"), ("weak", "small aligned model"), ("gold", "both, added")]
    for number, (kind, words) in enumerate(legend):
        figure.box(24 + 220 * number, 288, 26, 22, kind)
        figure.text(60 + 220 * number, 304, words, "small")
    return figure


FIGURES = {draw.__name__: draw for draw in (splits, pgr, stages, losses, decoding)}


def main() -> None:
    """Write every figure."""
    for name, draw in FIGURES.items():
        (HERE / f"concept_{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
