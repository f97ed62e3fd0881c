"""All finished runs below a folder in one table and on one page: ``w2sg compare outputs``."""

from __future__ import annotations

from pathlib import Path

from w2sg.console import Plain


def gather(runs: Path, console: Plain) -> None:
    """One page and one table over all finished runs below a folder; what cannot be used is named with the reason."""
    from w2sg.compare.collect import collect

    summary = collect(runs)
    files = summary.write(runs)
    summary.show(console)
    console.say("written: " + ", ".join(map(str, files)))
