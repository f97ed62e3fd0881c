"""What ``-h`` says: of the command its verbs, of a verb what may be typed, with two examples.

It reads the files of conf/ as text, so that it answers at once.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from w2sg.config import plugins
from w2sg.config.programs import JOBS, as_started, command
from w2sg.console import Plain

WIDTH = 80
HELP = ("help", "--help", "-h")
# What each verb does, and two examples: words that follow the verb.
VERBS = {
    "train": ("run one weak-to-strong experiment, or with -m a sweep", ("loss=rkl", "-m loss=ce,rkl seed=0,1,2")),
    "decode": (
        "measure a way of writing replies: search, nudging, ...",
        ("decoder=search", "-m decoder=sampling,eft,best_of_n,search"),
    ),
    "compare": ("gather finished runs: one table, one page, paired tests", ("outputs", "outputs/noise")),
    "store": ("list cached stages, say why one was made, prune, verify", ("list", "prune apply=true")),
    "export": (
        "write a trained model as a transformers folder",
        ("outputs/default system=student to=my_model", "outputs/default system=weak to=my_model"),
    ),
    "harness": (
        "run lm-evaluation-harness on a trained model",
        ("my_model tasks=[gsm8k] limit=50", "outputs/method=cong system=cong tasks=[arc_easy]"),
    ),
    "annotations": (
        "read what the alpaca_eval tool judged, as win rates",
        ("annotations.json", "annotations.json of=outputs/method=cong"),
    ),
    "check-theory": ("run small experiments with a known analytic answer", ("", "loss_values")),
    "docs": (
        "show a page of the documentation, or its lines with a word",
        ("howto/loss", "options strong.lr"),
    ),
    "wandb-report": (
        "save a workspace in W&B: accuracies, PGR, curves",
        ("outputs", "outputs project=mine entity=team"),
    ),
}
FORMS = {  # what a job takes before its settings
    "compare": "one FOLDER of runs",
    "store": "list, why, prune or verify, and after why one STAGE",
    "export": "one RUN",
    "harness": "one RUN",
    "annotations": "one FILE",
    "check-theory": "one NAME of an experiment, or none",
    "wandb-report": "one FOLDER of runs",
    "docs": "one PAGE, and a word if you like, or nothing",
}
# What may be chosen, in this order.
GROUPS = {
    "method": "what is done",
    "decoder": "how replies are written",
    "loss": "what the student minimises",
    "weak": "the model that supervises",
    "dataset": "the rows",
    "judge": "who judges replies",
    "refine": "how weak answers are refined, with method=refine",
    "trainer": "the devices",
    "engine": "what runs a model that works by itself",
    "logger": "where curves go",
    "experiment": "settings of a paper's figure or table",
    "pair": "weak and strong in one word, for sweeps over pairs",
    "optim": "how models are trained",
}


def asks_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for help, wherever it does."""
    return any(word in HELP for word in words)


def print_help(verb: str | None = None) -> None:
    """Of the command, or of one verb."""
    lines = page(verb) if verb in VERBS else scripts() if verb == "evaluate" else overview()
    for line in lines:
        Plain(width=WIDTH).print(line, soft_wrap=True)


def overview() -> Iterator[str]:
    """Every verb in a line, and two examples."""
    yield from ("w2sg: can a strong model end up better than its weak teacher?", "", "  w2sg VERB key=value ...", "")
    yield from _rows({verb: words for verb, (words, _) in VERBS.items()})
    yield from ("", "Examples:", "  w2sg train loss=rkl", "  w2sg compare outputs", "")
    yield "`w2sg VERB -h` shows what a verb takes."
    yield "`w2sg --install-completion bash` (or zsh, fish) lets the Tab key complete."


def scripts() -> Iterator[str]:
    """What evaluate.py does, by its keys."""
    yield from ("evaluate.py: what runs left behind, or a decoder", "")
    yield from _rows({f"{JOBS.get(verb, 'decoder')}=": VERBS[verb][0] for verb in [*JOBS, "decode"]})
    yield from ("", "Examples:", "  python evaluate.py runs=outputs", "  python evaluate.py store=list", "")
    yield "`python evaluate.py decoder=search -h` shows what may be chosen for a decoder."


def page(verb: str) -> Iterator[str]:
    """What may be typed after a verb."""
    words, examples = VERBS[verb]
    yield from (f"{command(verb).removesuffix('=...')}: {words}", "", "Examples:")
    yield from (f"  {command(verb, *example.split())}" for example in examples)
    yield ""
    if verb == "docs":
        yield f"It takes {FORMS[verb]}."
    else:
        yield from _job(verb) if verb in JOBS else _program(verb)


# ---------------------------------------------------------------------------------------------------------------------


def _rows(rows: dict[str, str], marked: str | None = None) -> Iterator[str]:
    """A name and its words a line, within the width; one name with a star."""
    width = max(map(len, rows), default=0)
    for name, words in rows.items():
        start = f"{'*' if name == marked else ' '} {name:<{width}}  "
        yield (start + shorten(as_started(words), WIDTH - len(start))).rstrip()


def shorten(text: str, most: int) -> str:
    """The text; or what of it fits: without what stands in brackets, its first clauses, its first words.

    >>> shorten("Reverse KL (arXiv 2502.11107): of the student, and no other.", 30)
    'Reverse KL: of the student'
    """
    text = text if text.endswith("...") else text.removesuffix(".")
    if len(text) > most:
        text = re.sub(r" \([^()]*\)", "", text).removesuffix(".")
    if len(text) <= most:
        return text
    clauses = [match.start() for match in re.finditer("[:;,] ", text) if most / 2 <= match.start() <= most]
    return text[: clauses[-1]] if clauses else textwrap.shorten(text, most, placeholder="…")


def _program(verb: str) -> Iterator[str]:
    """The choices of each group, and the settings of a whole run."""
    listed, order = chosen_in(verb), [*GROUPS, "strong"]
    order.insert(order.index("weak") + 1, order.pop())
    for group in sorted(listed, key=lambda group: order.index(group) if group in order else len(order)):
        chosen = listed[group]
        choices = choices_of(verb, group)
        if group == "strong":
            yield from (f"strong= the model that learns: one of the same, * {chosen}", "")
        elif len(choices) > 1 and group in GROUPS:
            yield f"{group}= {GROUPS[group]}"
            yield from (*_rows({name: about(file) for name, file in choices.items()}, chosen), "")
    yield "settings of the whole run"
    yield from _rows({f"{name}=": words for name, words in plain_keys().items()})
    yield ""
    yield "* is taken where none is chosen. Keys of a choice follow its group after a dot:"
    yield "strong.lr=1e-4, dataset.sizes.test=200. A file of ./conf/GROUP is a choice, too."
    yield f"All keys with their values: `{command(verb, '--cfg job')}`; what they mean:"
    yield as_started("docs/options.md. Flags of Hydra: --hydra-help.")


def chosen_in(verb: str) -> dict[str, str | None]:
    """Group -> the choice that is made where none is typed, as conf/train.yaml or conf/decode.yaml says."""
    listed = yaml.safe_load(_first(f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in listed if isinstance(entry, dict) for group, choice in entry.items()}


def choices_of(verb: str, group: str) -> dict[str, Path]:
    """The choices of a group that a program takes, each with its file."""
    return {name: file for name, (file, *_) in plugins.files(group).items() if _fits(verb, group, file)}


def plain_keys() -> dict[str, str]:
    """The settings of a whole run that stand in no section, and what they mean."""
    from w2sg.config.schema import TrainConfig

    fields = TrainConfig.model_fields
    return {name: str(field.description) for name, field in fields.items() if field.annotation in (int, str, bool)}


def _first(name: str) -> Path:
    return next(folder / name for folder in plugins.folders() if (folder / name).is_file())


def _fits(verb: str, group: str, file: Path) -> bool:
    """Whether a program takes a choice: experiments with a decoder are decode's, whose method and loss are given."""
    if group in ("method", "loss"):
        return verb == "train" and file.stem != "decode"
    return group != "experiment" or _decodes(file) == (verb == "decode")


def _decodes(experiment: Path) -> bool:
    defaults = (yaml.safe_load(experiment.read_text(encoding="utf-8")) or {}).get("defaults", [])
    bases = [experiment.with_name(f"{entry}.yaml") for entry in defaults if isinstance(entry, str)]
    overridden = any("override /decoder" in entry for entry in defaults if isinstance(entry, dict))
    return overridden or any(_decodes(base) for base in bases if base.exists())


def about(file: Path) -> str:
    """The first sentence of a file's opening comment; where it has none, of the docstring of what it names.

    Args:
        file: of conf files.
    """
    text = file.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    opening = []
    for line in lines:
        if not re.match(r"# ?\S", line) or line.startswith("#  "):
            break
        opening.append(line.lstrip("# "))
    target = re.search(r"^_target_: *([\w.]+)", text, re.M)
    return _sentence(" ".join(opening) or (_docstring(target[1]) if target else ""))


def _sentence(text: str) -> str:
    return re.split(r"(?<=[a-z0-9)])\. (?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


def _docstring(path: str) -> str:
    """Of a function or class by its dotted path; its file is read and not imported."""
    module, _, name = path.rpartition(".")
    for folder in [Path.cwd(), *map(Path, sys.path)]:
        file = folder.joinpath(*module.split(".")).with_suffix(".py")
        if file.is_file():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if getattr(node, "name", None) == name:
                    return ast.get_docstring(node) or ""
    return ""


def _job(verb: str) -> Iterator[str]:
    keys = keys_of(verb)
    yield f"It takes {FORMS[verb]}{'; after that:' if keys else '.'}"
    yield from _rows(keys)


def keys_of(verb: str) -> dict[str, str]:
    """The keys that a job reads, each with ``=`` after it, and what they mean."""
    from w2sg.config.evaluate_schema import keys_read

    return {f"{name}=": words for name, words in keys_read(JOBS[verb]).items()}
