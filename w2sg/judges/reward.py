"""Reward models as judges: a head trained here on the frozen states of a role's model, or a model used as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from w2sg.config import option
from w2sg.config.model_schema import OWN_CHAT, ModelConfig, elsewhere
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Replies
from w2sg.data.rows import pack
from w2sg.data.table import single_texts
from w2sg.judges.base import Judge, JudgeOptions
from w2sg.memory import Budget, in_parts
from w2sg.models.heads import load_head
from w2sg.models.scorer import load_language_model, load_scorer
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.training.within_memory import room_to_read

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run


class RewardJudge(JudgeOptions):
    """The reward model that generated replies are measured with."""

    kind: Literal["reward"] = "reward"
    model: str | None = option(
        "strong",
        "strong | weak: a reward head on that role's frozen states, trained on the transfer split's pairs, which the "
        "weak model's alignment has not seen | a hub id or folder of a reward model | null measures no reward",
    )
    layer: PositiveInt | Literal["auto"] | None = option(
        None, "layer whose states a trained judge reads: null the last, auto by cross-validation", alias="feature_layer"
    )
    candidates: list[PositiveInt] | None = option(
        None, "layers among which feature_layer=auto chooses", alias="feature_layer_candidates"
    )
    max_length: PositiveInt = option(2048, "tokens of prompt and reply; longer texts lose their start")

    def rules(self) -> list[str]:
        if self.layer == "auto" and not self.candidates:
            return [
                "feature_layer_candidates: feature_layer=auto chooses among these; name at least one layer, as [8,12]"
            ]
        return []

    @property
    def gives_rewards(self) -> bool:
        return self.model is not None

    def names(self, config: TrainConfig) -> dict[str, str]:
        return {} if self.model in (None, "strong", "weak") else {"model": self.model}

    def judge(self, run: Run, stage: str, split: str) -> RewardModel | None:
        return None if self.model is None else RewardModel(run, self, stage, split)


class RewardModel(Judge):
    """Rewards whole dialogues by one model.

    Args:
        options: the reward model, trained here or given.
        stage: name of its stages. split: whose pairs it is trained on.
        asked_for: the option that names it.
    """

    kind = "reward"

    def __init__(
        self,
        run: Run,
        options: RewardJudge,
        stage: str = "judge",
        split: Literal["transfer", "ground_truth"] = "transfer",
        asked_for: str = "method.judge",
    ):
        super().__init__(run)
        self.options, self.stage, self.split, self.asked_for = options, stage, split, asked_for
        self._reward_model: Trained | None = None
        self.trained = options.model in ("strong", "weak")
        self.source = self._find()
        if not self.trained:  # a head trained here judges what its frozen model writes as any text
            self.models["model"] = self.source

    @property
    def name(self) -> str:
        return self.source.spec.name

    def _find(self) -> Source:
        """Looked for before any work is done; it reads no more than it has positions for."""
        role = self.options.model if self.trained else "strong"
        spec: ModelConfig = getattr(self.run.config, role)
        changes = {"max_length": self.options.max_length, "lr": None, "epochs": None, "head": "linear"}
        if self.trained:
            changes |= {"train": "head", "layer": self.options.layer, "candidates": self.options.candidates}
        else:
            changes |= {"name": self.options.model, "revision": None, "layers": None, "random_init": False}
            changes |= {"train": "full", "quantise": None, "load": None, **OWN_CHAT}
            changes |= elsewhere(spec, same=False)
        source = self.run.find(spec.model_copy(update=changes), role if self.trained else self.asked_for)
        if not self.trained:
            source = replace(source, templated=source.chat.template)
        self.run.stages.notes += source.notes
        positions = getattr(source.config, "max_position_embeddings", None)
        if positions is not None and positions < source.spec.max_length:
            source.spec = source.spec.model_copy(update={"max_length": positions})
        return source

    # -- rewards ------------------------------------------------------------------------------------------------------

    def rewards(self, name: str, replies: Replies) -> np.ndarray:
        return self.rewards_and_key(name, replies)[0]

    def rewards_and_key(self, name: str, replies: Replies) -> tuple[np.ndarray, dict[str, Any]]:
        texts = self.texts(replies.prompts, replies.texts)
        ids = [f"{i}:{s}:{g}" for i, s, g in zip(replies.ids, replies.sample, replies.group, strict=True)]
        labels = self.run.predict(self._model(), single_texts(name, texts, ids))
        return labels.logits[:, 0].double().numpy(), labels.key

    def texts(self, prompts: Sequence[Dialogue], replies: Sequence[str]) -> list[str]:
        """Whole dialogues as the judge reads them."""
        pairs = zip(prompts, replies, strict=True)
        if not self.trained:
            return [self.source.chat.dialogue(prompt, reply) for prompt, reply in pairs]
        return [f"{prompt.text} {reply}" for prompt, reply in pairs]

    def _model(self) -> Trained:
        if self._reward_model is None:
            if not self.trained:
                self._reward_model = Trained(self.stage, self.source)
            else:
                table = getattr(self.run.data, self.split)
                self._reward_model = self.run.fit(self.stage, self.source, table, self.run.gold(table), evaluated=False)
        return self._reward_model

    def key(self) -> dict[str, Any]:
        """The judge as part of a cache key."""
        model = self._model()
        first = {"beginning": "kept"} if self.source.first else {}  # where what it reads has to be cut
        if model.folder is not None:
            return {"stage": model.folder.name, **first}
        spec = self.source.spec
        return {**self.source.identity, "max_length": spec.max_length, "dtype": spec.dtype, **first}

    def scorer(self) -> tuple[nn.Module, Rewards]:
        """The judge held in memory, for decoders that ask it again and again: its module, and what reads with it
        wherever that module is. It reads what there is of a reply as if it were whole.
        """
        model, source = self._model(), self.source
        saved = model.saved
        if model.layer is None:
            module = load_scorer(source, True, 2, saved, as_it_is=saved is None)
            score = module
        else:
            body = load_language_model(source, True, 2, depth=model.layer)
            module = nn.ModuleList([body, load_head(saved)])

            def score(batch: dict[str, Tensor]) -> Tensor:
                return module[1]({"features": body.features(batch, [model.layer])[:, :, 0]})

        return module.requires_grad_(False), Rewards(self, module, score)


class Rewards:
    """Rewards of prompts and replies, a few at a time.

    Attributes:
        read: tokens read so far.
    """

    def __init__(self, judge: RewardModel, module: nn.Module, score: Callable[[dict[str, Tensor]], Tensor]):
        self.judge, self.module, self.score = judge, module, score
        self.read, self.budget = 0, Budget()

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[B]."""
        judge = self.judge
        spec = judge.source.spec
        rows = pack(
            [(text,) for text in judge.texts(prompts, replies)],
            judge.source.encode,
            spec.max_length,
            first=judge.source.first,
        )
        device, rewards = next(self.module.parameters()).device, np.zeros(len(prompts))
        if self.budget.tokens is None:  # the models that write are there by now, and their caches
            devices = judge.run.devices
            room = devices.config.eval_tokens or room_to_read(self.module, device, devices.mixed)
            self.budget.tokens = room or devices.eval_tokens
        order = np.argsort(-rows.lengths, kind="stable")

        def read(part: slice) -> np.ndarray:
            batch = {k: v.to(device) for k, v in rows.collate(order[part]).items()}
            return self.score(batch)[:, 0].double().cpu().numpy()

        rewards[order] = np.concatenate(in_parts(self.budget, rows.lengths[order], read, device))
        self.read += int(rows.lengths.sum())
        return rewards
