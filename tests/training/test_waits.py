"""Steps that ask the device nothing: on a GPU each question would wait for all that was asked before."""

from functools import partial

import numpy as np
import pytest
import torch
from fits import devices, options
from tiny_engines import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForSequenceClassification

from w2sg import losses
from w2sg.data.completions import Completions
from w2sg.data.loading import Examples, StageData
from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.losses import preferences
from w2sg.memory import Budget
from w2sg.models.scorer import LanguageScorer
from w2sg.training.label_modules import FitContext, FitModule, SoftLabelModule
from w2sg.training.text_modules import PreferenceModule, SupervisedModule, WeakTargetModule

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.item.default}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for numbers of a GPU, but in the optimizer: its counters are in host memory."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.outside, step = 0, True, torch.optim.AdamW.step

        def uncounted(*args, **kwargs):
            self.outside = False
            try:
                return step(*args, **kwargs)
            finally:
                self.outside = True

        monkeypatch.setattr(torch.optim.AdamW, "step", uncounted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        self.count += self.outside and (mask or func in WAITS)
        return func(*args, **(kwargs or {}))


def waits(make, examples, monkeypatch, micro=None) -> list[int]:
    """Of fits of four and of eight steps, with nothing to log in them."""
    counts = []
    monkeypatch.setattr(FitModule, "_check_now", lambda _: None)  # on a GPU it comes once in 16 steps
    monkeypatch.setattr(FitModule, "_point", lambda *_: None)
    for epochs in (2, 4):
        fit = FitContext(make.keywords["model"], options(batch_size=4), 1000, every=1000)
        module = make.func(fit, **{k: v for k, v in make.keywords.items() if k != "model"})
        trainer = devices().trainer(max_epochs=epochs, logger=False, limit_val_batches=0, enable_checkpointing=False)
        data = StageData(train=examples, batch_size=4, budget=Budget(rows=micro))
        with Waits(monkeypatch) as seen:
            trainer.fit(module, data)
        counts.append(seen.count)
    return counts


def rows_of(count: int, each: int, columns: int | None) -> Completions:
    random = np.random.default_rng(0)
    ids = [random.integers(0, 50, k) for k in random.integers(2, 9, (1 + each) * count)]
    replies = [tuple(ids[count + each * i : count + each * (i + 1)]) for i in range(count)]
    zeros = [np.zeros((sum(map(len, reply)), columns or 0), np.float32) for reply in replies]
    return Completions(ids[:count], replies, zeros if columns else None)


def scorer() -> LanguageScorer:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=50, num_labels=1, pad_token_id=0, **small)
    return LanguageScorer(LlamaForSequenceClassification(config), True, 2)


@pytest.fixture
def labelled():
    random = np.random.default_rng(0)
    texts = [[random.integers(0, 50, k).tolist() for k in random.integers(3, 9, 2)] for _ in range(8)]
    rows = pack([("a", "b")] * 8, lambda _: [text for pair in texts for text in pair], 32)
    return Examples(rows, [str(i) for i in range(8)], torch.zeros(8, dtype=torch.long), torch.randn(8, 2))


@pytest.mark.parametrize("loss", [losses.reverse_kl, losses.confidence, losses.cross_entropy])
@pytest.mark.parametrize("micro", [None, 2])
def test_a_step_on_labels_asks_the_device_nothing(loss, micro, labelled, monkeypatch):
    few, many = waits(partial(SoftLabelModule, model=scorer(), loss=loss), labelled, monkeypatch, micro)
    assert few == many


DPO = partial(preferences.sigmoid, beta=0.1)
ON_REPLIES = {
    "sft": (partial(SupervisedModule, confidence=0.5), 1, None),
    "dpo": (partial(PreferenceModule, loss=DPO, beta=0.1, supervised=0.5), 2, None),
    "wspo": (partial(WeakTargetModule, gamma=1.0), 1, 3),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("make", "each", "columns"), ON_REPLIES.values(), ids=ON_REPLIES)
def test_a_step_on_replies_asks_the_device_nothing(make, each, columns, kind, monkeypatch):
    rows = rows_of(8, each, columns)
    examples = Examples(rows, [str(i) for i in range(8)], torch.zeros(8, dtype=torch.long), torch.zeros(8, 2))
    few, many = waits(partial(make.func, model=tiny(kind).train(), **make.keywords), examples, monkeypatch, 2)
    assert few == many


def test_hard_labels_are_still_refused_by_losses_that_cannot_take_them(labelled, monkeypatch):
    hard = labelled.targets.clone()
    hard[5, 0] = -torch.inf
    examples = Examples(labelled.inputs, labelled.ids, labelled.first, hard)
    with pytest.raises(UserError, match="infinite on hard labels"):
        waits(partial(SoftLabelModule, model=scorer(), loss=losses.reverse_kl), examples, monkeypatch)
