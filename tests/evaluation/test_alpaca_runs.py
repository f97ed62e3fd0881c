"""Runs that write leave their replies for the alpaca_eval tool, whatever the method."""

import json

import pyarrow.parquet as pq
import pytest
from runs import CONG_SMALL, cong_arguments, run_cong


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return cong_arguments(pairs_folder, models)


def test_trained_models_are_exported_as_decoders_are(arguments, tmp_path):
    run_cong(arguments, tmp_path, *CONG_SMALL, "method.judge.model=null", "method.evaluation.prompts=3")
    folder = tmp_path / "run" / "alpaca_eval"
    assert {file.stem for file in folder.iterdir()} == {"base", "weak", "cong_s", "cong"}
    rows = json.loads((folder / "cong.json").read_text())
    assert {row["generator"] for row in rows} == {"run:cong"}
    samples = pq.read_table(tmp_path / "run" / "samples.parquet").to_pylist()
    assert [row["output"] for row in rows] == [s["reply"] for s in samples if s["system"] == "cong"]
