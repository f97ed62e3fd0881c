"""Options say their default, type and help at one place; methods take them as one class or as keyword parameters."""

from functools import partial
from typing import Literal

import pytest
from pydantic import ValidationError

from w2sg.config import Options, option
from w2sg.config.build import build
from w2sg.config.check import target_problems
from w2sg.config.option import defaults_of, options_class
from w2sg.config.options import DPO, SFT, Alignment, Analysis, Contrast, Evaluation, Sampling
from w2sg.judges import LanguageModelJudge, RewardJudge


class Stage(Options):
    rate: float = option(1e-5, "learning rate", gt=0)
    names: list[str] = option(["a"], "which")


class Method(Options):
    stage: Stage = option(Stage(rate=2e-5), "training")
    kind: Literal["x", "y"] = option("x", "which kind")
    path: str = option(..., "where")

    def rules(self) -> list[str]:
        return ["path: it is empty; name a folder"] if not self.path else []


def by_class(run, options: Method):
    """A method whose options are one class."""
    return run, options


def by_keywords(run, stage: Stage, kind: Literal["x", "y"] = "x", count: int = 3):
    """A method whose options are keyword parameters."""
    return run, stage, kind, count


HERE = __name__


def test_defaults_are_plain_and_whole():
    stage = {"rate": 2e-5, "names": ["a"]}
    assert defaults_of(Method) == {"stage": stage, "kind": "x", "path": "???"}
    node = {"_target_": f"{HERE}.by_class", "_partial_": True}
    assert defaults_of(by_class) == {**node, **defaults_of(Method)}
    node = {"_target_": f"{HERE}.by_keywords", "_partial_": True}
    assert defaults_of(by_keywords) == {**node, "stage": "???", "kind": "x", "count": 3}
    assert options_class(by_class) is Method
    assert options_class(by_keywords) is None


def test_a_default_is_shared_by_nobody():
    Method(path="a").stage.names.append("b")
    assert Method(path="a").stage.names == ["a"]


def test_both_forms_are_built():
    node = {"_target_": f"{HERE}.by_class", "_partial_": True, "path": "p", "stage": {"rate": 0.5}}
    function = build(node)
    assert isinstance(function, partial)
    assert function("run") == ("run", Method(path="p", stage=Stage(rate=0.5)))
    node = {"_target_": f"{HERE}.by_keywords", "stage": {"rate": 0.5}, "kind": "y"}
    assert build(node)("run") == ("run", Stage(rate=0.5), "y", 3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"path": "p", "stage": {"rate": 1.0, "rat": 1.0}},
            "method.stage.rat: no such key here; did you mean method.stage",
        ),
        ({"path": "p", "knd": "x"}, "method.knd: no such key here; did you mean method.kind?"),
        ({"path": "p", "kind": "z"}, "method.kind: input should be 'x' or 'y' (got 'z')"),
        ({"path": "p", "kind": "x", "stage": {"rate": -1.0}}, "method.stage.rate: input should be greater than 0"),
        ({"path": "p", "stage": 3}, "method.stage: a section with the keys rate, names"),
        ({"path": ""}, "method.path: it is empty; name a folder"),
        ({}, "method.path: needs a value"),
    ],
)
def test_a_class_of_options_is_checked(options, line):
    whole = {"stage": {"rate": 1.0}, "kind": "x", **options}
    (problem,) = target_problems("method", {"_target_": f"{HERE}.by_class", **whole})
    assert problem.startswith(line)


def test_options_stand_for_themselves():
    for kind in (SFT, DPO, Alignment, Sampling, Contrast, RewardJudge, LanguageModelJudge, Analysis, Evaluation):
        assert kind() == kind.model_validate(defaults_of(kind))
    assert SFT(epochs=3).epochs == 3
    with pytest.raises(ValidationError):
        SFT(epoch=3)
