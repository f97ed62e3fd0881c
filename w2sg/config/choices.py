"""What was probably meant by a choice that a group does not have."""

from __future__ import annotations

from functools import cache
from pathlib import PurePath

from w2sg.config import plugins
from w2sg.config.defaults_source import CODE, is_code, node_of
from w2sg.config.programs import command
from w2sg.config.suggest import listed, similar
from w2sg.errors import UserError

FEW = 14  # choices of a group that are all named
MEANT = {  # what other libraries call what is no choice of that group here
    ("method", "dpo"): "method=cong, whose last stage is DPO",
    ("loss", "dpo"): "method=cong, whose preference loss is method.dpo.loss",
}


def options(group: str) -> list[str]:
    """The choices of a group."""
    return list(plugins.files(group))


def file_problem(override: str) -> str | None:
    """What to do about a choice that is typed as the path of a file; None where it is none.

    >>> file_problem("loss=conf/loss/rkl.yaml")
    'loss: a choice is typed without its folder and ending; did you mean loss=rkl?'
    """
    key, _, value = override.partition("=")
    group, file = key.lstrip("+~"), PurePath(value.strip("'\""))
    if file.suffix in (".yaml", ".yml"):
        if file.stem in options(group):
            return f"{group}: a choice is typed without its folder and ending; did you mean {group}={file.stem}?"
        folder = {"weak": "model", "strong": "model"}.get(group, group)
        return f"{group}: to choose {file}, put it into ./conf/{folder} and type {group}={file.stem}"
    if file.suffix == ".py" and group in CODE:
        return f"{group}: to choose what {file} holds, type {group}={'.'.join(file.with_suffix('').parts)}.NAME"
    return None


def unknown_choice(group: str, value: str) -> str:
    """What to do about a choice that a group does not have.

    >>> print(unknown_choice("trainer", "ddpp"))
    there is no ddpp; did you mean trainer=ddp? The choices: auto, cpu, ddp, fsdp, gpu
    """
    if is_code(group.partition("@")[0], value):
        try:
            node_of(group.partition("@")[0], value)
        except UserError as error:
            return str(error)
    if (problem := file_problem(f"{group}={value}")) is not None:
        return problem.removeprefix(f"{group}: ")
    if meant := MEANT.get((group, value.lower())):
        return f"there is no {value}; did you mean {meant}?"
    choices = options(group)
    words_of = aliases(group)
    exact = [c for c, words in words_of.items() if value.casefold() in words]
    near = exact or similar(value, choices)
    if not near:
        near = [c for c, words in words_of.items() if similar(value, words, 1, 0.8)][:3]
    words = f"there is no {value}"
    if near:
        words += f"; did you mean {listed([f'{group}={c}' for c in near])}?"
    elif group == "optim" and value in ("full", "lora", "head"):
        return words + f"; did you mean strong.tune={value} or weak.tune={value}?"
    elif group == "optim":
        return words + "; an optimizer is typed optim.full.optimizer=, optim.lora.optimizer= or optim.head.optimizer="
    elif group == "trainer" and value.isdigit():
        return words + f"; did you mean trainer.devices={value}?"
    elif group == "judge":
        words += f" here; a model that is asked is typed judge=llm method.judge.model={value}"
    elif group in ("weak", "strong"):
        words += f" here; one of the hub, a folder or a file is typed {group}=hf {group}.name={value}"
    elif group == "dataset" and ("/" in value or "." in value):
        return words + f" here; one of the hub, a folder or a file is typed dataset=local dataset.path={value}"
    if len(choices) <= FEW:
        words += f"{'' if near else ';'} {'T' if near else 't'}he choices: {', '.join(choices)}"
    else:
        words += f"{'' if near else '.'} All {len(choices)} are in `{command('train', '--help')}`"
    return words


@cache
def aliases(group: str) -> dict[str, list[str]]:
    """What else each choice may be called: its function, its model's or its data's name."""
    import yaml

    found = {}
    for choice, (file, *_) in plugins.files(group).items():
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        words = [str(content.get(key, "")) for key in ("_target_", "name", "path", "kind")]
        words[0] = words[0].rpartition(".")[2]
        words += [word.rpartition("/")[2] for word in words]
        found[choice] = [word.casefold() for word in words if word]
    return found
