"""Settings that were typed and that nothing in the run reads: said, since they look as if they counted."""

from __future__ import annotations

from collections.abc import Sequence

from w2sg.config.model_schema import ModelConfig
from w2sg.config.schema import TrainConfig

# methods of w2sg whose every fit reads optim.<tune>, and those whose stages on text have options of their own
ON_LABELS = {f"w2sg.methods.{name}.{name}" for name in ("finetune", "chain", "ensemble", "filtered")}
ON_TEXT = {f"w2sg.methods.{name}.{name}" for name in ("cong", "decode")}


def unread(config: TrainConfig, typed: Sequence[str]) -> list[str]:
    """One line per setting that was typed in vain, each with the setting that decides.

    Args:
        typed: overrides, as ``optim.full.lr=1e-4``.
    """
    roles = {role: getattr(config, role) for role in ("weak", "strong")}
    method = config.method["_target_"]
    lines = []
    for override in typed:
        key = override.lstrip("+~").partition("=")[0]
        section, _, rest = key.partition(".")
        if section == "optim":
            lines.append(_of_training(key, rest.partition(".")[0], method, roles))
        elif section in roles:
            lines.append(_of_model(key, rest, roles[section], section))
    return [line for line in lines if line is not None]


def typed_name(target: str) -> str:
    """What is typed after ``method=`` for a ``_target_``: of w2sg's own the name alone.

    >>> typed_name("w2sg.methods.cong.cong"), typed_name("mine.cong")
    ('cong', 'mine.cong')
    """
    return target.rpartition(".")[2] if target.startswith("w2sg.") else target


def _of_training(key: str, mode: str, method: str, roles: dict[str, ModelConfig]) -> str | None:
    if mode not in ("full", "lora", "head"):
        return None
    if method in ON_LABELS:
        if all(model.train != mode for model in roles.values()):
            how = ", ".join(f"{role}.tune={model.train}" for role, model in roles.items())
            return f"{key}: not read, since no model is trained so ({how})"
        if key.endswith((".lr", ".epochs")):
            name = key.rpartition(".")[2]
            trained_so = {role: model for role, model in roles.items() if model.train == mode}
            if all(getattr(model, name) for model in trained_so.values()):
                overruling = " and ".join(f"{role}.{name}" for role in trained_so)
                return f"{key}: not read, since {overruling} overrule it"
    elif method in ON_TEXT and mode != "head":
        return f"{key}: not read by method={typed_name(method)}, whose own stages have their options in method.*"
    return None


def _of_model(key: str, rest: str, model: ModelConfig, role: str) -> str | None:
    if rest.startswith("lora.") and model.train != "lora":
        return f"{key}: not read, since {role}.tune={model.train}"
    if rest.startswith("bow.") and model.arch != "bow":
        return f"{key}: not read, since {role} is no bag of words"
    if rest == "experts" and model.head != "mixture":
        return f"{key}: not read, since {role}.head={model.head}"
    if rest.startswith("label_tokens.") and model.head != "label_tokens":
        return f"{key}: not read, since {role}.head={model.head}"
    if rest == "feature_layer_candidates" and model.layer != "auto":
        return f"{key}: not read, since {role}.feature_layer is not auto"
    return None
