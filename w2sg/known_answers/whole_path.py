"""An experiment with every number known, from a file of pairs through a run's report to the summary of many runs.

A pair of words decides each pair. The weak model learns them from ground truth. The student learns them from the weak
model's labels of other rows, and the ceiling from gold labels of those. So the words that a model saw decide where it
is right:

====  =======================================  ======  =======  =======
kind  the pair is decided by                   weak    student  ceiling
====  =======================================  ======  =======  =======
A     words that all have seen                 right   right    right
B     words that ground truth teaches wrongly  wrong   wrong    right
C     words that all have seen, beside others
      that mislead who has seen these (weak)   wrong   right    right
F     as C, with the other gold label          right   wrong    wrong
====  =======================================  ======  =======  =======

Prompts have two pairs each, of different kinds, so tests are over prompts.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.stats import norm

from w2sg.config.check import check
from w2sg.config.hydra import register
from w2sg.config.plugins import CONF, shipped_alone
from w2sg.data.splits import load_tables
from w2sg.known_answers.bench import Bench, write_rows
from w2sg.known_answers.result import Findings, known
from w2sg.metrics import labels as metrics

# prompts of the test split by the kinds of their two pairs
PROMPTS = {"AA": 20, "AC": 9, "CC": 4, "BB": 5, "AF": 3, "CF": 2}
RIGHT = {"weak": "AF", "student": "AC", "ceiling": "ABC"}

TAUGHT = {"ground_truth": {"A": 60, "B": 60, "C": 12, "G": 100}, "transfer": {"A": 60, "b": 60, "C": 60}}
WORDS = {  # of the chosen and of the rejected reply
    "A": ("apple", "acorn"),
    "B": ("birch", "beech"),
    "C": ("cedar", "cress"),
    "G": ("grape", "gorse"),
    "M": ("cedar gorse", "cress grape"),
}
# how a test row is made; of B the gold label is the opposite of what ground truth taught
OF_TEST = {"A": "A", "B": "b", "C": "M", "F": "m"}
EPOCHS = (16, 17)  # two settings, so that Holm has two tests; two losses with equal predictions would count once


def pair(prompt: str, kind: str, number: int) -> dict[str, str]:
    """One row. A small letter is the same kind with the other gold label."""
    replies = [f"{prompt} filler{number} {words}" for words in WORDS[kind.upper()]]
    chosen, rejected = replies if kind.isupper() else replies[::-1]
    return {"chosen": chosen, "rejected": rejected}


def write_splits(folder: Path) -> dict[str, str]:
    """Write the three files. Returns the kind of each test row by its chosen text."""
    number, kinds = itertools.count(), {}
    for split, taught in TAUGHT.items():
        rows = []
        for kind, count in taught.items():
            for k in range(count // 2):
                prompt = f"\n\nHuman: {split} {kind}{k}?\n\nAssistant:"
                rows += [pair(prompt, kind, next(number)) for _ in range(2)]
        write_rows(folder / f"{split}.jsonl", rows)
    rows = []
    for two, count in PROMPTS.items():
        for k in range(count):
            prompt = f"\n\nHuman: test {two}{k}?\n\nAssistant:"
            for kind in two:
                rows.append(pair(prompt, OF_TEST[kind], next(number)))
                kinds[rows[-1]["chosen"]] = kind
    write_rows(folder / "test.jsonl", rows)
    return kinds


def configured(*overrides: str) -> Any:
    """The configuration that the command line would compose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    around, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # an outer command continues
    try:
        with shipped_alone():  # a user's conf/ would change what the answers are known for
            register()
            with initialize_config_dir(str(CONF), version_base="1.3"):
                return check(compose("train", overrides=list(overrides)))
    finally:
        GlobalHydra.instance().hydra = around


@known(source="planted; sign flips counted one by one")
def whole_path(bench: Bench) -> Findings:
    """From a file of pairs to report.json and summary.json every number is the planted one."""
    from w2sg.compare.collect import collect
    from w2sg.experiment import run

    facts, out = Findings(), bench.folder / "runs"
    kinds = write_splits(bench.folder / "pairs")
    for epochs in EPOCHS:
        config = configured(
            "loss=ce",
            "dataset=local",
            f"dataset.path={bench.folder / 'pairs'}",
            "dataset.zero_shot=null",
            "weak=bow",
            "strong=bow",
            "weak.epochs=16",
            f"strong.epochs={epochs}",
            "trainer=cpu",
            "trainer.progress=none",
            "logger=none",
            f"out={out}",
            f"store={bench.folder / 'whole-store'}",
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run.run_method(config, out / str(epochs), [])
        _of_run(facts, out / str(epochs), config, kinds, f"{epochs} epochs")
    collect(out).write(out)
    _of_summary(facts, json.loads((out / "summary.json").read_text(encoding="utf-8")))
    _prior(facts)
    return facts


def sign_flips(differences: list[int]) -> float:
    """Exact p by enumerating all 2^G sign flips."""
    sizes = np.array([d for d in differences if d])
    signs = np.array(list(itertools.product((1, -1), repeat=len(sizes))))
    return float((np.abs(signs @ np.abs(sizes)) >= abs(sizes.sum())).mean())


def expected_p() -> float:
    """p of student against weak model, over prompts."""
    worth = {"A": 0, "B": 0, "C": 1, "F": -1}
    return sign_flips([sum(worth[kind] for kind in two) for two, count in PROMPTS.items() for _ in range(count)])


def _of_run(facts: Findings, folder: Path, config: Any, kinds: dict[str, str], words: str) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = [kind for two, count in PROMPTS.items() for kind in two * count]
    accuracy = {m: float(np.mean([kind in right for kind in rows])) for m, right in RIGHT.items()}
    why = "planted: the words that a model saw decide where it is right"
    for model, value in accuracy.items():
        facts.add(f"accuracy of {model}, {words}", value, report["metrics"][model]["accuracy"], 1e-9, why)
    pgr = (accuracy["student"] - accuracy["weak"]) / (accuracy["ceiling"] - accuracy["weak"])
    facts.add(f"PGR in report.json, {words}", pgr, report["pgr"]["value"], 1e-9, why)
    test = report["tests"]["student - weak"]
    facts.add(f"p over prompts, {words}", expected_p(), test["p"], 1e-9, "all sign flips of 16 prompts, one by one")
    for who, kind in (("student", "C"), ("other", "F")):
        facts.add(f"rows that {who} alone has right, {words}", rows.count(kind), test[f"only_{who}"], 0, why)
    within = report["data"]["prompts_within_test"]
    facts.add(f"prompts of the test split, {words}", sum(PROMPTS.values()), within["prompts"], 0, "counted")
    # predictions, joined by id with the texts, kind by kind
    test_table = load_tables(config.dataset.model_dump(by_alias=True), config.seed).test
    better = np.where(test_table.labels == 0, test_table.first, 1 - test_table.first)
    kind_of = {i: kinds[t[b]] for i, t, b in zip(test_table.ids, test_table.texts, better, strict=True)}
    gold = dict(zip(test_table.ids, test_table.labels.tolist(), strict=True))
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    truth = np.array([gold[i] for i in table["id"]])
    facts.add(f"orientations, {words}", 2, len(set(truth.tolist())), 0, "either reply comes first")
    for model, right in RIGHT.items():
        logits = np.array(table[model])
        hits = (logits < 0) == (truth == 1)
        wrong = sum((kind_of[i] in right) != hit for i, hit in zip(table["id"], hits, strict=True))
        facts.add(f"rows on which {model} is not as planted, {words}", 0, wrong, 0, why)
        signed = np.where(truth == 0, logits, -logits)
        nll = np.logaddexp(0, -signed).mean()
        facts.add(f"NLL of {model}, {words}", nll, report["metrics"][model]["nll"], 1e-5, "from predictions.parquet")
        sure = 1 / (1 + np.exp(-np.abs(logits)))
        place = np.minimum(np.ceil(sure * 15).astype(int), 15)
        ece = sum(abs((sure - hits)[place == k].sum()) for k in np.unique(place)) / len(truth)
        facts.add(f"ECE of {model}, {words}", ece, report["metrics"][model]["ece"], 1e-5, "15 bins, from the same")


def _of_summary(facts: Findings, summary: dict[str, Any]) -> None:
    entries = summary["student_against_teacher"]
    facts.add("cells of the summary", len(EPOCHS), len(entries), 0, "two settings")
    for entry, row in zip(entries, summary["cells"], strict=True):
        p = expected_p()
        words, why = entry["setting"], f"Holm: {len(EPOCHS)} tests of equal p"
        facts.add(f"p in summary.json, {words}", p, entry["p"], 1e-9, "as in the report")
        facts.add(f"corrected p, {words}", min(1.0, len(EPOCHS) * p), entry["p_holm"], 1e-9, why)
        facts.add(f"PGR in summary.json, {words}", 14 / 24, row["pgr"]["value"], 1e-9, "14 of 24 rows")


def _prior(facts: Findings) -> None:
    """A model that predicts the prior, .9, for 1,000 rows. Its NLL is the entropy, and it is calibrated."""
    labels = torch.arange(1000) % 10 // 9  # every tenth is of the second class
    logits = torch.tensor([[np.log(0.9), np.log(0.1)]]).expand(1000, 2)
    got = metrics.measure(logits, labels)
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    for name, value in (("accuracy", 0.9), ("nll", entropy), ("ece", 0.0), ("brier", 0.09), ("overconfidence", 0.0)):
        facts.add(f"{name} of a model that says a prior of .9", value, got[name], 2e-5, "closed form; bins in fp32")
    # normal scores one standard deviation apart
    draw = np.random.default_rng(5)
    truth = torch.tensor(draw.random(20000) < 0.1).long()
    score = torch.tensor(draw.normal(size=20000)) + truth
    area = metrics.measure(torch.stack([-score, torch.zeros(20000)], 1), truth)["auroc"]
    facts.add("AUROC of two normals, prior .9", norm.cdf(0.5**0.5), area, 0.025, "4 s.e. of 2,000 rows of one class")
