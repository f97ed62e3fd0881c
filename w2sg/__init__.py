"""w2sg: weak-to-strong generalization experiments as cached stages, composed by Hydra and trained by Lightning.

``__all__`` is the stable face for notebooks and programs. Its names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2sg import losses
    from w2sg.api.decoders import Writer, decoder
    from w2sg.api.report import Report, read_report
    from w2sg.api.runs import runs
    from w2sg.api.statistics import PGR, PairedTest, paired_test, pgr
    from w2sg.api.students import Student, load_student
    from w2sg.api.train import decode, train
    from w2sg.errors import UserError
    from w2sg.metrics.intervals import holm

__version__ = "0.1.0"

__all__ = [
    "PGR",
    "PairedTest",
    "Report",
    "Student",
    "UserError",
    "Writer",
    "decode",
    "decoder",
    "holm",
    "load_student",
    "losses",
    "paired_test",
    "pgr",
    "read_report",
    "runs",
    "train",
]

_MODULES = {
    "PGR": "api.statistics",
    "PairedTest": "api.statistics",
    "Report": "api.report",
    "Student": "api.students",
    "UserError": "errors",
    "Writer": "api.decoders",
    "decode": "api.train",
    "decoder": "api.decoders",
    "load_student": "api.students",
    "holm": "metrics.intervals",
    "paired_test": "api.statistics",
    "pgr": "api.statistics",
    "read_report": "api.report",
    "runs": "api.runs",
    "train": "api.train",
}


if not TYPE_CHECKING:  # which would take every name for one that is there

    def __getattr__(name: str) -> Any:
        if name == "losses":
            return importlib.import_module("w2sg.losses")
        if name not in _MODULES:
            raise AttributeError(f"module 'w2sg' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"w2sg.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
