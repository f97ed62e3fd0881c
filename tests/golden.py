"""Whether a change of the code changes what users have: `freeze FOLDER` before it, `compare FOLDER` after it.

``freeze`` makes tiny models and data and runs every method and the main decoders into one store; ``compare`` types the
same commands again. Every stage must be found in that store, and every number of every report must be the same; what is
new in a report is counted, what differs or is missing is listed.

    python tests/golden.py freeze /tmp/golden
    python tests/golden.py compare /tmp/golden
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import WORDS, make_pairs, run_script, save_tiny_model, write_jsonl

from w2sg.config import renamed

# What a report says of the machine, of the code's own version, and of options that may have come since.
NOT_COMPARED = {"seconds", "cached", "versions", "config", "stages", "wait", "waited", "logs", "written", "machine"}
SIZES = {"ground_truth": 16, "transfer": 16, "test": 10}


def commands(folder: Path, store: Path) -> dict[str, tuple[str, list[str]]]:
    """Name of a run -> script and what is typed."""
    models, common = folder / "models", ["trainer=cpu", "logger=none", f"store={store}"]
    weak, strong = ([f"{role}=hf", f"{role}.name={models / role}"] for role in ("weak", "strong"))
    roles = [*weak, *strong]
    text = [*common, *roles, "weak.max_length=96", "strong.max_length=96"]
    pairs = ["dataset=local", f"dataset.path={folder / 'pairs'}", *(f"dataset.sizes.{k}={v}" for k, v in SIZES.items())]
    labels = [*common, *pairs, *roles, "strong.train=head", "weak.train=head", "training.head.epochs=2"]
    labels += ["weak.max_length=96", "strong.max_length=96"]
    cong = [*text, *pairs, "method=cong", "method.decoding.max_new_tokens=10", "method.analysis.alphas=[0.0,1.0]"]
    cong += [
        f"method.{stage}.{key}" for stage in ("alignment", "sft", "dpo") for key in ("lr.full=2e-3", "batch_size=8")
    ]
    cong += ["method.judge.max_length=96", "training.head.epochs=2"]
    refine = [*text, "method=refine", "method.sft.lr.full=0.002", "method.sft.batch_size=4", "method.sft.epochs=1"]
    answers = [*refine, "dataset=questions", f"dataset.path={folder / 'questions'}", "refine.max_new_tokens=4"]
    answers += ["refine.exemplar='{question} {answer}; '", "refine.query='{question} so'", "refine.batch_size=3"]
    answers += ["method.sampling.max_new_tokens=4", "method.concept.kind=regex", "method.concept.pattern='[aeiou]'"]
    relabel = [*labels, "method=refine", "method.target=labels", "loss=rkl", "refine.batch_size=3"]
    relabel += ["refine.exemplar='{question} {answer}; '", "refine.query='{question} so'"]
    decode = [*text, *pairs, "decoder.max_new_tokens=10", f"weak.untuned={models / 'untuned'}", "weak.train=full"]
    decode += ["strong.train=full", "method.judge.max_length=96", "training.head.epochs=2"]
    search = ["decoder=search", "decoder.beams=2", "decoder.children=2", "decoder.chunk=4"]
    wsd = ["decoder=wsd", "decoder.draft=6", "decoder.check=2", "decoder.window=2", "decoder.threshold=0.02"]
    return {
        "finetune": ("train.py", [*labels, "loss=rkl"]),
        "finetune_full": ("train.py", [*labels, "loss=ce", "strong.train=full", "training.full.epochs=1"]),
        "classes": (
            "train.py",
            [
                *common,
                "dataset=local",
                f"dataset.path={folder / 'classes.jsonl'}",
                *pairs[2:],
                "weak=bow",
                *strong,
                "strong.train=head",
                "training.head.epochs=2",
                "strong.max_length=96",
            ],
        ),
        "chain": ("train.py", [*labels, "method=chain", "method.links=[{layer: 1}]"]),
        "ensemble": ("train.py", [*labels, "method=ensemble", "method.members=2"]),
        "filter": ("train.py", [*labels, "method=filter"]),
        "cong": ("train.py", cong),
        "refine_answers": ("train.py", answers),
        "refine_labels": ("train.py", relabel),
        "search": ("evaluate.py", [*search, *decode]),
        "wsd": ("evaluate.py", [*wsd, *decode]),
        "eft": ("evaluate.py", ["decoder=eft", *decode]),
        "best_of_n": ("evaluate.py", ["decoder=best_of_n", "decoder.samples=3", *decode]),
    }


def prepare(folder: Path) -> None:
    """Tiny models and data."""
    for name, kind, seed, width in (("weak", "gpt2", 0, 16), ("strong", "llama", 1, 32), ("untuned", "gpt2", 7, 16)):
        save_tiny_model(folder / "models" / name, kind, seed=seed, width=width)
    for seed, (name, count) in enumerate({"ground_truth": 96, "transfer": 96, "test": 64}.items()):
        write_jsonl(folder / "pairs" / f"{name}.jsonl", make_pairs(count, seed))
    for name, count in {"ground_truth": 8, "transfer": 11, "test": 9}.items():
        rows = [{"question": f"{WORDS[k]} {name[:2]}?", "answer": f"{WORDS[k]} {WORDS[-k]}"} for k in range(count)]
        write_jsonl(folder / "questions" / f"{name}.jsonl", rows)
    rows = [
        {"text": r[k].partition("Assistant:")[2].strip(), "label": int(k == "chosen")}
        for r in make_pairs(60, 9)
        for k in ("chosen", "rejected")
    ]
    write_jsonl(folder / "classes.jsonl", rows)


def walk(folder: Path, out: Path) -> None:
    """Run everything, then gather it."""
    for name, (script, typed) in commands(folder, out.parent / "store").items():
        run_script(script, *typed, f"out={out}", f"hydra.run.dir={out / name}")
        print(name, flush=True)
    run_script("evaluate.py", f"runs={out}")


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two reports do not say the same; keys that only the new one has are no difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            if key in NOT_COMPARED:
                continue
            if key in new:
                yield from differences(value, new[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: gone"
    elif path == ".sections":  # a page may have more of them
        yield from (f"{path}: gone: {key}" for key in old if key not in new)
    elif path == ".warnings":  # their order says nothing
        yield from (f"{path}: gone: {line[:200]}" for line in old if line not in new)
        yield from (f"{path}: new: {line[:200]}" for line in new if line not in old)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}[{place}]")
    elif old != new:
        yield f"{path}: {str(old)[:60]} -> {str(new)[:60]}"


def compare(folder: Path) -> bool:
    """Whether the same commands find every stage and give the same numbers; prints what differs.

    The frozen store is copied first, so that a stage that is computed anew is seen each time.
    """
    frozen = (folder / "frozen_at").read_text("utf-8")
    same = True
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "golden"
        shutil.copytree(folder / "store", again.parent / "store")
        walk(folder, again)
        for name in commands(folder, folder):
            old, new = (
                json.loads(text.replace(str(whole), "FOLDER").replace(str(models), "FOLDER"))
                for whole, models, text in (
                    (frozen, frozen, (folder / "golden" / name / "report.json").read_text("utf-8")),
                    (again.parent, folder, (again / name / "report.json").read_text("utf-8")),
                )
            )
            for report in (old, new):  # the names that options have today
                report["command"] = " ".join(map(renamed.override, report["command"].split(" ")))
                report["training"] = renamed.tree(report.get("training"), "method", quiet=True)
            anew = sorted({s["name"] for s in new["stages"] if not s["cached"]})
            gone = sorted({s["name"] for s in old["stages"]} - {s["name"] for s in new["stages"]})
            lines = list(differences(old, new))
            same = same and not (anew or gone or lines)
            print(f"{name}: {len(new['stages'])} stages, computed anew: {anew or 'none'}, gone: {gone or 'none'}")
            for line in lines[:20]:
                print(f"  {line}")
            if len(lines) > 20:
                print(f"  ... {len(lines) - 20} more")
    print("the same" if same else "NOT the same")
    return same


if __name__ == "__main__":
    todo, where = sys.argv[1], Path(sys.argv[2]).absolute()
    if todo == "freeze":
        prepare(where)
        walk(where, where / "golden")
        (where / "frozen_at").write_text(str(where), "utf-8")
    else:
        sys.exit(0 if compare(where) else 1)
