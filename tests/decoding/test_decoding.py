"""Scores, sampling and the decoder: against numbers worked out by hand, plain sorts and models read without a cache."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from scipy.stats import chisquare
from torch import nn
from transformers.pytorch_utils import Conv1D

from w2sg.config.options import alpha_of_gamma
from w2sg.data.completions import Completions
from w2sg.decoding import caches, prefix_cache
from w2sg.decoding.contrastive import ReplyRows, decode, stream
from w2sg.decoding.engine import Several
from w2sg.decoding.packed_layers import pack
from w2sg.decoding.sampling import Settings, candidates, choose, contrastive_scores, head_mask, penalise
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.models.policy import Policy

# reference checks 01, 02, 03, 05, 06 and 08 of ConG
ALIGNED = [2.0, 1.5, 0.3, -0.2, -1.0, -3.0, 0.9, -0.5]
UNTUNED = [2.2, 0.4, 0.6, 0.1, -0.8, -2.0, 1.2, -1.5]
INF = math.inf
SCORES = {
    0.0: [-0.1972130489, 1.1027869511, -0.2972130489, -0.2972130489, -INF, -INF, -0.2972130489, -INF],
    0.4: [-0.4637366327, 0.1162633673, -1.2037366327, -1.4037366327, -INF, -INF, -0.9637366327, -INF],
    0.5: [-0.5303675287, -0.1303675287, -1.4303675287, -1.6803675287, -INF, -INF, -1.1303675287, -INF],
    1.0: [-0.8635220084, -1.3635220084, -2.5635220084, -3.0635220084, -INF, -INF, -1.9635220084, -INF],
}
TILT = [0.15746475587172873, 0.6712902863842813, 0.024759312007537778, 0.015017281845962814]
TILT += [0.007839708566114758, 0.000319563799702915, 0.045114407893669085, 0.07819468363100256]
REWARD_OF_ALPHA = {0.0: 0.47119320986183844, 0.4: 0.36089670064655943, 1.0: 0.14812376768590935}


def row(values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def logs(values) -> torch.Tensor:
    return row(values).log_softmax(-1)


def one(value: float) -> torch.Tensor:
    return torch.tensor([float(value)])


def settings_of(count: int, **given) -> Settings:
    """The same plain settings for all rows, but for what is given (a number, or one for each row)."""
    plain = {
        "alpha": 1.0,
        "relative_top": 0.0,
        "temperature": 1.0,
        "top_k": 0.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    columns = {name: torch.as_tensor(given.get(name, value)).float() for name, value in plain.items()}
    return Settings(**{name: column.expand(count).clone() for name, column in columns.items()})


def law(scores, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The law of the next token by a plain full sort, in double precision: [V]."""
    scaled = np.asarray(scores, np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-probabilities, kind="stable")
    if top_k:
        probabilities[order[int(top_k) :]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    if top_p < 1:
        probabilities[order[1:][before[1:] >= top_p]] = 0
    return probabilities / probabilities.sum()


def found_law(scores: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The law of one row by the code under test: [V]."""
    ids, probabilities = candidates(scores, one(temperature), one(top_k), one(top_p))
    assert (ids[:, 1:] > ids[:, :-1]).all()  # inverse-CDF draws go by token id
    return torch.zeros(scores.shape, dtype=torch.float64).scatter(1, ids, probabilities)[0].numpy()


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", sorted(SCORES))
def test_scores_are_those_of_the_reference(alpha):
    for dtype in (torch.float32, torch.float64):
        found = contrastive_scores(logs(ALIGNED).to(dtype), logs(UNTUNED).to(dtype), one(alpha), one(0.1))[0]
        assert found.tolist() == pytest.approx(SCORES[alpha], abs=1e-6)
    assert int(found.argmax()) == (0 if alpha == 1 else 1)


def test_gamma_and_alpha_are_one_family():
    alpha, temperature = alpha_of_gamma(1.5, 1.0)
    assert (alpha, temperature) == pytest.approx((0.4, 0.4))
    scores = contrastive_scores(logs(ALIGNED), logs(UNTUNED), one(alpha), one(0))
    assert (scores / temperature).softmax(-1)[0].tolist() == pytest.approx(TILT, abs=1e-6)
    for gamma in (0.0, 0.25, 1.0, 4.0):
        alpha, temperature = alpha_of_gamma(gamma, 0.8)
        tilt = (1 + gamma) * logs(ALIGNED) - gamma * logs(UNTUNED)
        scores = contrastive_scores(logs(ALIGNED), logs(UNTUNED), one(alpha), one(0))
        assert scores.argmax() == tilt.argmax()
        wanted = (tilt / 0.8).softmax(-1)[0].tolist()
        assert found_law(scores, temperature).tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_tilt_maximises_reward_less_divergence():
    generator = np.random.default_rng(0)
    reward, gamma = (logs(ALIGNED) - logs(UNTUNED))[0].numpy(), 1.0
    alpha, temperature = alpha_of_gamma(gamma, 1.0)
    found = found_law(contrastive_scores(logs(ALIGNED), logs(UNTUNED), one(alpha), one(0)), temperature)
    own = logs(ALIGNED)[0].numpy()
    value = lambda p: (p * (gamma * reward - np.log(p) + own)).sum()  # noqa: E731
    assert all(value(found) > value(p) for p in generator.dirichlet(np.ones(8), 200))
    assert found @ reward == pytest.approx(0.5704948290814853, abs=1e-6)  # check 08 at gamma = 1


@pytest.mark.parametrize("alpha", sorted(REWARD_OF_ALPHA))
def test_expected_reward_of_an_alpha(alpha):
    scores = contrastive_scores(logs(ALIGNED), logs(UNTUNED), one(alpha), one(0))
    reward = (logs(ALIGNED) - logs(UNTUNED))[0].numpy()
    assert found_law(scores) @ reward == pytest.approx(REWARD_OF_ALPHA[alpha], abs=1e-6)


def test_the_limits_of_alpha():
    same = contrastive_scores(logs(ALIGNED), logs(ALIGNED), one(0), one(0.1))
    assert found_law(same).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0, 0, 0.2, 0], abs=1e-6)
    flat = contrastive_scores(logs(ALIGNED), logs(ALIGNED), one(0.4), one(0))
    assert found_law(flat).tolist() == pytest.approx((row(ALIGNED) / 2.5).softmax(-1)[0].tolist(), abs=1e-6)
    for reference in (None, logs(UNTUNED)):
        plain = contrastive_scores(logs(ALIGNED), reference, one(1), one(0))
        assert found_law(plain).tolist() == pytest.approx(row(ALIGNED).softmax(-1)[0].tolist(), abs=1e-6)


def test_the_head_is_of_the_untempered_aligned_model():
    unnormalised = row([0.5, 0.0505, 0.0495, 0.2, 0.199999, 1e-6]).log()
    kept = lambda logits, top: torch.nonzero(head_mask(logits.log_softmax(-1), one(top))[0])[:, 0].tolist()  # noqa: E731
    assert kept(unnormalised, 0.1) == [0, 1, 3, 4]
    assert kept(unnormalised + 7, 0.1) == [0, 1, 3, 4]
    assert kept(unnormalised, 1.0) == [0]
    assert kept(unnormalised, 0.0) == [0, 1, 2, 3, 4, 5]
    # a reference that likes other tokens, an alpha and a temperature change nothing of it
    scores = contrastive_scores(unnormalised.log_softmax(-1), unnormalised.flip(1).log_softmax(-1), one(0), one(0.1))
    ids = torch.nonzero(torch.tensor(found_law(scores, temperature=0.5)))[:, 0].tolist()
    assert set(ids) <= {0, 1, 3, 4}
    assert torch.nonzero(scores[0] > -INF)[:, 0].tolist() == [0, 1, 3, 4]


def test_the_best_token_of_the_aligned_model_is_always_kept():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 30.0):
        log_aligned = (torch.randn(50, 97) * scale).log_softmax(-1)
        for top in (2.0, 1.0, 1 - 1e-7, 0.1):
            mask = head_mask(log_aligned, torch.full((50,), top))
            assert mask.gather(1, log_aligned.argmax(-1, keepdim=True)).all()


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_constant_in_the_logits_changes_nothing(penalty):
    written = torch.tensor([[1, 6]])
    shifts = itertools.product((0.0, 7.06, -40.0), (0.0, -7.06, 33.0))
    laws = []
    for a, b in shifts:
        scores = contrastive_scores(
            (row(ALIGNED) + a).log_softmax(-1), (row(UNTUNED) + b).log_softmax(-1), one(0.4), one(0.1)
        )
        laws.append(penalise(scores, written, one(penalty)).softmax(-1))
        # nor does a constant that was added to the scores themselves, as an unnormalised mask would do
        laws.append(penalise(scores + 7.06, written, one(penalty)).softmax(-1))
    assert all(torch.allclose(laws[0], other, atol=1e-7) for other in laws)


def test_the_penalty_is_of_log_probabilities_of_tokens_written():
    scores = contrastive_scores(logs(ALIGNED), logs(UNTUNED), one(0.4), one(0.1))
    found = penalise(scores, torch.tensor([[1, 1, 6, 5]]), one(1.2))[0]
    wanted = scores.log_softmax(-1)[0]
    for token in (1, 6, 5):  # each once, however often it was written; what is left out stays out
        wanted[token] *= 1.2
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    assert penalise(scores, torch.tensor([[1, 6]]), one(1)) is scores
    two = penalise(scores.expand(2, -1), torch.tensor([[1], [1]]), torch.tensor([1.0, 1.2]))
    assert two[0].softmax(-1).tolist() == pytest.approx(scores[0].softmax(-1).tolist())
    assert two[1, 1] < two[0, 1]


# -- the next token ---------------------------------------------------------------------------------------------------


def test_the_sampling_pipeline_of_the_reference():
    scores = contrastive_scores(logs(ALIGNED), logs(UNTUNED), one(0.5), one(0.1)).float()
    final = [0.2714985362600374, 0.4476254116958738, 0.08814266968100151, 0.06448655471570203, 0, 0]
    assert found_law(scores, 0.8, 0, 0.95).tolist() == pytest.approx([*final, 0.12824682764738524, 0], abs=1e-6)
    cut = [0.29021339845899313, 0.4784810030815138, 0.094218495870164, 0, 0, 0, 0.13708710258932907, 0]
    assert found_law(scores, 0.8, 0, 0.9).tolist() == pytest.approx(cut, abs=1e-6)
    uniforms = torch.tensor([0.05, 0.5, 0.93, 0.999])
    for top_p in (0.95, 0.9):
        settings = settings_of(4, temperature=0.8, top_p=top_p)
        assert choose(scores.expand(4, -1), settings, uniforms).tolist() == [0, 1, 6, 6]


def test_top_k_comes_before_top_p():
    scores = row([0.4, 0.3, 0.2, 0.1]).log()
    # of the best two, 4/7 and 3/7, a nucleus of 0.55 is the first alone; of all four it would have been both
    assert found_law(scores, 1.0, 2, 0.55).tolist() == pytest.approx([1, 0, 0, 0])
    assert found_law(scores, 1.0, 0, 0.55).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert found_law(scores, 1.0, 3, 1.0).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert found_law(scores, 1.0, 9, 1.0).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert found_law(scores, 1.0, 1, 0.0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("vocabulary", [5, 64, 65, 1000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
def test_candidates_are_those_of_a_plain_full_sort(vocabulary, spread):
    torch.manual_seed(vocabulary)
    rows = list(
        itertools.product((0.3, 1.0, 2.5), (0, 1, 3, 64, 100, 300, 2000), (0.0, 0.1, 0.6, 0.951, 1.0))
    )  # one batch of all settings: what one row needs must not show in another
    scores = torch.randn(len(rows), vocabulary) * spread
    scores[::3, :: max(2, vocabulary // 50)] = -INF
    columns = torch.tensor(rows)
    ids, probabilities = candidates(scores, *columns.unbind(1))
    dense = torch.zeros(scores.shape, dtype=torch.float64).scatter(1, ids, probabilities).numpy()
    for line, values, given in zip(dense, scores.numpy(), rows, strict=True):
        wanted = law(values, *given)
        if given[2] < 1:  # at 1, rounding may leave out the very last
            assert (line > 0).sum() == (wanted > 0).sum()
        assert np.abs(line - wanted).max() < 2e-5


def test_candidates_alone_are_those_in_a_batch():
    torch.manual_seed(1)
    scores = torch.randn(12, 500) * 0.1
    settings = (torch.ones(12), torch.tensor([0.0, 100.0, 70.0] * 4), torch.linspace(0.2, 1.0, 12))
    ids, probabilities = candidates(scores, *settings)
    dense = torch.zeros(scores.shape, dtype=torch.float64).scatter(1, ids, probabilities)
    for k in range(12):
        alone = found_law(scores[k : k + 1], *(float(column[k]) for column in settings))
        assert np.abs(alone - dense[k].numpy()).max() < 1e-6


def test_tied_scores_share_their_probability():
    scores = torch.zeros(1, 300)
    assert found_law(scores).tolist() == pytest.approx([1 / 300] * 300)
    found = found_law(scores, 1.0, 0, 0.501)
    assert (found > 0).sum() == 151
    assert found[found > 0] == pytest.approx(1 / 151)
    assert (found_law(scores, 1.0, 80, 1.0) > 0).sum() == 80


def test_draws_follow_the_law():
    torch.manual_seed(2)
    scores = torch.randn(1, 40)
    wanted = law(scores[0].numpy(), 0.7, 30, 0.9)
    settings = settings_of(20000, temperature=0.7, top_k=30, top_p=0.9)
    uniform = torch.from_numpy(np.random.default_rng(3).random(20000))
    counts = torch.bincount(choose(scores.expand(20000, -1), settings, uniform), minlength=40).numpy()
    assert (counts[wanted == 0] == 0).all()
    assert chisquare(counts[wanted > 0], 20000 * wanted[wanted > 0] / wanted.sum()).pvalue > 1e-3


def test_a_draw_is_where_the_distribution_function_passes_u():
    scores = row([0.25, 0.5, 0.0, 0.25]).log().expand(7, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999, 1 - 1e-12], dtype=torch.float64)
    assert choose(scores, settings_of(7), uniform).tolist() == [0, 0, 1, 1, 3, 3, 3]
    # a sum that rounding left below u ends at the last token that may be taken
    assert choose(torch.zeros(1, 3), settings_of(1), torch.tensor([2.0])).tolist() == [2]
    assert choose(scores[:1], settings_of(1, top_k=1), torch.tensor([2.0])).tolist() == [1]


def test_temperature_zero_takes_the_best_beside_rows_that_sample():
    scores = row([0.3, 0.4, 0.2, 0.1]).log().expand(3, -1)
    uniform = torch.tensor([0.999, 0.999, 0.001])
    assert choose(scores, settings_of(3, temperature=0.0), uniform).tolist() == [1, 1, 1]
    assert choose(scores, settings_of(3, temperature=[0.0, 1.0, 1.0]), uniform).tolist() == [1, 3, 0]


def test_a_stream_hangs_on_seed_prompt_and_sample_alone():
    first = stream(1, "a", 0, 50)
    assert (stream(1, "a", 0, 20) == first[:20]).all()  # nor on the most tokens that are allowed
    others = [stream(2, "a", 0, 50), stream(1, "b", 0, 50), stream(1, "a", 1, 50)]
    assert all(not np.isin(other, first).any() for other in others)
    many = np.concatenate([stream(0, f"{k:016x}", 0, 5) for k in range(2000)])
    assert many.min() >= 0
    assert many.max() < 1
    counts = np.histogram(many, 20, (0, 1))[0]
    assert chisquare(counts).pvalue > 1e-3
    rows = ReplyRows(
        [np.arange(3), np.arange(5)],
        ["p", "q"],
        np.array([0, 0, 1, 1]),
        np.array([0, 1, 0, 1]),
        np.array([[0.4, 0.1, 0.8, 0, 0.95, 1.2]] * 4),
        max_new_tokens=6,
        seed=9,
    )
    batch = rows.collate([3, 0])
    assert batch["uniform"].tolist() == [stream(9, "q", 1, 6).tolist(), stream(9, "p", 0, 6).tolist()]
    assert rows.lengths.tolist() == [9, 9, 11, 11]  # with their replies
    assert batch["settings"][0].tolist() == pytest.approx([0.4, 0.1, 0.8, 0, 0.95, 1.2])


# -- whole replies, from tables of probabilities ----------------------------------------------------------------------

STOP = 3
TABLES = np.array(  # two models, the token before, the next token; token 3 ends a reply
    [
        [[0.50, 0.20, 0.20, 0.10], [0.10, 0.55, 0.05, 0.30], [0.30, 0.30, 0.20, 0.20], [0.25, 0.25, 0.25, 0.25]],
        [[0.40, 0.35, 0.10, 0.15], [0.20, 0.30, 0.10, 0.40], [0.25, 0.15, 0.35, 0.25], [0.40, 0.30, 0.20, 0.10]],
    ]
)


class Tabular:
    """An engine whose next token hangs on the last one; it notes what it was asked."""

    limit = None

    def __init__(self, tables=TABLES):
        self.tables, self.prefilled = torch.from_numpy(np.log(tables)).float(), 0

    def start(self, prompts):
        self.prefilled += len(prompts)
        return self.extend(torch.tensor([int(prompt[-1]) for prompt in prompts]))

    def extend(self, tokens):
        self.rows = len(tokens)
        return self.tables[:, tokens] + 5.0  # logits need not be normalised

    def select(self, rows):
        self.rows = len(rows)


def sequence_law(start: int, most: int, alpha, relative_top, temperature, top_p, penalty) -> dict[tuple, float]:
    """Every reply and its probability, worked out one token at a time in plain numpy."""
    found, open_ = {}, {(): 1.0}
    while open_:
        replies, open_ = open_, {}
        for reply, share in replies.items():
            aligned, untuned = np.log(TABLES[:, reply[-1] if reply else start])
            scores = aligned - (1 - alpha) * untuned
            scores[aligned < aligned.max() + np.log(relative_top) - 1e-12] = -np.inf
            if reply:
                with np.errstate(divide="ignore"):
                    scores = np.log(law(scores))
                for token in set(reply):
                    scores[token] *= penalty
            for token, p in enumerate(law(scores, temperature, 0, top_p)):
                whole = (*reply, token)
                if p and (token == STOP or len(whole) == most):
                    found[whole] = share * p
                elif p:
                    open_[whole] = share * p
    return found


@pytest.mark.parametrize(
    ("alpha", "relative_top", "temperature", "top_p", "penalty"),
    [(1.0, 1e-9, 1.0, 1.0, 1.0), (0.4, 0.3, 0.8, 0.95, 1.2), (0.0, 0.25, 1.3, 0.9, 1.5)],
)
def test_replies_have_their_exact_probabilities(alpha, relative_top, temperature, top_p, penalty):
    wanted = sequence_law(0, 4, alpha, relative_top, temperature, top_p, penalty)
    assert sum(wanted.values()) == pytest.approx(1)
    count = 6000
    uniform = torch.from_numpy(np.stack([stream(5, f"{k}", 0, 4) for k in range(count)]))
    settings = settings_of(
        count,
        alpha=alpha,
        relative_top=relative_top,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=penalty,
    )
    engine = Tabular()
    found = decode(engine, [np.array([2, 1, 0])], settings, uniform, [STOP], [0] * count)
    assert engine.prefilled == 1
    counts = dict.fromkeys(wanted, 0)
    for tokens, stopped, given in zip(found.tokens, found.stopped, found.log_probabilities, strict=True):
        reply = tuple(tokens.tolist())
        assert stopped == (reply[-1] == STOP)
        counts[reply] += 1  # a reply that has no probability is a KeyError
        before = (0, *reply[:-1])
        assert given == pytest.approx(np.log(TABLES[:, before, reply]).T, abs=1e-5)
    rare = [reply for reply in wanted if wanted[reply] * count < 5]
    expected = [wanted[r] * count for r in wanted if r not in rare] + [sum(wanted[r] for r in rare) * count] * bool(
        rare
    )
    seen = [counts[r] for r in wanted if r not in rare] + [sum(counts[r] for r in rare)] * bool(rare)
    assert chisquare(seen, np.array(expected) * count / sum(expected)).pvalue > 1e-3


def test_the_penalty_never_touches_tokens_of_the_prompt():
    tables = np.full((1, 4, 4), 0.1)
    tables[..., 1], tables[..., 2] = 0.45, 0.35
    greedy = settings_of(1, temperature=0.0, repetition_penalty=1.5)
    found = decode(Tabular(tables), [np.array([1, 1, 1])], greedy, torch.zeros(1, 3), [STOP])
    assert found.tokens[0].tolist() == [1, 2, 1]  # 1 first: it is in the prompt, but not in the reply


def test_finished_rows_are_let_go_of_and_counted():
    count = 400
    uniform = torch.from_numpy(np.stack([stream(0, f"{k}", 0, 30) for k in range(count)]))
    engine = Tabular()
    found = decode(engine, [np.array([0])] * count, settings_of(count, alpha=0.5), uniform, [STOP])
    assert found.useful == sum(map(len, found.tokens)) == sum(map(len, found.log_probabilities))
    assert found.useful <= found.forwards < 1.2 * found.useful
    assert engine.rows < count / 4
    for tokens, stopped in zip(found.tokens, found.stopped, strict=True):
        assert STOP not in tokens[:-1]
        assert stopped == (tokens[-1] == STOP)
        assert stopped or len(tokens) == 30


# -- whole replies, from models ---------------------------------------------------------------------------------------

KINDS = ["gpt2", "llama", "neox"]
MODULES = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "neox": ["query_key_value"]}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A model and another that is near it, of one architecture."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("decoding") / request.param, request.param)
    policies = []
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        other = torch.Generator().manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in model.parameters():  # far from the flat distribution of fresh weights
                if parameter.ndim > 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
                    parameter += 0.05 * torch.randn(parameter.shape, generator=other)
        policies.append(Policy(model).eval())
    policies[0].kind = request.param
    return policies


def contrast(pair) -> Several:
    return Several(*(TransformersEngine(policy) for policy in pair))


def draw_prompts(count: int, seed: int = 0, longest: int = 20) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 280, generator.integers(1, longest)) for _ in range(count)]


STOPS = list(range(0, 300, 13))
CONG = {"alpha": 0.4, "relative_top": 0.1, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2}


def streams(count: int, most: int, sample: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack([stream(3, f"prompt {k}", sample, most) for k in range(count)]))


def same(a, b) -> bool:
    return all(x.tolist() == y.tolist() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_replies_do_not_depend_on_their_batch(pair, temperature):
    prompts, uniform = draw_prompts(32), streams(32, 24)
    settings = settings_of(32, **{**CONG, "temperature": temperature})
    whole = decode(contrast(pair), prompts, settings, uniform, STOPS)
    assert len({len(tokens) for tokens in whole.tokens}) > 5  # they end at different times
    assert whole.forwards < 32 * max(map(len, whole.tokens))  # so some were let go of
    assert len({tuple(tokens.tolist()) for tokens in whole.tokens}) > 25
    order = np.random.default_rng(1).permutation(32)
    for batch in ([order[k : k + 1] for k in range(32)], [order[:20], order[20:]]):
        for rows in batch:
            found = decode(
                contrast(pair), [prompts[k] for k in rows], settings.take(torch.from_numpy(rows)), uniform[rows], STOPS
            )
            assert same(found.tokens, [whole.tokens[k] for k in rows])
            assert found.stopped.tolist() == whole.stopped[rows].tolist()
            for a, k in zip(found.log_probabilities, rows, strict=True):
                assert np.allclose(a, whole.log_probabilities[k], atol=1e-4)


def test_replies_are_what_models_without_a_cache_would_write(pair):
    prompts, uniform = draw_prompts(4), streams(4, 12)
    settings = settings_of(4, **CONG)
    found = decode(contrast(pair), prompts, settings, uniform, [])
    assert not found.stopped.any()
    for k, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt)[None]
        for step in range(12):
            with torch.no_grad():
                a, b = (policy.plain(input_ids=ids).logits[0, -1].double().log_softmax(-1) for policy in pair)
            scores = (a - 0.6 * b).numpy()
            scores[(a < a.max() + math.log(0.1)).numpy()] = -np.inf
            with np.errstate(divide="ignore"):
                scores = np.log(law(scores))
            for token in set(ids[0, len(prompt) :].tolist()):
                scores[token] *= 1.2
            token = int((law(scores, 0.8, 0, 0.95).cumsum() > float(uniform[k, step])).argmax())
            assert found.tokens[k][step] == token
            assert found.log_probabilities[k][step] == pytest.approx([float(a[token]), float(b[token])], abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_each_row_has_its_own_settings(pair):
    prompts, uniform = draw_prompts(6, seed=2), streams(6, 10)
    alphas = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    varied = {**CONG, "alpha": alphas, "temperature": [0.8, 0.0, 1.0, 0.8, 0.0, 1.2], "top_k": [0, 0, 5, 0, 9, 80]}
    whole = decode(contrast(pair), prompts, settings_of(6, **varied), uniform, STOPS)
    for k in range(6):
        own = {n: v[k] if isinstance(v, list) else v for n, v in varied.items()}
        found = decode(contrast(pair), prompts[k : k + 1], settings_of(1, **own), uniform[k : k + 1], STOPS)
        assert same(found.tokens, whole.tokens[k : k + 1])


def test_samples_of_one_prompt_share_its_reading(pair, monkeypatch):
    prompts = draw_prompts(3, seed=4)
    prompt_of, sample = [2, 0, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]
    uniform = torch.from_numpy(np.stack([stream(1, f"{p}", s, 10) for p, s in zip(prompt_of, sample, strict=True)]))
    settings, read, engine = settings_of(6, **CONG), [], contrast(pair)
    start = TransformersEngine.start
    monkeypatch.setattr(TransformersEngine, "start", lambda self, p: (read.append(len(p)), start(self, p))[1])
    shared = decode(engine, prompts, settings, uniform, STOPS, prompt_of)
    assert read == [3, 3]
    alone = decode(contrast(pair), [prompts[p] for p in prompt_of], settings, uniform, STOPS)
    assert same(shared.tokens, alone.tokens)
    assert len({tuple(tokens.tolist()) for tokens in shared.tokens}) == 6
    moved = torch.tensor([0, 1, 3])  # a row of each prompt, in another order
    again = decode(contrast(pair), prompts, settings.take(moved), uniform[moved], STOPS, [2, 0, 1])
    assert same(again.tokens, [shared.tokens[k] for k in moved])
    rows = ReplyRows(
        prompts,
        ["0", "1", "2"],
        np.array(prompt_of),
        np.array(sample),
        torch.stack(list(vars(settings).values()), 1).double().numpy(),
        max_new_tokens=10,
        seed=1,
    )
    written = rows.write(contrast(pair), rows.collate([1, 4, 0]), STOPS)
    assert same(written.tokens, [shared.tokens[k] for k in (1, 4, 0)])


def test_log_probabilities_are_those_of_reading_the_reply(pair):
    prompts, uniform = draw_prompts(12, seed=5), streams(12, 20)
    found = decode(contrast(pair), prompts, settings_of(12, **CONG), uniform, STOPS)
    assert found.stopped.any()
    assert not found.stopped.all()
    rows = Completions(prompts, [(tokens,) for tokens in found.tokens])
    for m, policy in enumerate(pair):
        with torch.no_grad():
            again = policy(rows.collate(range(12)))
        assert np.allclose(np.concatenate(found.log_probabilities)[:, m], again.numpy(), atol=1e-4)


def test_a_reply_ends_at_a_stop_or_is_cut(pair):
    prompts = draw_prompts(16, seed=6)
    found = decode(contrast(pair), prompts, settings_of(16, **CONG), streams(16, 15), STOPS)
    for tokens, stopped in zip(found.tokens, found.stopped, strict=True):
        assert not np.isin(tokens[:-1], STOPS).any()
        assert stopped == (tokens[-1] in STOPS)
        assert stopped or len(tokens) == 15
    assert {True, False} == set(found.stopped.tolist())


def test_what_all_prompts_begin_with_is_read_once(pair, monkeypatch):
    start = np.arange(20, 40)
    prompts = [np.concatenate([start, p]) for p in draw_prompts(5, seed=8)] + [start]  # one is nothing more
    widths = []
    forward = TransformersEngine._forward

    def watch(self, ids, positions):
        widths.append(tuple(ids.shape))
        return forward(self, ids, positions)

    monkeypatch.setattr(TransformersEngine, "_forward", watch)
    together = decode(contrast(pair), prompts, settings_of(6, **CONG), streams(6, 12), STOPS)
    assert widths[0] == (1, 19)  # each row keeps a token of its own, from which it goes on
    assert widths[1] == (6, max(map(len, prompts)) - 19)
    for row, prompt in enumerate(prompts):
        alone = decode(contrast(pair), [prompt], settings_of(1, **CONG), streams(6, 12)[row : row + 1], STOPS)
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        assert np.allclose(alone.log_probabilities[0], together.log_probabilities[row], atol=1e-4)


def test_a_reply_ends_where_the_model_has_no_position_left(pair):
    """And a row that has ended does not count: it may be carried along, past the end."""
    prompts = [np.arange(120), np.arange(5), np.arange(1, 127)]
    greedy = settings_of(3, temperature=0.0)
    free = decode(TransformersEngine(pair[0]), prompts[:2], greedy.take(torch.arange(2)), torch.zeros(2, 9), [])
    assert [len(tokens) for tokens in free.tokens] == [9, 9]  # the last one is not read
    full = decode(TransformersEngine(pair[0]), prompts, greedy, torch.zeros(3, 40), [])
    assert [len(tokens) for tokens in full.tokens] == [9, 40, 3]
    assert not full.stopped.any()
    for row, prompt in enumerate(prompts):
        alone = decode(TransformersEngine(pair[0]), [prompt], greedy.take(torch.tensor([row])), torch.zeros(1, 40), [])
        assert np.array_equal(alone.tokens[0], full.tokens[row])
    with pytest.raises(UserError, match="a prompt of 140 tokens is longer than the 128 positions"):
        decode(TransformersEngine(pair[0]), [np.arange(140)], settings_of(1), torch.zeros(1, 2), [])


def test_adapters_and_their_base_in_one_forward_are_two_models(pair):
    from peft import LoraConfig, get_peft_model

    base = pair[0]
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules=MODULES[base.kind],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=base.kind == "gpt2",
    )
    adapted = Policy(get_peft_model(copy.deepcopy(base.plain), config)).eval()
    merged = Policy(copy.deepcopy(adapted.model).merge_and_unload()).eval()
    prompts, uniform, settings = draw_prompts(10, seed=7), streams(10, 16), settings_of(10, **CONG)
    one_forward = decode(TransformersEngine(adapted, base_too=True), prompts, settings, uniform, STOPS)
    two_models = decode(contrast([merged, base]), prompts, settings, uniform, STOPS)
    assert same(one_forward.tokens, two_models.tokens)
    for a, b in zip(one_forward.log_probabilities, two_models.log_probabilities, strict=True):
        assert np.allclose(a, b, atol=1e-4)
    logs = np.concatenate(one_forward.log_probabilities)
    assert np.abs(logs[:, 0] - logs[:, 1]).mean() > 0.01  # they are not the same model
    alone = decode(TransformersEngine(adapted), prompts, settings_of(10), uniform, STOPS)
    assert alone.log_probabilities[0].shape[1] == 1
    assert same(alone.tokens, decode(TransformersEngine(merged), prompts, settings_of(10), uniform, STOPS).tokens)
    with pytest.raises(ValueError, match="adapters"):
        TransformersEngine(base, base_too=True)


def test_the_growing_cache_gives_the_logits_of_the_copying_one(pair, monkeypatch):
    from transformers import DynamicCache

    prompts = draw_prompts(5, seed=8, longest=12)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 280, (110, 6)))
    keep = {30: [3, 0, 4, 1, 4, 2], 75: [0, 3, 5], 100: [2, 1]}

    def read(shares=False, columns=None):
        engine, rows, found = TransformersEngine(pair[0], columns=columns), 5, []
        assert engine._shares == (columns is None)
        engine._shares, engine.worth = shares, 8
        with torch.inference_mode():
            found.append(engine.start(prompts))
            for step, line in enumerate(tokens):
                if step in keep:
                    engine.select(torch.tensor(keep[step]))
                    rows = len(keep[step])
                found.append(engine.extend(line[:rows]))
        return found, engine

    ours, engine = read()
    layer = engine.cache.layers[0]
    assert type(layer).__name__ == "GrowingLayer"
    assert layer.get_seq_length() == max(map(len, prompts)) + 110 > 64 + max(map(len, prompts))
    monkeypatch.setattr(caches, "growing_cache", lambda config: DynamicCache(config=config))
    theirs, _ = read()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) or torch.allclose(a, b, atol=1e-5)
    monkeypatch.undo()
    shared, engine = read(shares=True)
    assert engine.cache.layers[0].get_seq_length() == 110 - 30
    assert [len(prefix) for prefix in engine._prefixes] == [max(map(len, prompts)) + 30]
    for a, b in zip(shared, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    static, engine = read(columns=128)
    assert type(engine.cache).__name__ == "StaticCache"
    for a, b in zip(static, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="121 tokens do not fit into a cache of 120"):
        read(columns=120)
    # and all are right: the row that is left last, read at once, without any cache or padding
    came = [prompts[1], tokens[:30, 1], tokens[30:75, 3], tokens[75:100, 1], tokens[100:, 1]]
    came = torch.cat([torch.as_tensor(part) for part in came])
    with torch.no_grad():
        plain = pair[0].plain(input_ids=came[None]).logits[0, -1]
    assert torch.allclose(plain, ours[-1][0, 1], atol=1e-3)


@pytest.mark.parametrize("adapters", [False, True])
def test_rows_that_share_their_prompts_say_what_they_say_alone(pair, adapters, monkeypatch):
    """A tree of forks, uneven prunings, orders turned round, reads of several tokens, and tokens taken back."""
    if adapters:  # and each new token by itself
        monkeypatch.setattr(prefix_cache, "SCORES", 1)
    if adapters:
        peft = pytest.importorskip("peft")
        targets = {"gpt2": ["c_attn"], "neox": ["query_key_value"]}.get(pair[0].plain.config.model_type[:4])
        targets = targets or (
            ["query_key_value"] if "neox" in pair[0].plain.config.model_type else ["q_proj", "v_proj"]
        )
        model = peft.get_peft_model(
            copy.deepcopy(pair[0].plain),
            peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=targets == ["c_attn"]),
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        policy = Policy(model).eval()
    else:
        policy = pair[0]
    prompts = draw_prompts(4, seed=3, longest=20)

    def play(shares):
        draw = np.random.default_rng(1)
        engine = TransformersEngine(policy, base_too=adapters)
        engine._shares, engine.worth = shares, 1
        texts, found = [list(p) for p in prompts], []
        with torch.inference_mode():
            engine.start(prompts)
            for round_ in range(6):
                for kind in ("fork", "prune"):
                    rows = draw.integers(0, len(texts), 9) if kind == "fork" else draw.permutation(len(texts))[:4]
                    engine.select(torch.from_numpy(rows))
                    texts = [list(texts[r]) for r in rows]
                    for _ in range(3):
                        tokens = draw.integers(1, 280, len(texts))
                        found.append(engine.extend(torch.from_numpy(tokens)).clone())
                        texts = [[*text, t] for text, t in zip(texts, tokens.tolist(), strict=True)]
                    if round_ % 2:
                        back = draw.integers(0, 6, len(texts))
                        engine.rollback(back)
                        texts = [text[: len(text) - n] for text, n in zip(texts, back, strict=True)]
                    chunks = [draw.integers(1, 280, draw.integers(1, 5)) for _ in texts]
                    found += [torch.from_numpy(logs.copy()) for logs in engine.read(chunks)]
                    texts = [[*text, *chunk.tolist()] for text, chunk in zip(texts, chunks, strict=True)]
        return texts, found, engine

    texts, shared, engine = play(True)
    again, alone, other = play(False)
    assert texts == again
    assert (len(engine._prefixes), other._prefixes) == (2, [])
    for a, b in zip(shared, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with torch.no_grad():
        plain = policy.model(input_ids=torch.tensor([texts[2]])).logits[0, -1]
    assert torch.allclose(plain, engine.logits[0, 2], atol=1e-3)


def test_left_padding_has_positions_of_its_own(pair):
    seen = []
    engine = TransformersEngine(pair[0])
    inner = engine._forward
    engine._forward = lambda ids, positions: (seen.append(positions.clone()), inner(ids, positions))[1]
    with torch.inference_mode():
        engine.start([np.arange(3), np.arange(5), np.arange(1)])
        engine.extend(torch.tensor([1, 2, 3]))
    assert seen[0].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert seen[1].tolist() == [[3], [5], [1]]


def test_models_that_pad_their_vocabulary_write_what_all_have():
    wide = np.concatenate([TABLES[:1], np.full((1, 4, 2), 1e-9)], 2)
    engine = Several(Tabular(TABLES[:1]), Tabular(wide))
    engine.engines[0].logits = engine.start([np.array([0])])
    assert engine.extend(torch.tensor([1])).shape == (2, 1, 6)
    assert engine.writable.tolist() == [True] * 4 + [False] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Weights as the processor likes them
# ---------------------------------------------------------------------------------------------------------------------

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not part of this torch")


def two_layers() -> nn.Sequential:
    """A linear layer and one of GPT-2's, both large enough to be worth it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 256), Conv1D(192, 256)).requires_grad_(False)


def laid_out(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@packs
def test_laid_out_weights_give_the_same_and_change_nothing_else():
    """The same numbers for any count of rows, from the same state dict."""
    model, plain = two_layers(), two_layers()
    pack(model)
    assert laid_out(model) == 2
    for rows in (1, 7, 33):
        inputs = torch.randn(rows, 3, 192)
        torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())


@packs
def test_weights_that_changed_are_laid_out_again():
    """A stale copy would answer with the old weights."""
    model, inputs = two_layers(), torch.randn(2, 192)
    pack(model)
    before = model(inputs)
    with torch.no_grad():
        model[0].weight.mul_(2)
    pack(model)
    assert (model(inputs) - before).abs().max() > 0.1
    torch.testing.assert_close(model(inputs), two_layers()[1](inputs @ model[0].weight.T + model[0].bias))


@packs
def test_a_copy_of_a_laid_out_model_answers_with_its_own_weights():
    """A deep copy that went on using the original's weights would be wrong once either is trained."""
    model, inputs = two_layers(), torch.randn(2, 192)
    pack(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.zero_()
    torch.testing.assert_close(twin(inputs), twin[1].bias.expand(2, -1))
    assert model(inputs).abs().max() > 0.1


class Siblings(nn.Module):
    """Layers by the names of transformers' attention, of which only the last has a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(256, 256, bias=False), nn.Linear(256, 128, bias=False)
        self.v_proj = nn.Linear(256, 128)
        self.requires_grad_(False)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = inputs if len(inputs) == 3 else inputs * 3
        return [self.q_proj(q), self.k_proj(k), self.v_proj(v)]


@packs
def test_layers_that_read_the_same_are_one_product(monkeypatch):
    """The first computes what the others take; where they are given different inputs each answers for its own."""
    model, plain, products = Siblings(), Siblings(), []
    product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: (products.append(1), product(*a))[1])
    pack(model)
    for _ in range(2):
        inputs = torch.randn(5, 3, 256)
        for found, wanted in zip(model(inputs), plain(inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(products) == 2
    different = torch.randn(3, 4, 256)
    for found, wanted in zip(model(*different), plain(*different), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(products) == 5
    twice = [model.q_proj(different) for _ in range(2)]
    torch.testing.assert_close(twice[0], twice[1])
    with torch.no_grad():
        model.k_proj.weight.mul_(2)
        pack(model)
        torch.testing.assert_close(model(inputs)[1], 2 * plain(inputs)[1], rtol=1e-5, atol=1e-5)
        model.v_proj.bias.add_(1)
        pack(model)
    for answer in (model, copy.deepcopy(model)):
        torch.testing.assert_close(answer(inputs)[2], 1 + plain(inputs)[2], rtol=1e-5, atol=1e-5)


@packs
def test_gradients_and_other_types_take_the_ordinary_way():
    """oneDNN's call has no gradient, and small or 16-bit layers are left as they are."""
    model, plain = two_layers(), two_layers()
    pack(model)
    found, wanted = (torch.ones(1, 192, requires_grad=True) for _ in range(2))
    model(found).sum().backward()
    plain(wanted).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)
    others = nn.Sequential(nn.Linear(8, 8), nn.Linear(256, 256, dtype=torch.bfloat16))
    pack(others)
    assert laid_out(others) == 0
