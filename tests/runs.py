"""Small runs of every kind in this process: what is typed, and what they report.

Run as a script, this file is a rank that walks the runs of a plan: starting processes costs more than the runs do.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from commands import draw_where_wanted
from conftest import compose, start_ranks

from w2sg.config.check import check

DDP = ["trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
CONG_SIZES = {"ground_truth": 16, "transfer": 16, "test": 10}
CONG_SMALL = ["method.baselines=[]", "method.analysis.alphas=[]", "method.evaluation.kl=false"]
KINDS = ("sampling", "contrastive", "eft", "search", "best_of_n", "wsd")
DECODE_SMALL = {
    "search": ["decoder.beams=2", "decoder.children=2", "decoder.chunk=4"],
    "best_of_n": ["decoder.samples=3"],
    "wsd": ["decoder.draft=6", "decoder.check=2", "decoder.window=2", "decoder.threshold=0.02"],
}
QUICK = {"epochs": 2, "lr": 0.001}  # of `label_arguments`, where nothing has to be learned


def label_arguments(pairs_folder, model, out, *more, epochs=3, lr=0.003, trainer="cpu"):
    """A run that takes a second or two: a bag of words supervises a tiny decoder."""
    return [
        "dataset=local",
        f"dataset.path={pairs_folder}",
        "weak=bow",
        f"weak.epochs={epochs}",
        "strong=hf",
        f"strong.name={model}",
        f"strong.lr={lr}",
        "strong.max_length=64",
        "optim.full.global_batch_size=16",
        *([] if trainer is None else [f"trainer={trainer}"]),
        "logger=none",
        f"out={out}",
        *more,
    ]


def run_labels(pairs_folder, model, out, *more):
    """The report of a run on labels."""
    return run_typed(label_arguments(pairs_folder, model, out, *more), out / "run", list(more))


def run_typed(typed: list[str], folder: Path, more: list[str], name: str = "train") -> dict:
    """The report of a run of these overrides."""
    from w2sg.experiment.run import run_method

    return run_method(check(compose(*typed, name=name)), folder, more).content


def run_cong(arguments, out: Path, *more: str, name: str = "run") -> dict:
    return run_typed(arguments(out, *more), out / name, list(more))


def run_decoder(arguments, out: Path, kind: str, *more: str, name: str = "") -> dict:
    return run_typed(arguments(out, kind, *more), out / (name or kind), list(more), name="decode")


def planned(typed: list[str], name: str = "train", store: Path | None = None):
    """What a plan says of a run; ``store`` in the place of its own, which may have everything already."""
    from w2sg.planning.walk import plan

    typed = [*typed, "plan.only=true", *([] if store is None else [f"store={store}"])]
    return plan(check(compose(*typed, name=name)), typed)


def assert_planned(plan, content: dict) -> None:
    """A plan has the stages of the run in their order, with their keys and tokens wherever these are foreseeable."""
    assert plan.ends is None
    assert [s.name for s in plan.stages] == [s["name"] for s in content["stages"]]
    for foreseen, made in zip(plan.stages, content["stages"], strict=True):
        assert foreseen.key == made["key"] or not foreseen.foreseeable, foreseen.name
        if foreseen.kind == "write" and not made["cached"]:
            assert 0 < made["tokens"] <= foreseen.tokens, foreseen.name
        elif foreseen.tokens and not foreseen.at_most and not made["cached"]:  # some are only remembered by name
            assert abs(made["tokens"] - foreseen.tokens) <= 0.1 * made["tokens"], foreseen.name


def stages_of(content: dict) -> dict[str, dict]:
    return {stage["name"]: stage for stage in content["stages"]}


def replies_of(out: Path, name: str, system: str) -> dict[str, str]:
    """What a system wrote, by prompt."""
    rows = pq.read_table(out / name / "samples.parquet").to_pylist()
    return {row["prompt_id"]: row["reply"] for row in rows if row["system"] == system}


def cong_arguments(pairs_folder, models):
    """What is typed for ConG on tiny models, given the folder of runs and more."""

    def make(out: Path, *more: str) -> list[str]:
        return [
            "method=cong",
            "dataset=local",
            f"dataset.path={pairs_folder}",
            *(f"dataset.sizes.{name}={size}" for name, size in CONG_SIZES.items()),
            "weak=hf",
            f"weak.name={models['weak']}",
            "strong=hf",
            f"strong.name={models['strong']}",
            "weak.max_length=96",
            "strong.max_length=96",
            *(f"method.{stage}.lr.full=0.002" for stage in ("alignment", "sft", "dpo")),
            *(f"method.{stage}.global_batch_size=8" for stage in ("alignment", "sft", "dpo")),
            "method.decoding.max_new_tokens=10",
            "method.analysis.alphas=[0.0,1.0]",
            "method.judge.max_length=96",
            "optim.head.epochs=2",
            "trainer=cpu",
            "logger=none",
            f"out={out}",
            *more,
        ]

    return make


def decode_arguments(pairs_folder, models):
    """What is typed for a decoder on tiny models, given the folder of runs, its kind and more."""

    def make(out: Path, kind: str, *more: str) -> list[str]:
        return [
            f"decoder={kind}",
            "decoder.max_new_tokens=10",
            *DECODE_SMALL.get(kind, ()),
            "dataset=local",
            f"dataset.path={pairs_folder}",
            "dataset.sizes.weak_train=16",
            "dataset.sizes.transfer=16",
            "dataset.sizes.test=8",
            "weak=hf",
            f"weak.name={models['weak']}",
            f"weak.before_alignment={models['untuned']}",
            "strong=hf",
            f"strong.name={models['strong']}",
            *(f"{role}.{key}" for role in ("weak", "strong") for key in ("train=full", "max_length=96")),
            "method.judge.max_length=96",
            "optim.head.epochs=2",
            "trainer=cpu",
            "logger=none",
            f"out={out}",
            *more,
        ]

    return make


def run_all_decoders(arguments, out: Path) -> tuple[Path, dict[str, dict]]:
    """Each decoder once, on one store."""
    return out, {kind: run_decoder(arguments, out, kind) for kind in KINDS}


def start_ranks_of(plan: Mapping[str, Sequence[str]], folder: Path) -> Callable[[], str]:
    """Two processes that walk runs, folder -> what is typed; what is returned waits for them and has what they said."""
    (folder / "plan.json").write_text(json.dumps(plan))
    return start_ranks("tests/runs.py", str(folder / "plan.json"), folder=folder)


if __name__ == "__main__":
    draw_where_wanted()
    for out, typed in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        run_typed(typed, Path(out), [])
