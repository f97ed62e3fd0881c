"""Models that score texts: a pretrained backbone with a reward or classification head, or a bag of words.

Everything here reads packed rows (`w2sg.data.rows`) and pools each text at its true last token, known from its length.
Scores have one column per text of a pair ([B, 2], rewards) or one per class ([B, C]).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from w2sg.data.masks import run_backbone, sight
from w2sg.errors import UserError
from w2sg.models.backbones import recompute
from w2sg.models.heads import BagOfWords
from w2sg.models.loading import load_transformer, save_transformer, with_lora
from w2sg.models.mixed import in_fp32
from w2sg.models.source import Source


class LanguageScorer(nn.Module):
    """A causal language model's body with a linear head without bias on the last token of each text.

    The head is the ``score`` layer of transformers' sequence classification models, so a trained scorer is saved as an
    ordinary folder. With ``outputs=1`` the score of a text is its reward; a pair then has scores [B, 2].

    Args:
        model: a ``...ForSequenceClassification`` (or a peft model around one).
        pairs: whether examples are pairs (two texts, one reward each) or single texts (one logit per class).
        full_depth: blocks of the uncut backbone.

    Attributes:
        head: where its head comes from, in words, if that has to be said.
    """

    head: str | None = None

    def __init__(self, model: nn.Module, pairs: bool, full_depth: int):
        super().__init__()
        self.model = model
        self.pairs = pairs
        self.full_depth = full_depth

    @property
    def _plain(self) -> nn.Module:
        get_base = getattr(self.model, "get_base_model", None)  # peft wraps the model
        return get_base() if get_base else self.model

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, n, D] last hidden state at the last token of each text."""
        return gather(self._backbone(batch).last_hidden_state, batch["ends"])

    def _backbone(self, batch: dict[str, Tensor]):
        packed = batch["ends"].shape[1] > 1 and len(batch["ends"]) == len(batch["input_ids"])
        seen = sight(batch["segments"]) if packed else None
        return run_backbone(self._plain.base_model, batch, seen)

    def features(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        """[B, n, len(layers), D] hidden states at the last token of each text, in fp32.

        Layer k is the residual stream after block k; the last layer is what the backbone returns, after its norm.
        """
        return self._states(batch, layers, batch["ends"])[0]

    def features_and_scores(self, batch: dict[str, Tensor], layers: Sequence[int], back: int) -> tuple[Tensor, Tensor]:
        """`features` of texts without their last ``back`` tokens, and `forward` of the whole texts, by one forward.

        No token sees those after it, so the features are what a forward over the shorter texts gives.
        """
        states, final = self._states(batch, layers, batch["ends"] - back)
        return states, self._score(gather(final, batch["ends"]))

    def _states(self, batch: dict[str, Tensor], layers: Sequence[int], ends: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, len(layers), D] states at ``ends``, and the backbone's output at all tokens."""
        blocks = self._blocks()
        caught: dict[int, Tensor] = {}

        def catch(layer: int):
            def hook(_module, _inputs, output):
                caught[layer] = output[0] if isinstance(output, tuple | list) else output

            return hook

        full = self.full_depth
        handles = [blocks[k - 1].register_forward_hook(catch(k)) for k in layers if k < full]
        try:
            final = self._backbone(batch).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        for layer, state in caught.items():
            if state.shape != final.shape:
                raise UserError(
                    f"{type(self._plain).__name__}: block {layer} hands on more than one stream, which no head can "
                    "read; train its last layer with feature_layer=null, which reads the final hidden state"
                )
        # a block may stand on another device than the last one
        states = [gather(caught[k].to(final.device) if k < full else final, ends).float() for k in layers]
        return torch.stack(states, 2), final

    def _blocks(self) -> nn.ModuleList:
        depth = self._plain.config.num_hidden_layers
        for module in self._plain.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise UserError(
            f"cannot find the {depth} blocks of {type(self._plain).__name__}; train its last layer with "
            "feature_layer=null, which reads the final hidden state"
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores in fp32, also under autocast: [B, 2] rewards of a pair's texts, or [B, C] class logits."""
        return self._score(self.hidden(batch))

    def _score(self, hidden: Tensor) -> Tensor:
        head = self._plain.score
        with in_fp32(hidden):
            scores = head(hidden.to(_weight(head).dtype)).float()
        return scores.squeeze(-1) if self.pairs else scores.squeeze(1)

    def sharded_parts(self) -> list[tuple[nn.Module, bool]]:
        """What FSDP cuts one by one, and whether it stays in fp32: each block, and the head apart from the body, whose
        features are read alone.
        """
        plain = self._plain
        kinds = set(plain._no_split_modules or ())
        blocks = [module for module in plain.base_model.modules() if type(module).__name__ in kinds]
        return [*((part, False) for part in (*blocks, plain.base_model)), (plain.score, True)]

    def save(self, folder: Path) -> None:
        """Write an ordinary ``save_pretrained`` folder (an adapter folder for LoRA)."""
        save_transformer(self.model, folder)


def gather(hidden: Tensor, ends: Tensor) -> Tensor:
    """[B, n, D] states of a forward where each text ends."""
    if len(hidden) != len(ends):  # a row per text: [B * n, L, D]
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, ends.flatten()].unflatten(0, ends.shape)
    return hidden.gather(1, ends[:, :, None].expand(-1, -1, hidden.shape[-1]))


def _weight(head: nn.Module) -> Tensor:
    return next(head.parameters())


def load_language_model(
    source: Source,
    pairs: bool,
    classes: int,
    saved: Path | None = None,
    depth: int | None = None,
    as_it_is: bool = False,
) -> LanguageScorer:
    """Load a backbone with its head, in the dtype that was asked for; the head itself is kept in fp32.

    Args:
        pairs: a scalar reward head, else one output per class.
        saved: folder of a finished stage to load in place of the pretrained weights.
        depth: use this many blocks only; default is ``spec.layers`` or all.
        as_it_is: the head must come with the weights.

    Raises:
        UserError: it has no head, or no trained one where ``as_it_is`` asks for that, or one of another shape.
    """
    from transformers import AutoModelForSequenceClassification as Auto

    spec = source.spec
    lora = spec.train == "lora"
    no = f"{source.role}: {spec.name} is no reward model"
    if as_it_is and source.config.num_labels != 1:
        raise UserError(f"{no}: it has {source.config.num_labels} outputs and not one")
    outputs = 1 if pairs else classes
    frozen = as_it_is or saved is not None or spec.train == "head"
    model, missing = load_transformer(Auto, source, saved, depth, frozen, num_labels=outputs)
    if as_it_is and missing:
        raise UserError(f"{no}: it has no weights for {missing[0]}")
    if lora:
        from peft import TaskType

        model = with_lora(model, source, saved, TaskType.SEQ_CLS)  # keeps the score head trainable, saved with it
    plain = model.get_base_model() if lora else model
    if not isinstance(getattr(plain, "score", None), nn.Module):
        raise UserError(f"{type(plain).__name__} has no `score` head; only decoder models can be scored here")
    head = None
    if saved is None and not as_it_is and spec.train != "head":
        head = _first_head(plain, source, missing, outputs)
    plain.score.float()
    if saved is not None and spec.dtype != "float32" and not _weight(plain.score).is_meta:
        _restore_head(plain.score, saved)
    if spec.gradient_checkpointing:
        # transformers checkpoints only modules in training mode; dropout is off in the config instead of by eval().
        recompute(plain)
        if lora:
            plain.enable_input_require_grads()
    scorer = LanguageScorer(model, pairs, source.full_depth).eval()
    scorer.head = head
    return scorer


@torch.no_grad()
def _first_head(plain: nn.Module, source: Source, missing: list[str], outputs: int) -> str:
    """What training starts from, said in words; a trained head is drawn anew where that was asked for.

    Raises:
        UserError: the trained head has another shape than is needed.
    """
    spec = source.spec
    if missing or source.gguf is not None or spec.random_init:
        if source.scored and spec.head_weights == "kept":
            raise UserError(
                f"{source.role}.head_weights: the trained head of {spec.name} has another shape than the {outputs} "
                f"outputs that are needed here; set {source.role}.head_weights=fresh"
            )
        return "drawn at random"
    if spec.head_weights == "kept":
        return f"kept: {spec.name} is a trained scorer and starts with its own head (head_weights=kept)"
    plain.score.weight.normal_(std=getattr(plain.config, "initializer_range", None) or 0.02)
    if plain.score.bias is not None:
        plain.score.bias.zero_()
    return f"drawn at random: the trained head of {spec.name} is not used (head_weights=fresh)"


def _restore_head(head: nn.Linear, saved: Path) -> None:
    """Loading in a low-precision dtype rounds the head as well; read it again as it was saved."""
    for file in sorted(saved.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if key.endswith("score.weight"):
                    with torch.no_grad():
                        head.weight.copy_(tensors.get_tensor(key))


def load_scorer(
    source: Source, pairs: bool, classes: int, saved: Path | None = None, as_it_is: bool = False
) -> nn.Module:
    """The token-reading model of a role, pretrained or from a finished stage; ``as_it_is`` with its own head."""
    if source.spec.arch == "bow":
        model = BagOfWords(source.spec.bow.buckets, pairs, classes)
        if saved is not None:
            model.load_state_dict(load_file(saved / "model.safetensors"))
        return model
    return load_language_model(source, pairs, classes, saved, as_it_is=as_it_is)
