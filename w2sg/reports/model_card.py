"""The README.md of an exported model: what it learned from whom, its numbers, how it is loaded, how texts must look."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from w2sg.models.finished import FinishedModel
from w2sg.reports.sections.overturned import cut
from w2sg.reports.words import estimate, pgr_sentence, short

LONGEST = 800  # characters of the example
CLASSIFIER = """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
model = AutoModelForSequenceClassification.from_pretrained("{folder}"{trust}).eval()
batch = tokenizer(["a text", "another text"], padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits
```
"""
WORDS = """```python
from bag_of_words import BagOfWords  # the file in this folder; it needs numpy and safetensors

logits = BagOfWords("{folder}").score(["a text", "another text"])
```
"""
POLICY = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
batch = tokenizer("a prompt", return_tensors="pt"{special})
reply = model.generate(**batch, max_new_tokens=64)[0, batch["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```
"""
ADAPTER = """```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
base = {auto}.from_pretrained("{base}"{labels})
model = PeftModel.from_pretrained(base, "{folder}").eval()
```
"""


def model_card(
    report: Mapping[str, Any],
    trained: FinishedModel,
    about: Mapping[str, Any],
    folder: str,
    checks: Sequence[str] = (),
    example: Sequence[str] = (),
) -> str:
    """A draft of a model card, in Markdown.

    Args:
        report: of the run.
        trained: the model. about: what is known of the folder, as `w2sg.models.export.export_model` gives it.
        folder: what the code calls it.
        checks: what was compared, a sentence each. example: the texts of a test row.
    """
    name = report.get("names", {}).get(trained.name.replace("-", "_"), trained.name)
    parts = [
        _front(trained),
        f"# {name[:1].upper()}{name[1:]}: {short(trained.spec.name)} on {report['dataset']}\n",
        "A draft, written by the export of w2sg. Read it before you publish it.\n",
        "## What it is\n",
        _table(_facts(report, trained)),
        "## Numbers\n",
        *_numbers(report, trained),
        "## How to load it\n",
        *_loading(trained, about, folder),
        *(f"Checked when it was written: {line}.\n" for line in checks),
        "## How texts must look\n",
        *_format(report, trained, example if report["config"].get("report", {}).get("texts", True) else ()),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _front(trained: FinishedModel) -> str:
    lines = ["---", "library_name: transformers"] if trained.spec.arch == "hf" else ["---"]
    if trained.spec.arch == "hf" and not trained.spec.name.startswith((".", "/", "~", "package:")):
        lines.append(f"base_model: {trained.spec.name}")
    return "\n".join([*lines, "tags:", "- w2sg", "- weak-to-strong-generalization", "---", ""])


def _facts(report: Mapping[str, Any], trained: FinishedModel) -> list[tuple[str, str]]:
    sizes, noise = report["data"]["sizes"], report["data"].get("label_noise") or {}
    taught = f"{short(report['weak'])} (the weak model of the run)"
    rows = [
        ("system", f"{trained.name}, seed {trained.seed}"),
        ("base", f"{short(trained.spec.name)}, tune={trained.spec.train}"),
        ("method", f"{report['method']}, loss {report['loss']}"),
        ("teacher", "none: ground truth" if trained.name in ("weak", "ceiling", "judge") else taught),
        ("data", f"{report['dataset']}: " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in sizes.items())),
    ]
    if noise.get("rows_hit"):
        rows.append(("label noise", f"{noise['kind']} on {noise['rate_applied']:.0%} of the transfer rows"))
    return [*rows, ("made by", "the command in w2sg.json")]


def _numbers(report: Mapping[str, Any], trained: FinishedModel) -> list[str]:
    parts, measured = [], report.get("metrics") or {}
    rows = []
    for system, values in measured.items():
        if "accuracy" in values:
            low, high = values["intervals"]["accuracy"]
            called = report.get("names", {}).get(system, system)
            mark = " (this model)" if system.replace("_", "-") == trained.name else ""
            rows.append((called + mark, f"{values['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"))
    if rows:
        parts.append(_table(rows, ("", "accuracy", "95 % interval")))
    if report.get("pgr"):
        sentence = pgr_sentence(report["pgr"])
        parts.append(f"{sentence[:1].upper()}{sentence[1:]}.\n")
    elif report.get("summary"):
        parts.append(_table([(what, estimate(value)) for what, value in report["summary"].items()], ("", "value")))
    if report.get("verdict"):
        parts.append(f"{report['verdict']}\n")
    parts += [f"- {_line(line)}" for line in report.get("warnings", ())]
    return [*parts, ""]


def _loading(trained: FinishedModel, about: Mapping[str, Any], folder: str) -> list[str]:
    form, base = about["form"], trained.spec.name
    pairs = trained.scoring is not None and trained.scoring.pairs
    if form == "words":
        parts = [WORDS.format(folder=folder)]
    elif form == "adapter":
        auto = "AutoModelForCausalLM" if trained.scoring is None else "AutoModelForSequenceClassification"
        count = 0 if trained.scoring is None else 1 if pairs else trained.scoring.classes
        parts = [ADAPTER.format(auto=auto, folder=folder, base=base, labels=f", num_labels={count}" if count else "")]
    elif form == "policy":
        special = ""
        parts = [POLICY.format(folder=folder, special=special)]
    else:
        own = form == "own classifier"
        if own:
            parts = [
                f"Transformers has no class that gives the same logits: {'; '.join(about['notes'])}. So the folder "
                "holds its own, `w2sg_classifier.py`, which `trust_remote_code=True` runs.\n"
            ]
        else:
            parts = []
        parts.append(CLASSIFIER.format(folder=folder, trust=", trust_remote_code=True" if own else ""))
    if form == "adapter" and trained.scoring is not None:
        parts.append(
            "Read texts one by one, with `truncation=True`: a batch needs a token for filling that ends no text, which "
            "this tokenizer need not have. Export without `adapter=true` for a folder that reads batches.\n"
        )
    if pairs and any("mixture" in note for note in about.get("notes", ())):
        parts.append(
            "The logits are the rewards of its experts. `model.compare(logits_of_first, logits_of_second)` gives the "
            "log-probabilities that the first or the second reply is better.\n"
        )
    elif pairs:
        parts.append("The logit is a reward: sigmoid(reward of one − reward of another) is P(the one is better).\n")
        if about.get("constant"):
            parts.append(
                f"The run's own rewards are these plus {about['constant']:.6g}, which no comparison of replies needs.\n"
            )
    elif trained.scoring is not None:
        parts.append("The softmax of the logits is P(class); classes are numbered as in the data.\n")
    return parts


def _format(report: Mapping[str, Any], trained: FinishedModel, example: Sequence[str]) -> list[str]:
    spec = trained.spec
    if trained.scoring is None:
        shown = [
            e["text"]
            for e in report.get("reading", {}).get("examples", ())
            if e["model"] == spec.name and e["kind"] == "prompts"
        ]
        parts = [
            "It was taught on prompts as the run formatted them. Where its tokenizer has a chat template, "
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)` writes the same; "
            "tokenize that with `add_special_tokens=False`. It was taught replies of up to "
            f"{spec.max_length:,} tokens, prompt included.\n"
        ]
        return [*parts, *(["A prompt of the run:\n", _block(shown[0])] if shown else [])]
    unit = "words" if spec.arch == "bow" else "tokens"
    what = "prompt and reply in one text, exactly as below" if trained.scoring.pairs else "one text"
    parts = [
        f"It reads {what}. A text of more than {spec.max_length:,} {unit} loses its start"
        + (".\n" if spec.arch == "bow" else ": the tokenizer is set so. Fill batches on the right.\n")
    ]
    return [*parts, *(["A test row:\n", *map(_block, example)] if example else [])]


def _block(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{cut(text, LONGEST)}\n{fence}\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """A table in Markdown."""
    lines = []
    for line in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(_line(str(cell)).replace("|", "\\|") for cell in line) + " |")
    return "\n".join(lines) + "\n"
