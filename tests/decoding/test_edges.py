"""Decoders where numbers are equal, zero or missing: against every reply of small tables, worked out one by one."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_engines import STOPS, Ids, tiny

from w2sg.data.replies import Replies
from w2sg.decoding.contrastive import decode
from w2sg.decoding.drafting import switch_after
from w2sg.decoding.engine import Several, TabularEngine, Tilted
from w2sg.decoding.nudging import Nudging
from w2sg.decoding.sampling import Settings, candidates, head_mask, next_tokens
from w2sg.decoding.search import Hypothesis
from w2sg.decoding.search_values import ImplicitValue
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.evaluation.divergence import next_token_kl
from w2sg.losses.logprobs import position_kl
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.replies import best_of_n

INF = math.inf
FREE = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # columns of `Settings`: any token may be drawn
GREEDY = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]

# Two models over three tokens and an end. The aligned one never says token 2 first, the other never token 0.
E = 3
ALIGNED = np.array(
    [[0.6, 0.3, 0.0, 0.1], [0.2, 0.3, 0.4, 0.1], [0.5, 0.0, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25], [0.25] * 4]
)
OTHER = np.array([[0.0, 0.5, 0.4, 0.1], [0.0, 0.4, 0.5, 0.1], [0.3, 0.0, 0.4, 0.3], [0.0, 0.25, 0.5, 0.25], [0.25] * 4])


def tables(*models) -> TabularEngine:
    with np.errstate(divide="ignore"):
        return TabularEngine(np.stack(models))


def drawn(engine, columns, count: int, most: int = 3):
    """Replies to the empty prompt, at evenly spread random numbers of each step."""
    settings = Settings.from_columns(torch.tensor([columns] * count))
    uniform = torch.from_numpy(np.random.default_rng(0).random((count, most)))
    return decode(engine, [np.zeros(0, np.int64)], settings, uniform, [E], [0] * count)


def replies_of(table, most: int = 3):
    """Every reply that a model can write, with its probability."""
    for size in range(1, most + 1):
        for reply in itertools.product(range(4), repeat=size):
            if E in reply[:-1] or (size < most and reply[-1] != E):
                continue
            steps = [table[before + 1, token] for before, token in zip((-1, *reply), reply, strict=False)]
            yield reply, math.prod(steps)


# -- tokens that a model rules out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_aligned_model_never_says_is_never_written(alpha, temperature):
    found = drawn(tables(ALIGNED, OTHER), [alpha, 0.0, temperature, 0.0, 1.0, 1.0], 400)
    possible = {reply for reply, p in replies_of(ALIGNED) if p}
    assert {tuple(row.tolist()) for row in found.tokens} <= possible
    if alpha == 1:
        alone = drawn(tables(ALIGNED), [1.0, 0.0, temperature, 0.0, 1.0, 1.0], 400)
        assert [row.tolist() for row in found.tokens] == [row.tolist() for row in alone.tokens]
        assert all(
            (a[:, 0] == b[:, 0]).all() for a, b in zip(found.log_probabilities, alone.log_probabilities, strict=True)
        )


def test_alpha_1_is_the_aligned_model_where_rounding_would_tie_its_best_tokens():
    logits = torch.zeros(2, 1, 5000)
    logits[0, 0, :2] = torch.tensor([0.5, 0.50000006])  # next to each other in fp32
    assert logits[0].log_softmax(-1)[0, 0] == logits[0].log_softmax(-1)[0, 1]
    for count in (1, 2):
        tokens, _ = next_tokens(logits[:count], Settings.from_columns(torch.tensor([GREEDY])), torch.zeros(1))
        assert tokens.tolist() == [1]


def test_a_token_that_both_models_rule_out_has_no_part_in_a_value():
    value = ImplicitValue(tables(ALIGNED, OTHER), Letters(), True, [E])
    value.start([""])
    replies = [reply for reply, _ in replies_of(ALIGNED)]
    found = value.extend(
        [Hypothesis(0, 0, "", np.array(r), None, r[-1] == E, r[-1] != E, "", closing=1) for r in replies]
    )
    assert np.isfinite(found).all()
    with np.errstate(divide="ignore"):
        logs = [np.log(table).clip(-1e4) for table in (ALIGNED, OTHER)]
    for reply, worth in zip(replies, found, strict=True):
        steps = list(zip((-1, *reply), reply, strict=False))
        assert worth == pytest.approx(sum(float(logs[0][b + 1, t] - logs[1][b + 1, t]) for b, t in steps), abs=1e-9)


def test_rewards_of_written_replies_are_numbers():
    logs = [np.array([[-1.0, -INF], [-2.0, -1.0]]), np.array([[-INF, -INF]])]
    texts = ["x", "y"]
    replies = Replies(texts, texts, texts, np.ones(2, bool), np.zeros(2), np.zeros(2), {}, None, logs)
    assert replies.implicit_rewards().tolist() == [9998.0, 0.0]


def test_divergences_of_laws_with_zeros():
    with np.errstate(divide="ignore"):
        aligned, other = (torch.from_numpy(np.log(table)) for table in (ALIGNED, OTHER))
    everywhere = torch.from_numpy(np.log(np.full_like(ALIGNED, 0.25)))
    wanted = [sum(p * math.log(p / 0.25) for p in row if p) for row in ALIGNED]
    assert next_token_kl(everywhere, None, aligned, 0.0, 1.0).tolist() == pytest.approx(wanted, abs=1e-12)
    tilted = next_token_kl(everywhere, torch.stack([aligned, other]), None, 0.5, 1.0)
    engine = Tilted(tables(np.full_like(ALIGNED, 0.25)), tables(ALIGNED, OTHER), 0.5)
    law = torch.stack([engine.start([np.array([k])] if k >= 0 else [np.zeros(0)])[0, 0] for k in range(-1, 4)]).softmax(
        -1
    )
    assert tilted.tolist() == pytest.approx((law * (law.clamp(min=1e-300) / 0.25).log()).sum(-1).tolist(), abs=1e-9)
    assert next_token_kl(everywhere, torch.stack([aligned, aligned]), None, 2.0, 1.0).abs().max() < 1e-12


# -- vocabularies that are filled up by different amounts -------------------------------------------------------------


@pytest.fixture(scope="module")
def unequal():
    """Two models, of 64 and 70 rows."""
    return [tiny("llama", seed, size=rows) for seed, rows in enumerate((64, 70))]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_writing_and_reading_give_the_same_log_probabilities(unequal, order):
    policies = [unequal[k] for k in order]
    engine = Several(*map(TransformersEngine, policies))
    prompts = [np.arange(2, 9), np.arange(10, 13)]
    settings = Settings.from_columns(torch.tensor([[0.4, 0.1, 1.0, 0.0, 1.0, 1.0]] * 40))
    uniform = torch.from_numpy(np.random.default_rng(1).random((40, 5)))
    written = decode(engine, prompts, settings, uniform, STOPS, [0, 1] * 20)
    assert all((row < 64).all() for row in written.tokens)
    for place in range(6):
        prompt, tokens = prompts[place % 2], written.tokens[place]
        for column, policy in enumerate(policies):
            with torch.no_grad():
                logs = policy.plain(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
            wanted = logs[np.arange(len(tokens)) + len(prompt) - 1, tokens]
            assert written.log_probabilities[place][:, column] == pytest.approx(wanted.numpy(), abs=1e-5)
    # tokens that are given, the first by the logits before it
    engine.start(prompts)
    read = engine.read([written.tokens[0], written.tokens[1]])
    assert all(np.allclose(read[k], written.log_probabilities[k], atol=1e-5) for k in range(2))


def test_what_only_one_model_has_is_no_part_of_a_tilt(unequal):
    base, pair = TransformersEngine(unequal[1]), Several(*map(TransformersEngine, unequal))
    tilted = Tilted(base, pair, 0.7)
    logits = tilted.start([np.arange(2, 9)])
    assert logits.shape[-1] == 64 == len(tilted.writable)
    with torch.no_grad():
        small, large = (policy.plain(torch.arange(2, 9)[None]).logits[0, -1] for policy in unequal)
    assert torch.allclose(logits[0, 0], large[:64] + 0.7 * (small - large[:64]), atol=1e-4)


def test_the_divergence_of_models_with_other_numbers_of_rows():
    torch.manual_seed(0)
    states, wide = torch.randn(5, 8), torch.randn(12, 8)
    found = position_kl(states, wide[:10], states, wide)
    assert found.abs().max() < 1e-6  # the same law over the tokens that both have


# -- ties -------------------------------------------------------------------------------------------------------------


def test_tokens_on_the_border_of_the_head_are_in_it():
    for best, share in itertools.product(np.linspace(0.2, 0.6, 9), np.linspace(0.05, 1.0, 20)):
        rest = best / 100  # what does not sum to 1 is normalised
        logs = torch.tensor([[best, best * share, rest]], dtype=torch.float32).log().log_softmax(-1)
        assert bool(head_mask(logs, torch.tensor([share], dtype=torch.float32))[0, 1]), (best, share)
        assert not bool(head_mask(logs, torch.tensor([share * 1.0001], dtype=torch.float32))[0, 1]) or share == 1


def test_a_nucleus_is_no_larger_than_it_need_be():
    for parts in ([5, 3, 2], [3, 3, 2, 1, 1], [7, 1, 1, 1], [4, 2, 2, 1, 1]):
        scores = torch.tensor([parts], dtype=torch.float32).div(10).log()
        for size in range(1, len(parts)):
            top_p = torch.tensor([sum(parts[:size]) / 10], dtype=torch.float32)
            _, kept = candidates(scores, torch.ones(1), torch.zeros(1), top_p)
            assert int((kept > 0).sum()) == size
        _, kept = candidates(scores, torch.ones(1), torch.zeros(1), torch.ones(1))
        assert int((kept > 0).sum()) == len(parts)


def test_all_tokens_are_kept_at_top_p_1_beside_a_row_that_is_cut():
    scores = torch.full((2, 3000), -20.0)
    scores[:, 0] = 0.0  # the others have a share of 6e-6 together
    _, kept = candidates(scores, torch.ones(2), torch.zeros(2), torch.tensor([1.0, 0.5]))
    assert (kept > 0).sum(1).tolist() == [3000, 1]


def test_a_draft_is_taken_over_where_its_mean_is_the_threshold_in_fp32_as_well():
    for probability, window in itertools.product(np.arange(1, 100) / 100, (1, 3, 6)):
        logs = np.log(np.full(8, probability)).astype(np.float32)
        assert switch_after(logs, window, probability) == (window, True)
        assert switch_after(logs, window, probability * (1 + 3e-6)) == (8, False)


class Letters(Ids):
    """Tokens are their numbers; a prompt has none. Three begins no word, and ends a reply."""

    end, stop, stop_strings = E, [E], ()

    def __init__(self):
        self.tokenizer = self

    def prompts(self, prompts):
        return [np.zeros(0, np.int64) for _ in prompts]

    def decode(self, tokens, **_):
        return "".join(f" {int(token)}" for token in tokens)

    def cut(self, tokens, kept=0):
        return tokens, False


class Narrow(TabularEngine):
    """Numbers as a model gives them."""

    @property
    def logits(self):
        return super().logits.float()


@pytest.mark.parametrize("sure", [0.4, 0.55, 0.7])
def test_a_base_model_that_is_just_sure_enough_goes_on(sure):
    rest = (1 - sure) / 2
    base = np.array([[rest, sure, rest, 0.0]] * 5)
    small = np.array([[0.9, 0.05, 0.05, 0.0]] * 5)
    with np.errstate(divide="ignore"):
        engines = [Narrow(table[None]) for table in (small, base)]
    chats = Letters(), Letters()
    written = Nudging(*map(Side, engines, chats, (GREEDY, GREEDY)), sure, 5, ["x"], 0).write(["p"])[0]
    assert written.tokens.tolist() == [0, 1, 1, 1, 1]


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_reply_is_valued_with_the_end_that_was_written():
    policies = [tiny("llama", seed) for seed in (1, 2)]
    value = ImplicitValue(Several(*map(TransformersEngine, policies)), Ids(), True, STOPS)
    value.start(["7 8 9"])
    replies = [np.array([30, 31, end]) for end in (*STOPS, 32)]
    ended = [int(r[-1]) in STOPS for r in replies]
    found = value.extend([Hypothesis(0, 0, "", r, None, e, not e, "") for r, e in zip(replies, ended, strict=True)])
    for reply, worth in zip(replies, found, strict=True):
        with torch.no_grad():
            logs = [p.plain(torch.tensor([[7, 8, 9, *reply]])).logits[0].log_softmax(-1) for p in policies]
        wanted = sum(float(logs[0][2 + k, t] - logs[1][2 + k, t]) for k, t in enumerate(reply))
        assert worth == pytest.approx(wanted, abs=1e-4)


def test_an_end_that_the_guide_does_not_know_counts_as_its_own():
    class Guide(Ids):
        end, stop = 6, [6]

    value = ImplicitValue(TabularEngine(np.full((2, 65, 64), 1 / 64)), Guide(), True, STOPS)
    ends = [Hypothesis(0, 0, "", np.array([9, end]), None, True, False, "") for end in STOPS]
    assert [value.encode(h).tolist() for h in ends] == [[9, 6]] * 3


# -- the best of n ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.float32, bool])
def test_the_best_of_n_is_that_of_every_draw_whatever_numbers_rewards_are(dtype):
    generator = np.random.default_rng(0)
    proxy, gold = generator.integers(0, 3, (5, 4)), generator.integers(0, 2, (5, 4)).astype(dtype)
    for point in best_of_n(proxy, gold, Bootstrap(5)):
        draws = list(itertools.combinations(range(4), point["n"]))
        worth = [
            np.mean([np.mean([float(g[k]) for k in draw if p[k] == max(p[j] for j in draw)]) for draw in draws])
            for p, g in zip(proxy, gold, strict=True)
        ]
        assert point["gold"]["value"] == pytest.approx(np.mean(worth), abs=1e-12)


@pytest.mark.parametrize("side", ["proxy", "gold"])
def test_a_reward_that_is_no_number_is_not_the_best_of_all(side):
    rewards = {"proxy": np.zeros((3, 2)), "gold": np.zeros((3, 2))}
    rewards[side][1, 1] = np.nan
    with pytest.raises(ValueError, match=f"{side}: 1 of 6 numbers are NaN"):
        best_of_n(**rewards, bootstrap=Bootstrap(3))
