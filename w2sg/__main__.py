"""``python -m w2sg``: the command ``w2sg``."""

import sys
from pathlib import Path

if not __package__:  # started by the folder's path, as the processes of a run are: no module here is a top one
    sys.path[:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from w2sg.cli.main import main

if __name__ == "__main__":
    main()
