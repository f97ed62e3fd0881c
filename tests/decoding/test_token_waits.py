"""Loops that ask the device nothing for a token: on a GPU each question would wait for all that was asked before."""

import numpy as np
import pytest
import torch
from tiny_engines import STOPS, Ids, draw, prompts_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from w2sg.decoding import sampling, waits
from w2sg.decoding.contrastive import decode, stream
from w2sg.decoding.drafting import Drafting, Rule
from w2sg.decoding.engine import Several, Tilted
from w2sg.decoding.sampling import Settings, candidates, choose, nucleus
from w2sg.decoding.search import EngineGrower
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError

aten = torch.ops.aten
ASKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.item.default}
ASKS |= {aten.is_nonzero.default, aten.equal.default, aten._unique2.default, aten.unique_dim.default}
PLAIN = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # columns of `Settings`
COLUMNS = {
    "greedy": [1.0, 0.0, 0.0, 0.0, 1.0, 1.0],
    "plain": PLAIN,
    "top_p": [1.0, 0.0, 0.8, 0.0, 0.9, 1.0],
    "top_k": [1.0, 0.0, 0.8, 20.0, 0.9, 1.0],
    "cong": [0.4, 0.1, 0.8, 0.0, 0.95, 1.2],
}


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for numbers of a GPU: those that are asked for, and boolean indices."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("cpu", "tolist"):
            usual = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self.counting(usual))

    def counting(self, usual):
        def asks(tensor, *given):
            self.count += 1
            return usual(tensor, *given)

        return asks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        self.count += mask or func in ASKS
        return func(*args, **(kwargs or {}))


KINDS = ["gpt2", "llama", "window", "mamba", "hybrid"]


@pytest.fixture(scope="module")
def engines():
    """Three models of each kind, made where they are asked for."""
    made: dict = {}

    def of(kind: str) -> list[TransformersEngine]:
        if kind not in made:
            made[kind] = [TransformersEngine(tiny(kind, seed)) for seed in range(3)]
        return made[kind]

    return of


@pytest.fixture(autouse=True)
def far(monkeypatch):
    """A device that does not answer at once."""
    monkeypatch.setattr(waits, "FREE", set())


def asked(monkeypatch, work) -> list[int]:
    """How often a device is asked for texts of 8 and of 24 tokens."""
    counts = []
    for most in (8, 24):
        with monkeypatch.context() as patch, Asked(patch) as seen:
            work(most)
        counts.append(seen.count)
    return counts


def engine_of(engines, what: str):
    if what == "tilted":
        return Tilted(engines[0], Several(*engines[1:]), 0.5)
    return Several(*engines[:2]) if what == "cong" else engines[0]


def write(engine, columns, most, stop=STOPS, rows=6):
    prompts = [draw(np.random.default_rng(k), 3 + k) for k in range(rows)]
    uniform = torch.from_numpy(np.stack([stream(0, str(k), 0, most) for k in range(rows)]))
    return decode(engine, prompts, Settings.alike(columns, rows, torch.device("cpu")), uniform, stop)


@pytest.mark.parametrize("what", [*COLUMNS, "tilted"])
def test_a_token_asks_the_device_nothing(engines, what, monkeypatch):
    for kind in KINDS if what == "top_p" else KINDS[:2]:
        engine, columns = engine_of(engines(kind), what), COLUMNS.get(what, COLUMNS["top_p"])
        few, many = asked(monkeypatch, lambda most, e=engine, c=columns: write(e, c, most, stop=[]))
        assert few == many, kind


def test_ends_are_looked_at_every_few_tokens_without_a_question(engines, monkeypatch):
    """Rows are let go of on the way, which asks nothing either."""
    engine, rows = engines("llama")[0], 24
    few, many = asked(monkeypatch, lambda most: write(engine, COLUMNS["cong"], most, rows=rows))
    assert few == many


def test_a_chunk_of_a_search_asks_as_often_however_long_it_is(engines, monkeypatch):
    def grow(most: int) -> None:
        chat = Ids()
        grower = EngineGrower(
            engines("llama")[0], chat.prompts, chat.text, ["a", "b"], PLAIN, [], most, 100, 0, room=[90, 90]
        )
        live = grower.start(prompts_of(2))
        for children in (3, 1):
            live = grower.grow(live, [children] * len(live))
            grower.keep(range(len(live)))

    few, many = asked(monkeypatch, grow)
    assert few == many


def test_a_look_at_drafts_asks_as_often_however_many_tokens_they_have(engines, monkeypatch):
    def draft(most: int) -> None:
        sides = (Side(engine, Ids(), PLAIN) for engine in engines("llama")[:2])
        Drafting(*sides, Rule(3, 2.0, most, 2 * most, 2 * most), ["a", "b"], 0).write(prompts_of(2))

    monkeypatch.setattr(Ids, "stop", [])
    few, many = asked(monkeypatch, draft)
    assert few == many


@pytest.mark.parametrize("what", COLUMNS)
def test_replies_are_those_of_a_device_that_answers_at_once(engines, what, monkeypatch):
    engine = engine_of(engines("llama"), what)
    late = write(engine, COLUMNS[what], 24, rows=24)
    monkeypatch.setattr(waits, "FREE", {"cpu"})
    now = write(engine, COLUMNS[what], 24, rows=24)
    assert [t.tolist() for t in late.tokens] == [t.tolist() for t in now.tokens]
    assert late.stopped.tolist() == now.stopped.tolist()
    for a, b in zip(late.log_probabilities, now.log_probabilities, strict=True):
        assert np.allclose(a, b, atol=1e-4)
    assert now.useful < now.forwards < late.forwards  # rows that ended are seen to have ended a little later


@pytest.mark.parametrize("size", [5, 300])
def test_a_nucleus_without_a_sort_is_that_of_a_sort(size):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(400, size, generator=generator)
    scores[::3] = scores[::3].round()  # ties
    scores[::5, 2:] = -torch.inf
    top_p = torch.rand(400, generator=generator)
    top_p[::7] = 1.0
    top_p[1::7] = 0.0
    kept = nucleus(scores.softmax(-1), torch.where(top_p < 1, top_p - sampling.TIE, torch.inf))
    ids, wanted = candidates(scores, torch.ones(400), torch.zeros(400), top_p)
    law = (scores.softmax(-1) * kept).double()
    found = torch.zeros(400, size, dtype=torch.float64).scatter(1, ids, wanted)
    # of equal tokens on the border a sort may take others, but not more of them
    assert ((kept & (scores > -torch.inf)).sum(1) == (found > 0).sum(1)).all()
    law = law / law.sum(1, keepdim=True)
    assert torch.allclose(law.sort(1).values, found.sort(1).values, atol=1e-6)
    apart = torch.ones(400, dtype=torch.bool)
    apart[::3] = False
    assert torch.allclose(law[apart], found[apart], atol=1e-6)


def test_tokens_drawn_without_a_question_are_those_drawn_with_them(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    scores, uniform = 2 * torch.randn(500, 200, generator=generator), torch.rand(500, generator=generator)
    for columns in (COLUMNS["top_p"], COLUMNS["top_k"], PLAIN, COLUMNS["greedy"], [1.0, 0.0, 0.8, 7.0, 1.0, 1.0]):
        settings = Settings.alike(columns, 500, torch.device("cpu"))
        late = choose(scores, settings, uniform)
        with monkeypatch.context() as patch:
            patch.setattr(waits, "FREE", {"cpu"})
            assert choose(scores, settings, uniform).tolist() == late.tolist(), columns


def test_numbers_that_are_none_are_found_late_and_named(engines):
    policy = tiny("llama")
    engine = TransformersEngine(policy)
    with torch.no_grad():
        policy.plain.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="LlamaForCausalLM in float32 gave logits that are no numbers"):
        write(engine, PLAIN, 12)
    engine.start([np.arange(3)])
    with pytest.raises(UserError, match="gave logits that are no numbers"):
        engine.read([np.arange(3)])
    engine = engines("llama")[0]
    engine.writable = torch.zeros(64, dtype=torch.bool)
    try:
        with pytest.raises(UserError, match="every token is ruled out"):
            write(engine, PLAIN, 12)
    finally:
        engine.writable = None
