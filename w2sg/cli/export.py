"""One trained model of a finished run as an ordinary transformers folder: `python evaluate.py export=RUN to=FOLDER`."""

from __future__ import annotations

from pathlib import Path

from w2sg.console import Plain
from w2sg.errors import UserError
from w2sg.models.export import export_model
from w2sg.models.finished import find_finished, kind_of


def print_export(place: Path, to: Path, system: str | None, out: Path, root: Path, console: Plain) -> None:
    """Export, and say what was written.

    Raises:
        UserError: as `find_trained` and `export_model`; or ``place`` is a saved model already.
    """
    if kind_of(place, "export") == "model":
        raise UserError(f"export: {place} is a saved model already; name a finished run, or a stage of a store")
    trained = find_finished(place, system, out, root)
    files = export_model(trained, to)
    size = sum(file.stat().st_size for file in files) / 1e6
    stage = "as it was found" if trained.folder is None else trained.folder.name
    console.say(f"{trained.name} ({stage}) of {trained.spec.name} written to {to}: {len(files)} files, {size:.1f} MB")
