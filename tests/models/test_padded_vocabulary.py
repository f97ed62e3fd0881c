"""Ids that no token has are never written, and models that pad by different amounts go together."""

import math

import numpy as np
import pytest
import torch
import transformers as T
from batches import BASE, greedy

from w2sg.decoding.contrastive import decode
from w2sg.decoding.drafting import Drafting, Rule
from w2sg.decoding.engine import Several, Tilted
from w2sg.decoding.nudging import Nudging
from w2sg.decoding.sampling import FLOOR, Settings, contrastive_scores, next_tokens
from w2sg.decoding.search import EngineGrower, search
from w2sg.decoding.search_values import ImplicitValue
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.models.policy import Policy, missing_ids

TOKENS = 40  # of the tokenizer; the models have more
FREE = [1.0, 0.0, 1.5, 0, 1.0, 1.0]  # columns of `Settings`: any token may be drawn


class Ids:
    """A chat of numbers: token k is the text "k"."""

    stop, end, stop_strings, template, vocabulary = (1,), 1, (), None, "numbers"

    def __init__(self):
        self.tokenizer, self.ids = self, np.arange(TOKENS)

    def prompts(self, texts):
        return [np.array(list(map(int, text.split()))) for text in texts]

    replies = prompts

    def text(self, tokens):
        return " ".join(str(int(t)) for t in tokens if int(t) != 1)

    def decode(self, tokens, **_):
        return "".join(f" {int(t)}" for t in tokens)

    def cut(self, tokens, kept=0):
        return tokens, False

    def until_stop(self, text, start=0):
        return text, False


def padded(rows: int, seed: int) -> Policy:
    """A model with more rows than tokens, which likes the rest of them best."""
    torch.manual_seed(seed)
    policy = Policy(T.LlamaForCausalLM(T.LlamaConfig(**BASE | {"vocab_size": rows})).eval()).requires_grad_(False)
    with torch.no_grad():
        policy.plain.lm_head.weight.mul_(20)
        policy.plain.lm_head.weight[TOKENS:] *= 3
    policy.writable = torch.arange(rows) < TOKENS
    return policy


PROMPTS = ["5 6 7 8", "9 10", "11 12 13 14 15 16"]
IDS = ["a", "b", "c"]


def drawn(engine, columns, samples=20):
    uniform = torch.from_numpy(np.random.default_rng(0).random((3 * samples, 8)))
    settings = Settings.from_columns(torch.tensor([columns] * (3 * samples)))
    of = np.repeat(np.arange(3), samples)
    return decode(engine, Ids().prompts(PROMPTS), settings, uniform, [1], of.tolist())


@pytest.fixture(scope="module")
def models():
    """Of 57, 48 and 44 rows."""
    return [padded(rows, seed) for seed, rows in enumerate((57, 48, 44))]


def only_tokens(replies) -> bool:
    return all((np.asarray(tokens) < TOKENS).all() for tokens in replies)


def test_without_the_mask_other_ids_would_be_written(models):
    bare = Policy(models[0].plain).eval()
    assert not only_tokens(drawn(TransformersEngine(bare), FREE).tokens)


@pytest.mark.parametrize("columns", [FREE, [1.0, 0.1, 0, 0, 1, 1], [1.0, 0.5, 1, 5, 0.5, 1.3]])
@pytest.mark.parametrize("kind", ["plain", "contrast", "tilted"])
def test_samples_are_of_tokens_alone(models, kind, columns):
    a, b, c = (TransformersEngine(policy) for policy in models)
    engine = {"plain": lambda: a, "contrast": lambda: Several(a, b), "tilted": lambda: Tilted(a, Several(b, c), 0.7)}
    columns = [0.4, *columns[1:]] if kind == "contrast" else columns
    found = drawn(engine[kind](), columns)
    assert only_tokens(found.tokens)
    assert all(np.isfinite(logs).all() for logs in found.log_probabilities)


def test_log_probabilities_are_over_the_whole_vocabulary_as_in_training(models):
    policy = models[0]
    found = drawn(TransformersEngine(policy), FREE, 1)
    for prompt, tokens, logs in zip(Ids().prompts(PROMPTS), found.tokens, found.log_probabilities, strict=True):
        with torch.no_grad():
            whole = policy.plain(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        wanted = whole[np.arange(len(tokens)) + len(prompt) - 1, tokens]
        assert logs[:, 0] == pytest.approx(wanted.numpy(), abs=1e-4)


def test_what_is_drawn_has_the_law_of_the_tokens_that_there_are():
    logits = torch.tensor([[[0.0, 1.0, 2.0, 9.0]]])
    uniform = torch.from_numpy(np.linspace(0, 1, 3000, endpoint=False))
    settings = Settings.from_columns(torch.tensor([[1.0, 0, 1, 0, 1, 1]] * 3000))
    tokens, logs = next_tokens(logits.expand(1, 3000, 4), settings, uniform, None, torch.arange(4) < 3)
    wanted = logits[0, 0, :3].softmax(-1)
    assert (torch.bincount(tokens, minlength=3) / 3000).tolist() == pytest.approx(wanted.tolist(), abs=1e-3)
    assert torch.equal(logs[0, 0], logits[0, 0].log_softmax(-1))


def test_search_and_best_of_n_write_what_their_guide_can_read(models):
    """The strong model's tokenizer may have tokens that the smaller guide has no row for."""
    chat = Ids()
    strong = TransformersEngine(models[0])
    strong.write_below(30)
    guide = Several(TransformersEngine(models[1]), TransformersEngine(models[2]))
    for chunk, beams in ((3, 2), (9, 4)):
        value = ImplicitValue(guide, chat, True, chat.stop)
        grower = EngineGrower(strong, chat.prompts, chat.text, IDS, FREE, chat.stop, chunk, 9, 0)
        found = search(grower, value, PROMPTS, beams, 2)
        assert max(int(h.tokens.max()) for result in found for h in result.beam) < 30


def test_drafts_and_nudges_are_of_tokens_alone(models):
    engines, chats = [TransformersEngine(policy) for policy in models[:2]], (Ids(), Ids())
    rule = Rule(window=2, threshold=0.3, check=3, draft=6, most=9)
    drafts = Drafting(*map(Side, engines, chats, (FREE, FREE)), rule, IDS, 0).write(PROMPTS)
    assert only_tokens([draft.tokens for draft in drafts])
    nudged = Nudging(*map(Side, engines, chats, (FREE, FREE)), 0.2, 9, IDS, 0).write(PROMPTS)
    assert only_tokens([reply.tokens for reply in nudged])


def test_ids_between_tokens_are_missing_too():
    chat = Ids()
    chat.ids = np.array([0, 1, 2, 5])
    assert missing_ids(chat, 8).tolist() == [3, 4, 6, 7]
    assert missing_ids(chat, 3).tolist() == []


# -- tokens that models rule out --------------------------------------------------------------------------------------


def test_a_token_that_both_models_rule_out_is_no_nan():
    aligned, reference = torch.tensor([[0.0, 1.0, -math.inf, 0.5]]), torch.tensor([[0.0, -math.inf, -math.inf, 0.5]])
    logs = [x.log_softmax(-1) for x in (aligned, reference)]
    for alpha in (0.0, 0.4, 1.0):
        scores = contrastive_scores(*logs, torch.tensor([alpha]), torch.zeros(1))[0]
        assert scores[2] == -math.inf
        assert torch.isfinite(scores[[0, 1, 3]]).all()
        assert int(scores.argmax()) == 1  # at alpha 1 the likeliest, below it what the reference would never say
    alone = logs[0] - 0.6 * logs[1].clamp(min=FLOOR)
    assert torch.equal(contrastive_scores(*logs, torch.tensor([0.4]), torch.zeros(1)), alone)


def test_tilted_logits_have_no_ratio_of_nothing():
    class Given:
        limit = None

        def __init__(self, *logits):
            self.logits = torch.tensor(logits)[:, None]

        def start(self, prompts):
            return self.logits

    inf = math.inf
    pair = Given([1.0, -inf, -inf, 2.0], [0.0, -inf, 1.0, -inf])
    tilted = Tilted(Given([0.0, 3.0, 1.0, -inf]), pair, 0.5).start([np.arange(2)])
    assert tilted[0, 0, :2].tolist() == [0.5, 3.0]  # both rule it out: the base decides
    assert tilted[0, 0, 2] < -4000
    assert tilted[0, 0, 3] == -inf


def test_nothing_left_to_write_is_one_error():
    logits = torch.full((1, 1, 3), -math.inf)
    with pytest.raises(UserError, match="the guide: every token is ruled out"):
        next_tokens(logits, greedy(1), torch.zeros(1), name="the guide")
    some = torch.tensor([[[0.0, -math.inf, -math.inf]]])
    with pytest.raises(UserError, match="every token is ruled out"):
        next_tokens(some, greedy(1), torch.zeros(1), writable=torch.tensor([False, True, True]))
