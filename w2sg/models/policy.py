"""A language model as a policy: the log-probabilities of its replies, with gradients where it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.dialogue import Chat
from w2sg.data.masks import run_backbone, sight
from w2sg.data.table import digest
from w2sg.errors import UserError
from w2sg.losses.logprobs import token_logprobs, top_tokens, wide_logits, wide_results
from w2sg.models import rope
from w2sg.models.attention import on_any_device
from w2sg.models.backbones import logit_scale, recompute, softcap_of
from w2sg.models.exact import asked, ordinary
from w2sg.models.loading import load_transformer, save_transformer, with_lora
from w2sg.models.once import told
from w2sg.models.source import Source
from w2sg.models.unreadable import quiet_loading, reading


class Policy(nn.Module):
    """A causal language model that is asked for the log-probabilities of given tokens, at those tokens only.

    Args:
        model: a ``...ForCausalLM``, or a peft model around one.

    Attributes:
        writable: [V] ids that stand for a token of its tokenizer; None for all. Only these are ever written, while
            log-probabilities are over all V, as in training.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.softcap = softcap_of(self.plain.config)
        self.scale = told(lambda: logit_scale(self.plain))
        self.writable: Tensor | None = None

    @property
    def plain(self) -> nn.Module:
        """The transformers model itself; adapters live inside its layers."""
        get_base = getattr(self.model, "get_base_model", None)
        return get_base() if get_base else self.model

    @property
    def body(self) -> nn.Module:
        """What gives the final states; Llama 4's language model names another part of the whole."""
        plain = self.plain
        return plain.base_model if plain.base_model is not plain else getattr(plain, "model", plain)

    @property
    def adapted(self) -> bool:
        """Whether it is a base model with adapters, so that the base is there as well."""
        return self.plain is not self.model

    @contextlib.contextmanager
    def base_beside(self) -> Iterator[None]:
        """Read with the adapters in the first half of a batch's rows, and as the base alone in the second.

        peft has the same (``adapter_names``), but gathers and scatters the rows of every layer by index.
        """
        from peft.tuners.lora import LoraLayer

        model, adapter = self.model, self.model.active_adapter

        def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            half = len(output) // 2
            low = layer.lora_A[adapter](inputs[0][:half])
            output[:half].add_(layer.lora_B[adapter](low), alpha=layer.scaling[adapter])

        handles = [
            layer.register_forward_hook(add)
            for layer in model.modules()
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A
        ]
        try:
            with model.disable_adapter():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer, which reads what `ready` gives."""
        output = self.plain.get_output_embeddings()
        bias = getattr(output, "bias", None)
        return output.weight, bias if bias is None else self.ready(bias)

    def ready(self, hidden: Tensor) -> Tensor:
        """Final states as the output layer reads them: times the scale that some architectures put on their logits."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of what `ready` gave, in the dtype of the weights whatever autocast says: contrasts are of small
        differences.
        """
        layer = self.plain.get_output_embeddings()
        with torch.autocast(states.device.type, enabled=False):
            if type(layer) is nn.Linear and wide_results(layer.weight):
                logits = wide_logits(states, *self.head())
            elif self.scale == 1.0 or getattr(layer, "bias", None) is None:
                logits = layer(states.to(layer.weight.dtype)).float()
            else:
                logits = nn.functional.linear(states.to(layer.weight.dtype), *self.head()).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """[M, D] final states that predict the reply tokens of a `Completions` batch, ready for the output layer."""
        seen = sight(batch["part"], batch["example"]) if "example" in batch else None
        backbone = self.body
        shape = batch["input_ids"].shape
        if seen is None and rope.borders(self.plain.config):
            batch = batch | _with_length(batch)
        hidden = run_backbone(backbone, batch, seen).last_hidden_state[:, : shape[1]]
        return self.ready(hidden.flatten(0, 1)[batch["source"]])

    def forward(self, batch: dict[str, Tensor], top: bool = False) -> Tensor:
        """Log-probabilities of the reply tokens of a `Completions` batch, in fp32: [M].

        Args:
            top: also those of the tokens that the model itself finds likeliest: [M, 2].
        """
        states, (weight, bias) = self.states(batch), self.head()
        values = token_logprobs(states, weight, batch["targets"], bias, softcap=self.softcap)
        if not top:
            return values
        likeliest = top_tokens(states.detach(), weight, bias)
        return torch.stack([values, token_logprobs(states, weight, likeliest, bias, softcap=self.softcap)], 1)

    def sharded_parts(self) -> list[tuple[nn.Module, bool]]:
        """What FSDP cuts one by one, and whether it stays in fp32: each block, and the rest together, because ends may
        share their weights.
        """
        kinds = set(self.plain._no_split_modules or ())
        blocks = [module for module in self.plain.modules() if type(module).__name__ in kinds]
        return [(part, False) for part in (*blocks, self)]

    def save(self, folder: Path) -> None:
        """Write an ordinary ``save_pretrained`` folder (an adapter folder for LoRA)."""
        save_transformer(self.model, folder)


def _with_length(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of one text each, and a column of filling whose positions count the last token, which is not read."""
    ids, positions = batch["input_ids"], batch["position_ids"]
    counted = positions.amax(1, keepdim=True) + 1
    return {
        "input_ids": torch.cat([ids, torch.zeros_like(counted)], 1),
        "position_ids": torch.cat([positions, counted], 1),
    }


def load_policy(source: Source, saved: Path | None = None, trainable: bool = True) -> Policy:
    """A role's language model, pretrained or from a finished stage.

    Args:
        saved: folder of the stage's model.
        trainable: False for a model that is only read: nothing requires a gradient, and no fresh adapter is added.

    Raises:
        UserError: it has no language head, or logits that are not a linear map of its final states.
    """
    from peft import TaskType
    from transformers import AutoModelForCausalLM

    spec = source.spec
    model, missing = load_transformer(AutoModelForCausalLM, source, saved, frozen=not trainable)
    if missing:
        raise UserError(
            f"{source.role}.name: {spec.name} has no weights for {missing[0]}, so it cannot write; choose a language "
            "model"
        )
    if spec.train == "lora" and (trainable or saved is not None):
        model = with_lora(model, source, saved, TaskType.CAUSAL_LM, trainable)
    policy = checked_policy(model.eval(), source.chat, source.role, spec.name)
    if spec.gradient_checkpointing and trainable:
        recompute(policy.plain)
        if policy.adapted:
            policy.plain.enable_input_require_grads()
    if not trainable:
        policy.requires_grad_(False)
    return policy


def checked_policy(model: nn.Module, chat: Chat, role: str, name: str) -> Policy:
    """A language model in memory as a policy that writes nothing but tokens of its tokenizer.

    Args:
        model: a ``...ForCausalLM``, or a peft model around one, in evaluation mode.
        chat: how it writes dialogues. role, name: of the model, for messages.

    Raises:
        UserError: its logits are not a linear map of its final states.
    """
    with on_any_device(model.get_base_model() if hasattr(model, "get_base_model") else model):
        policy = Policy(model)
        with reading(role, name, "cannot be read by", "choose another architecture"):
            told(lambda: _check_head(policy, role, name))
    rows = len(policy.head()[0])
    if len(missing_ids(chat, rows)):
        policy.writable = torch.zeros(rows, dtype=torch.bool)
        policy.writable[torch.from_numpy(chat.ids[chat.ids < rows])] = True
    return policy


def missing_ids(chat: Chat, rows: int) -> np.ndarray:
    """Ids of a model with this many rows that no token of its tokenizer has."""
    return np.setdiff1d(np.arange(rows), chat.ids)


def padding(source: Source) -> dict[str, str]:
    """For cache keys: ids that a model may never write; nothing for a model that has none."""
    config = source.config.get_text_config(decoder=True)
    missing = missing_ids(source.chat, getattr(config, "vocab_size", None) or 0)
    return {"unwritable": digest(*map(str, missing.tolist()))} if len(missing) else {}


@torch.no_grad()
def _check_head(policy: Policy, role: str, name: str) -> None:
    """The output layer is applied here and not by the model, so that logits need not stand whole in memory."""
    device = policy.head()[0].device
    if device.type == "meta":  # of a plan: there are no numbers to compare
        return
    rows = len(policy.head()[0])
    tokens = torch.from_numpy(ordinary(rows, 5)).to(device)[None]
    places = torch.arange(4, device=device)
    batch = {"input_ids": tokens[:, :-1], "position_ids": places[None], "source": places}

    def both() -> tuple[Tensor, Tensor]:
        theirs = policy.plain(input_ids=tokens[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        return policy({**batch, "targets": tokens[0, 1:]}), theirs.gather(1, tokens[0, 1:, None])[:, 0]

    with quiet_loading():
        (ours, expected), exact = asked(policy.plain, both)
    tolerance = 1e-3 if exact else 0.1
    if not torch.allclose(ours, expected, atol=tolerance, rtol=tolerance):
        raise UserError(
            f"{role}.name: {name} ({type(policy.plain).__name__}): its logits are more than its "
            "output layer applied to its final states, softcapped or times one number, which is all that is supported "
            "here; choose another architecture"
        )
