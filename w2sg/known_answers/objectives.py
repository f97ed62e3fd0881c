"""The losses at one point, and the identities that a student must satisfy at the minimum of a KL divergence."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from w2sg import losses
from w2sg.known_answers.bench import Bench, Kept, linear, whitening
from w2sg.known_answers.result import Findings, Line, known
from w2sg.metrics.theory import three_point
from w2sg.models.heads import LinearHead, MixtureHead
from w2sg.store.files import read_json
from w2sg.training.label_modules import SoftLabelModule

LOGITS = np.array([[2.0, -1.0], [0.5, 0.2], [-1.0, 1.5], [0.1, 0.9]])
WEAK = np.array([0.2, 0.6, 0.9, 0.45])  # probabilities of the second class


class Fixed(Kept):
    """Constant logits, to see the value of a loss at one point through a whole fit."""

    def __init__(self, logits: np.ndarray):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.logits[batch["features"][:, 0, 0].long()]


@known(source="definitions; openai/weak-to-strong pull request 33 for the warm-up")
def loss_values(bench: Bench) -> Findings:
    """Every loss equals its definition on fixed logits, and the confidence loss warms up linearly inside a fit."""
    facts = Findings()
    s = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    w = np.stack([1 - WEAK, WEAK], 1)
    forward, reverse = -(w * np.log(s)).sum(1), -(s * np.log(w)).sum(1)
    mixed = s * w / (s * w).sum(1, keepdims=True)
    # the rows above the quantile of P(first) that leaves as many of them as the labels call first
    hard = s[:, 0] > np.quantile(s[:, 0], 1 - w[:, 0].mean())
    hardened = -np.where(hard, np.log(s[:, 0]), np.log(s[:, 1]))
    sure = np.abs(w[:, 0] - 0.5) >= 0.1
    expected = {
        "cross_entropy": forward,
        "forward_kl": forward + (w * np.log(w)).sum(1),
        "reverse_cross_entropy": reverse,
        "reverse_kl": reverse + (s * np.log(s)).sum(1),
        "product": -(mixed * np.log(s)).sum(1),
        "confidence": 0.5 * forward + 0.5 * hardened,
        "reverse_confidence": 0.5 * reverse + 0.5 * hardened,
        "cace": np.where(sure, forward, reverse),
        "symmetric": forward + 0.1 * reverse,
        "jeffreys": ((s - w) * (np.log(s) - np.log(w))).sum(1),
    }
    logits, weak = torch.tensor(LOGITS), torch.tensor(np.log(w))
    for name, values in expected.items():
        got = getattr(losses, name)(logits, weak)
        facts.add(name.replace("_", " "), values.mean(), got.mean(), 1e-9, "arithmetic in fp64")
    steps, warmup = 10, 0.4
    loss = partial(losses.confidence, alpha=0.5, warmup=warmup)
    rows = torch.arange(4.0)[:, None, None]
    folder = bench.fit("warm-up", Fixed(LOGITS), rows, weak, loss, lr=1e-12, steps=steps)
    curve = read_json(folder / "curve.json")
    share = 0.5 * np.minimum(1.0, np.arange(steps) / steps / warmup)
    values = ((1 - share[:, None]) * forward + share[:, None] * hardened).mean(1)
    got = [point["loss"] for point in curve]
    for step in (0, 2, 4, 9):
        words = f"confidence at {step / steps:.0%} of a fit, warm-up {warmup:.0%}"
        facts.add(words, values[step], got[step], 1e-6, "fp32")
    x = np.arange(steps) / steps
    lines = [Line("by definition", x, values, "theory"), Line("in the fit", x, got, "measured")]
    facts.draw("Confidence loss over its warm-up", "part of training", "loss", lines)
    return facts


@known(source="Mulgund & Pabbaraju 2025, arXiv 2501.19105; Yao et al. 2025, arXiv 2502.11107, Theorem 2")
def misfit_kl(bench: Bench) -> Findings:
    """The same in nats: KL(student‖truth) for cross entropy, the Pythagorean identity for reverse KL on mixtures."""
    facts, draw = Findings(), np.random.default_rng(2)
    n, width = 600, 12
    x = torch.tensor(draw.normal(size=(n, 6)) @ draw.normal(size=(6, width)) / 6**0.5).tanh()
    x = x @ whitening(x)
    truth = _log_p(x @ torch.tensor(draw.normal(size=(width, 2))))
    error = torch.tensor(np.tanh(draw.normal(size=(n, 6))) @ draw.normal(size=(6, 2)))
    weak = _log_p(truth * 0.5 + error)
    features = x.float()[:, None]
    points = {}
    for kind, labels in {"soft": weak, "hard": losses.hard_logits(weak.argmax(1), 2).double()}.items():
        given = (linear(width, 2), features, labels.float(), losses.cross_entropy)
        student = _log_p(bench.learn(f"forward-{kind}", *given, lr=3.0, steps=80, on=features))
        gain = (_log_p(labels).exp() * (student - truth)).sum(1).mean()
        misfit = (student.exp() * (student - truth)).sum(1).mean()  # KL(student || truth)
        words = f"CE(weak, truth) - CE(weak, student), {kind} labels"
        facts.add(words, misfit, gain, 2e-6, "residual gradient and fp32")
        points[f"cross entropy, {kind} labels"] = (float(misfit), float(gain))
    experts = MixtureHead(width, False, 2, 5)
    heads = [LinearHead(width, False, 2) for _ in range(5)]
    for head in heads:
        nn.init.normal_(head.score.weight, std=0.7, generator=torch.Generator().manual_seed(int(draw.integers(9**9))))
    experts.set_experts(heads)
    with torch.no_grad():
        experts.weights.copy_(torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1]).log())
        truth = _log_p(experts({"features": features}).double())
        experts.weights.zero_()
    weak = _log_p(truth + torch.tensor(draw.normal(size=(n, 2))) * 0.9)
    settings = {"lr": 0.03, "steps": 250, "module": SoftLabelModule, "on": features}
    student = _log_p(bench.learn("reverse", experts, features, weak.float(), losses.reverse_kl, **settings))
    parts = {k: float(v.mean()) for k, v in three_point(student, weak, truth.exp()).items()}
    share = float(experts.weights.detach().softmax(0).min())
    facts.add("smallest weight of the mixture", 0.01, share, 0.0, "the projection must be interior", ">=")
    before = (truth.exp() * (truth - weak)).sum(1).mean()
    after = (truth.exp() * (truth - student)).sum(1).mean()
    misfit = (student.exp() * (student - weak)).sum(1).mean()
    facts.add("KL(truth‖student) + KL(student‖weak), reverse KL", before, after + misfit, 1e-5, "residual gradient")
    facts.add("remainder of the three-point identity", 0.0, parts["remainder"], 1e-5, "residual gradient")
    facts.add("gain, as diagnostics measure it", before - after, parts["gain"], 1e-6, "fp32")
    facts.add("misfit, as diagnostics measure it", misfit, parts["misfit"], 1e-6, "fp32")
    points["reverse KL, mixture"] = (float(misfit), parts["gain"])
    ends = [0.0, 1.1 * max(x for x, _ in points.values())]
    lines = [Line("gain = misfit", ends, ends, "theory", colour=8)]
    lines += [Line.runs([point], name, colour=k) for k, (name, point) in enumerate(points.items())]
    facts.draw("Misfit is gain, in nats", "misfit", "gain", lines)
    return facts


def _log_p(logits: Tensor) -> Tensor:
    return log_softmax(logits.detach().double(), -1)
