"""Run one weak-to-strong experiment: ``python train.py loss=rkl weak=gpt2 strong=gpt2-xl``, as ``w2sg train`` does."""

from w2sg import stops
from w2sg.cli.train import main

if __name__ == "__main__":
    with stops.command(last=True):
        main()
