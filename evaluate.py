"""Measure a decoder, ``python evaluate.py decoder=search strong=... weak=...``, or look at what runs left behind.

``runs=outputs`` gathers finished runs, ``store=list`` looks at their store, ``export=RUN`` writes a model of theirs,
``annotations=FILE`` reads what the alpaca_eval tool judged, ``known_answers=all`` runs experiments with known answers.
Each is a verb of the command ``w2sg``, too.
"""

from w2sg import stops
from w2sg.cli.evaluate import main

if __name__ == "__main__":
    with stops.command(last=True):
        main()
