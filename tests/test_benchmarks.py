"""The benchmarks run; what they measure is written down, not tested."""

import subprocess
import sys

from conftest import ROOT


def test_reward_training_runs_small():
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "reward_training.py"), "--pairs", "8", "--layers", "1", "--width",
         "64", "--repeats", "1"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name in ("plain, micro-batch 1", "plain, micro-batch 32", "w2sg"):
        assert name in result.stdout
