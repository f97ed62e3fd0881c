"""Refinement of text: the strong model is a mixture of hidden Markov personas, read by the exact forward algorithm.

Vocabulary V, hidden states H, texts of L tokens, K personas. The first persona is the target. The weak model writes it
with a share of its tokens replaced at random. Every expectation over one or two texts is a sum over all texts.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from w2sg import losses
from w2sg.known_answers.bench import Bench, linear
from w2sg.known_answers.result import OWN, Findings, Line, known, standard_error

V, H, L, K = 4, 3, 4, 5


class Personas(nn.Module):
    """K hidden Markov models: texts [B, n, L] (token ids) to joint log-probabilities [B, K] of all n texts."""

    def __init__(self, start: np.ndarray, moves: np.ndarray, emits: np.ndarray):
        super().__init__()
        for name, value in {"start": start, "moves": moves, "emits": emits}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def log_likelihood(self, texts: Tensor) -> Tensor:
        """[B, n, K] log-probability of each text under each persona, by the forward algorithm."""
        emits = self.emits.permute(2, 0, 1)[texts]  # [B, n, L, K, H]
        state = self.start * emits[:, :, 0]
        total = torch.zeros(*texts.shape[:2], K)
        for t in range(texts.shape[2]):
            if t:
                state = torch.einsum("bnkh,khj->bnkj", state, self.moves) * emits[:, :, t]
            mass = state.sum(-1, keepdim=True)
            total, state = total + mass[..., 0].log(), state / mass
        return total

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.log_likelihood(batch["features"].long()).sum(1)


@known(source=f"the text twin of arXiv 2405.16236; {OWN}")
def personas(bench: Bench) -> Findings:
    """Refinement of text by a mixture of hidden Markov personas agrees with the exact sum over all texts."""
    facts, draw = Findings(), np.random.default_rng(9)
    start = draw.dirichlet(np.ones(H), size=K)
    moves, emits = draw.dirichlet(np.ones(H) * 0.7, size=(K, H)), draw.dirichlet(np.ones(V) * 0.5, size=(K, H)) + 0.02
    emits /= emits.sum(-1, keepdims=True)
    model = Personas(start, moves, emits)
    texts = np.array(list(product(range(V), repeat=L)))  # all texts
    clean = enumerated(start, moves, emits, texts)  # [K, texts]
    read = bench.read("all-texts", model, torch.tensor(texts)[:, None])
    worst = np.abs(read.exp().numpy().T - clean).max()
    facts.add("largest |forward - sum over hidden paths|", 0.0, worst, 1e-6, "fp32")
    posterior = clean / clean.sum(0)
    lines = []
    for colour, corrupted in enumerate((0.0, 0.2, 0.4)):
        weak = enumerated(start, moves, (1 - corrupted) * emits + corrupted / V, texts)[0]
        points = []
        affinity = (weak * np.sqrt(clean / clean[0])).sum(1)[1:]  # E sqrt(p_k / p_1): off-target mass is below its sum
        for n in (1, 2, 4, 8, 16):
            rows = texts[draw.choice(len(texts), p=weak, size=(3000, n))]
            name = f"contexts-{corrupted}-{n}"
            p = torch.softmax(bench.read(name, model, torch.tensor(rows)), -1).numpy()
            off = 1 - p[:, 0]
            points.append((n, off.mean(), standard_error(off)))
            words = f"off-target mass, {corrupted:.0%} corrupted, n = {n}"
            if n <= 2:
                exact = weak @ (1 - posterior[0]) if n == 1 else _two(clean, weak)
                facts.mean(words, exact, off, "4 s.e.; the sum over all texts is exact")
            if n == 16 and affinity.max() < 1:
                bound = min(1.0, float((affinity**n).sum()))
                facts.mean(f"{words}, bound", bound, off, relation="<=")
            if n == 16:
                _student(bench, facts, corrupted, clean, weak, texts, p[:500])
        x = np.arange(1, 17)
        bound = np.minimum(1, (affinity[:, None] ** x).sum(0))
        lines.append(Line(f"bound, {corrupted:.0%} corrupted", x, bound, "theory", colour=colour))
        lines.append(Line.runs(points, colour=colour))
    facts.draw("Personas", "texts in a context", "mass off the persona", lines, logy=True)
    # a Bayesian is calibrated: its mean mass on the truth equals the mean sum of its squares
    truth = draw.integers(0, K, 4000)
    rows = np.stack([texts[draw.choice(len(texts), p=clean[k] / clean[k].sum(), size=3)] for k in truth])
    p = torch.softmax(bench.read("calibration", model, torch.tensor(rows)), -1).numpy()
    above = p[np.arange(len(truth)), truth] - (p**2).sum(1)
    facts.mean("mass on the truth - sum of squares", 0.0, above)
    return facts


def enumerated(start: np.ndarray, moves: np.ndarray, emits: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[K, texts] probabilities by the sum over all hidden paths, without the forward algorithm."""
    total = np.zeros((len(start), len(texts)))
    for path in product(range(H), repeat=L):
        p = start[:, path[0], None] * emits[:, path[0]][:, texts[:, 0]]
        for t in range(1, L):
            p = p * moves[:, path[t - 1], path[t], None] * emits[:, path[t]][:, texts[:, t]]
        total += p
    return total


def _two(clean: np.ndarray, weak: np.ndarray) -> float:
    """Expected off-target mass after two texts of the weak model: a sum over all pairs of texts."""
    both = clean[:, :, None] * clean[:, None, :]
    return float((weak[:, None] * weak * (1 - both[0] / both.sum(0))).sum())


def _student(
    bench: Bench,
    facts: Findings,
    corrupted: float,
    clean: np.ndarray,
    weak: np.ndarray,
    texts: np.ndarray,
    posterior: np.ndarray,
) -> None:
    """Check two students of next tokens: one of labels refined in contexts of 16 texts, one of the weak labels.

    Cross entropy makes a student the mean of its labels, so its distance from the persona is known. The naive one has
    the corruption. The refined one has the personas that the contexts do not rule out.
    """

    def following(mass: np.ndarray) -> np.ndarray:
        """[..., V, V] P(second token | first) of texts with these probabilities [..., texts]."""
        pairs = np.eye(V)[texts[:, 0]][:, :, None] * np.eye(V)[texts[:, 1]][:, None]
        joint = np.tensordot(mass, pairs, 1)
        return joint / joint.sum(-1, keepdims=True)

    strong, naive = following(clean), following(weak)  # [K, V, V], [V, V]
    taught = {
        "naive": np.tile(naive, (len(posterior), 1)),
        "refined": np.einsum("tk,kxy->txy", posterior, strong).reshape(-1, V),
    }
    expected = {"naive": naive, "refined": np.einsum("k,kxy->xy", posterior.mean(0), strong)}
    first = np.tile(np.arange(V), len(posterior))  # the query of each row; its label is the token after it
    features, left = torch.tensor(np.eye(V)[first])[:, None] * V**0.5, {}  # one-hot, white
    for name, labels in taught.items():
        given = (linear(V, V), features, torch.tensor(np.log(labels), dtype=torch.float32), losses.cross_entropy)
        student = bench.learn(f"{name}-{corrupted}", *given, lr=3.0, steps=60, on=torch.eye(V)[:, None] * V**0.5)
        left[name] = float(losses.forward_kl(student, torch.tensor(np.log(strong[0]))).mean())
        theory = (strong[0] * np.log(strong[0] / expected[name])).sum(-1).mean()
        words = f"KL(persona‖student), {name}, {corrupted:.0%} corrupted"
        facts.add(words, theory, left[name], 1e-5, "residual gradient")
    if corrupted:
        words = f"refined - naive KL, {corrupted:.0%} corrupted"
        facts.add(words, 0.0, left["refined"] - left["naive"], 0.0, "refinement helps", "<=")
