"""Many finished runs as one table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def runs(folder: str | Path) -> pd.DataFrame:
    """A row for each finished run below a folder: what ``w2sg compare FOLDER`` writes to summary.csv.

    Columns say which run it is (``method``, ``folder``, ``split_seed``, ``seed``, ``setting``, ``loss``), then what
    its report measured. A run without a measure has NaN there. What cannot be used is logged as a warning, and stands
    in ``.attrs["left_out"]``.

    Args:
        folder: that runs were written to, as ``outputs``.

    Raises:
        UserError: no folder, or no finished run in it.
    """
    import pandas as pd

    from w2sg.compare.collect import collect

    summary = collect(Path(folder).expanduser())
    names, *lines = summary.lines
    table = pd.DataFrame([[None if value == "" else value for value in line] for line in lines], columns=names)
    table.attrs["left_out"] = list(summary.content["left_out"])
    for line in table.attrs["left_out"]:
        log.warning("left out: %s", line)
    return table
