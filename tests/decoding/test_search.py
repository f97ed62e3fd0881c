"""Search: against tables worked out by hand, every hypothesis scored anew, and models read without a cache."""

import copy
import itertools
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from dialogues import tokenizer_of
from tiny_engines import STOPS, Ids, draw, next_logs, prompts_of, tiny, token_logs

from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import decode, stream
from w2sg.decoding.engine import Several, TabularEngine, Tilted
from w2sg.decoding.sampling import Settings
from w2sg.decoding.search import EngineGrower, Hypothesis, choose_beam, search
from w2sg.decoding.search_values import ImplicitValue, Mixture, RewardValue
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.models.policy import Policy

# -- by hand: tokens a, b and e, which ends a reply; rows are after nothing, after a, after b ------------------------

E = 2
NEVER = [1 / 3] * 3  # nothing comes after the end
STRONG = np.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3], NEVER])
TUNED = np.array([[0.4, 0.5, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4], NEVER])
UNTUNED = np.array([[0.5, 0.4, 0.1], [0.4, 0.4, 0.2], [0.4, 0.5, 0.1], NEVER])
# reference 01 and 02
TOKEN_VALUES = {"a": -0.2231435513, "b": 0.2231435513, "e": 0.0, "aa": -0.6931471806, "ab": 0.4054651081, "ae": 0.0}
TOKEN_VALUES |= {"ba": -0.2876820725, "bb": -0.5108256238, "be": 1.3862943611}
PREFIX_VALUES = {"a": -0.2231435513, "b": 0.2231435513, "e": 0.0, "ab": 0.1823215568, "ba": -0.0645385211}
PREFIX_VALUES |= {"be": 1.6094379124, "abe": 1.5686159179, "bab": 0.340926587, "babe": 1.7272209481}
PREFIX_VALUES |= {"aaaa": -2.302585093, "bbbb": -1.30933332}
# reference 03: beams, chunk, and what is kept after each round, best first
EXHAUSTIVE = [
    (1, 1, ["b", "be"]),
    (2, 1, ["b e", "be e"]),
    (3, 1, ["b e a", "be ab e", "be abe e"]),
    (4, 1, ["b e a", "be ab e ba", "be abe bab e", "babe be abe baba"]),
    (1, 2, ["be"]),
    (2, 2, ["be ab", "be abe"]),
    (4, 2, ["be ab e ba", "babe be abe abbe"]),
    (1, 4, ["babe"]),
]
# reference 05: beams, what was looked at in each round, and what was kept of it
SAMPLED = [
    (2, [("aa ab e ae", "ab e"), ("abe abbb e", "abe e")]),
    (2, [("a a a b", "b a"), ("be ba ae ae", "be ba"), ("be baa baa", "be baa"), ("be baaa baab", "be baab")]),
    (
        4,
        [
            ("a a a a a a b a a a b a b a b a", "b a"),
            ("bb be bb be aa ab ae ae", "be ab ae bb"),
            ("be abb abe abe abe ae bbb bba bbb bbb", "be abe ae abb"),
            ("be abe ae abbb abbb abbe abba", "be abe abbe ae"),
        ],
    ),
    (1, [("bbba abe abe aaaa ae aaba bae aabb", "abe")]),
]
# reference 09
TILTED = {
    0.0: [[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]],
    0.5: [
        [0.5520777729, 0.345048608, 0.1028736191],
        [0.3838895514, 0.3989497245, 0.217160724],
        [0.1492499535, 0.3337330416, 0.5170170049],
    ],
    1.0: [
        [0.502617801, 0.3926701571, 0.1047120419],
        [0.2777777778, 0.5, 0.2222222222],
        [0.0909090909, 0.1818181818, 0.7272727273],
    ],
    2.0: [
        [0.4030438205, 0.4919968512, 0.1049593283],
        [0.125, 0.675, 0.2],
        [0.0220913108, 0.0353460972, 0.942562592],
    ],
    -0.3: [
        [0.6276598771, 0.274503802, 0.097836321],
        [0.5693351053, 0.2456873733, 0.1849775214],
        [0.2182982121, 0.5835300037, 0.1981717842],
    ],
}


def hand_value(text: str) -> float:
    """The value of a text by the token values of the reference."""
    return sum(TOKEN_VALUES[text[max(k - 1, 0) : k + 1]] for k in range(len(text)))


def letters(text: str) -> np.ndarray:
    return np.array(["abe".index(letter) for letter in text], np.int64)


def spelt(tokens) -> str:
    return "".join("abe"[token] for token in tokens)


class Letters:
    """A tokenizer whose tokens are letters; prompts have none."""

    end, stop, vocabulary = E, [E], "letters"

    def prompts(self, prompts):
        return [np.zeros(0, np.int64) for _ in prompts]

    def replies(self, texts, finished=None):
        return [letters(text) for text in texts]


def grown(text: str, parent: int = 0, most: int = 99, tokens: bool = True) -> Hypothesis:
    finished = text.endswith("e")
    ids = letters(text) if tokens else None
    return Hypothesis(0, parent, text, ids, None, finished, not finished and len(text) >= most, "")


def test_two_ends_of_one_text_are_one_reply():
    """Llama 3 and Qwen have several tokens that end a reply."""
    a, b = (Hypothesis(0, 0, "x", np.array([4, end]), None, True, False, "", closing=1) for end in (7, 8))
    other = Hypothesis(0, 0, "x y", np.array([4, 7]), None, False, True, "")
    assert a.key == b.key != other.key
    cut, ended = (Hypothesis(0, 0, "x", None, None, end, not end, "") for end in (False, True))  # by a server
    assert cut.key != ended.key


class Exhaustive:
    """Grows every possible chunk."""

    def __init__(self, chunk: int, most: int = 4):
        self.chunk, self.most = chunk, most

    def start(self, prompts):
        return [grown("")]

    def grow(self, live, children):
        found = []
        for row, h in enumerate(live):
            size = min(self.chunk, self.most - len(h.text))
            for n in range(1, size + 1):
                for chunk in map("".join, itertools.product("abe", repeat=n)):
                    if "e" not in chunk[:-1] and (n == size or chunk[-1] == "e"):
                        found.append(grown(h.text + chunk, row, self.most))
        return found

    def keep(self, places):
        pass


class Scripted:
    """Grows what it is told; texts that no live hypothesis begins are carried ones, and not grown."""

    def __init__(self, rounds, most: int = 4, tokens: bool = True):
        self.rounds, self.most, self.tokens, self.kept = [r.split() for r in rounds], most, tokens, []

    def start(self, prompts):
        return [grown("", tokens=self.tokens)]

    def grow(self, live, children):
        begins = lambda text, h: text.startswith(h.text) and text != h.text  # noqa: E731
        texts = self.rounds[len(self.kept)]
        pairs = [(text, row) for text in texts for row, h in enumerate(live) if begins(text, h)]
        return [grown(text, row, self.most, self.tokens) for text, row in pairs]

    def keep(self, places):
        self.kept.append(list(places))


class Given:
    """Values that are given for texts."""

    def __init__(self, values):
        self.values = values

    def start(self, prompts):
        pass

    def extend(self, grown):
        return np.array([self.values[h.text] for h in grown])

    def select(self, rows):
        pass


def by_tables(**options) -> ImplicitValue:
    return ImplicitValue(TabularEngine(np.stack([TUNED, UNTUNED])), Letters(), True, [E], **options)


def seen(line) -> list[tuple[str, float, bool]]:
    return [(note["before"] + note["chunk"], note["value"], note["kept"]) for note in line]


def kept_of(result) -> list[str]:
    """What was kept after each round, best first."""
    found = []
    for line in result.trace:
        held = sorted((-value, text) for text, value, kept in seen(line) if kept)
        assert [-value for value, _ in held] == pytest.approx([hand_value(text) for _, text in held], abs=1e-9)
        found.append(" ".join(text for _, text in held))
    return found


def test_values_of_tables_are_those_of_the_reference():
    for text, wanted in TOKEN_VALUES.items():
        engine = TabularEngine(np.stack([TUNED, UNTUNED]))
        engine.start([letters(text[:-1])])
        tuned, untuned = engine.read([letters(text[-1])])[0][0]
        assert tuned - untuned == pytest.approx(wanted, abs=1e-9)
    value = by_tables()
    value.start([""])
    found = value.extend([grown(text) for text in PREFIX_VALUES])
    assert found.tolist() == pytest.approx(list(PREFIX_VALUES.values()), abs=1e-9)


@pytest.mark.parametrize(("beams", "chunk", "kept"), EXHAUSTIVE)
def test_search_over_every_chunk_keeps_what_the_reference_keeps(beams, chunk, kept):
    result = search(Exhaustive(chunk), by_tables(), [""], beams, 3, trace=True)[0]
    assert kept_of(result) == kept
    assert [h.text for h in result.beam] == kept[-1].split()
    assert result.best.text == kept[-1].split()[0]
    assert result.best.value == pytest.approx(hand_value(result.best.text), abs=1e-9)
    assert (result.rule, result.rounds) == ("beam", len(kept))


def test_a_finished_reply_has_one_place_in_the_beam():
    """Where copies of it compete, "be" pushes out what "babe" grows from."""
    result = search(Exhaustive(1), by_tables(), [""], 4, 3, trace=True)[0]
    assert result.best.text == "babe"
    assert result.best.value == pytest.approx(1.7272209481, abs=1e-9)
    for line in result.trace:
        texts = [text for text, _, _ in seen(line)]
        assert len(texts) == len(set(texts))
    assert sum(note["carried"] for note in result.trace[2]) == 2  # "be" and "e"


@pytest.mark.parametrize(("beams", "rounds"), SAMPLED)
def test_of_given_candidates_those_of_the_reference_are_kept(beams, rounds):
    result = search(Scripted([line for line, _ in rounds]), by_tables(), [""], beams, 2, trace=True)[0]
    assert kept_of(result) == [kept for _, kept in rounds]
    for line, (candidates, _) in zip(result.trace, rounds, strict=True):
        assert {text for text, _, _ in seen(line)} == set(candidates.split())
    assert len({h.key for h in result.beam}) == len(result.beam)


def test_the_best_go_on_whoever_their_parents_are():
    values = [0.1, 2.0, -1.0, 1.5, 0.3, 1.9]  # reference 20
    new = [replace(grown(f"{'ab'[k // 3]}{'ab'[k % 2]}", k // 3), value=v) for k, v in enumerate(values)]
    beam, places = choose_beam([], new, 2)
    assert places == [1, 5]
    assert [h.parent for h in beam] == [0, 1]
    # all from one parent, where they are the best
    beam, places = choose_beam([], [replace(h, value=-h.value if h.parent else h.value) for h in new], 2)
    assert places == [1, 0]
    # of equal values the one that came first, and what had ended before what is new
    same = [replace(h, value=1.0) for h in new]
    assert choose_beam(same[:1], same[1:], 3) == (same[:3], [0, 1])
    grower = Scripted(["a b", "aa ab ae ba bb be"], most=2)
    given = Given({"a": 0, "b": 0} | dict(zip(["aa", "ab", "ae", "ba", "bb", "be"], values, strict=True)))
    result = search(grower, given, [""], 2, 3)[0]
    assert [(h.text, h.parent) for h in result.beam] == [("ab", 0), ("be", 1)]
    assert grower.kept == [[0, 1], []]


def test_a_finished_reply_is_remembered_when_it_has_left_the_beam():
    # reference 22: "a" looks better than "e" when they are compared, and nothing good comes after it
    values = {"a": 0.5, "e": 0.3, "b": -1.0, "aa": -0.5, "ab": -1.5, "ae": -2.5, "aaa": -1.5, "aab": -2.5, "aae": -3.5}
    result = search(Exhaustive(1, most=3), Given(values), [""], 1, 3)[0]
    assert [h.text for h in result.beam] == ["aaa"]
    assert (result.best.text, result.best.value, result.rule) == ("e", 0.3, "finished pool")
    assert result.best.finished
    # a reply that was only cut is not a finished one
    worse = search(Exhaustive(1, most=3), Given(values | {"e": -9.0, "ae": -9.0, "aae": -9.0}), [""], 1, 3)[0]
    assert (worse.best.text, worse.rule) == ("aaa", "beam")
    assert worse.best.cut
    assert not worse.best.finished


def test_a_reply_that_is_cut_has_no_end_in_its_value():
    result = search(Exhaustive(1, most=3), by_tables(), [""], 30, 3)[0]
    bab = next(h for h in result.beam if h.text == "bab")
    assert bab.cut
    assert bab.value == pytest.approx(0.340926587, abs=1e-9)  # reference 08: 1.727 if an end were thought of
    assert next(h for h in result.beam if h.text == "be").value == pytest.approx(1.6094379124, abs=1e-9)


def test_equal_texts_of_a_black_box_are_one():
    """Without tokens, an empty chunk may end a text that another chunk had ended before."""
    ends = lambda text: replace(grown(text, tokens=False), finished=True)  # noqa: E731

    class Box(Scripted):
        def grow(self, live, children):
            if not self.kept:
                return [grown("ab", tokens=False), ends("ab"), ends("ab")]
            return [ends("ab")]

    result = search(Box([], tokens=False), Given({"ab": 1.0}), [""], 3, 1, trace=True)[0]
    assert [h.text for h in result.beam] == ["ab"]
    assert [len(line) for line in result.trace] == [2, 1]


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalise", "alpha", "scale"),
    [("sum", 9.0, lambda n: 1), ("mean", 9.0, lambda n: n), ("length_alpha", 0.5, math.sqrt)],
)
def test_values_by_length(normalise, alpha, scale):
    wanted = {"abe": PREFIX_VALUES["abe"], "bbbb": PREFIX_VALUES["bbbb"], "": 0.0}
    value = by_tables(beta=0.5, normalise=normalise, alpha=alpha)
    value.start([""])
    found = value.extend([grown(text) for text in wanted])
    assert found.tolist() == pytest.approx([0.5 * v / scale(len(t) or 1) for t, v in wanted.items()], abs=1e-9)


def test_a_reward_reads_prompt_and_reply_and_mixtures_add_up():
    asked = []

    def rewards(prompts, replies):
        asked.extend(prompts)
        return np.array([reply.count("a") for reply in replies])

    result = search(Exhaustive(2), RewardValue(rewards), ["?"], 2, 3)[0]
    assert (result.best.text, result.best.value) == ("aaaa", 4.0)
    assert set(asked) == {"?"}
    mixed = search(Exhaustive(2), Mixture([(0.1, RewardValue(rewards)), (2.0, by_tables())]), [""], 99, 3)[0]
    worth = {h.text: 0.1 * h.text.count("a") + 2 * hand_value(h.text) for h in mixed.beam}
    for h in mixed.beam:
        assert h.value == pytest.approx(worth[h.text], abs=1e-9)
    assert mixed.best.text == max(worth, key=worth.get)


class Merging(Letters):
    """A tokenizer of a, b and ab, which merges where it can."""

    def replies(self, texts, finished=None):
        names = {"a": 0, "b": 1, "ab": 2}
        return [np.array([names[piece] for piece in re.findall("ab|a|b", text)], np.int64) for text in texts]


def test_another_tokenizer_reads_the_text_and_not_the_chunks():
    """Reference 16: a and then b would be worth -0.98, but their text is one token."""
    engine = TabularEngine(np.stack([np.tile([0.2, 0.3, 0.5], (4, 1)), np.tile([0.4, 0.4, 0.2], (4, 1))]))
    value = ImplicitValue(engine, Merging(), False, [E])
    value.start([""])
    steps = {"a": -0.6931471806, "ab": 0.9162907319, "abba": None, "abbabab": 2.4611901232}
    given = [0]
    for text, wanted in steps.items():
        found = float(value.extend([grown(text, tokens=False)])[0])
        assert wanted is None or found == pytest.approx(wanted, abs=1e-9)
        given.append(engine.count.given)
    assert engine.rows == [[2, 1, 2, 2]]
    # "a" is taken back for "ab"; "abba" has two tokens in common with what it becomes
    assert np.diff(given).tolist() == [1, 1, 2, 2]


def test_half_a_character_is_never_read():
    """A byte-level vocabulary cuts characters in the middle, where U+FFFD would be worth something else."""
    half = "\N{REPLACEMENT CHARACTER}"
    strong = Chat(tokenizer_of())
    guide = Chat(tokenizer_of(words=["warm", "café", "naïve", "€uro", "cold €"]))
    assert strong.vocabulary != guide.vocabulary
    prompt, text = Dialogue.of_text("warm or cold?"), "warm café 5€ 😀 cold"
    tokens, read = strong.replies([text])[0], []
    size = len(guide.tokenizer)
    tables = np.random.default_rng(0).dirichlet(np.ones(size), (2, size + 1))
    plain = guide.replies
    guide.replies = lambda texts, finished=None: (read.extend(texts), plain(texts, finished))[1]
    value = ImplicitValue(TabularEngine(tables), guide, False, strong.stop)
    value.start([prompt])
    halves = 0
    for n in range(1, len(tokens) + 1):
        said = strong.text(tokens[:n])
        halves += said.endswith(half)
        for finished, cut in [(False, False), (False, True)] + [(True, False)] * (n == len(tokens)):
            h = Hypothesis(0, 0, said, tokens[:n], None, finished, cut, "")
            found = float(value.extend([h])[0])
            whole = np.append(plain([said.rstrip(half)])[0], np.array([guide.end] * finished, np.int64))
            before = np.append(guide.prompts([prompt])[0][-1:], whole[:-1])
            logs = np.log(tables[:, before + 1, whole])
            assert found == pytest.approx(float((logs[0] - logs[1]).sum()), abs=1e-9)
    assert halves >= 6
    assert said == text
    assert not any(half in text for text in read)


# -- engines ----------------------------------------------------------------------------------------------------------

LORA = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


def follow(engine, policies, seed: int = 0, steps: int = 14) -> None:
    """Read, write, fork, drop and take back at random, and compare with models without a cache."""
    generator = np.random.default_rng(seed)
    rows = [draw(generator, n) for n in (3, 9, 1)]
    least = [len(row) for row in rows]

    def right():
        for k, row in enumerate(rows):
            for m, policy in enumerate(policies):
                found = engine.logits[m, k].log_softmax(-1).numpy()
                assert np.abs(found - next_logs(policy, row)[-1]).max() < 1e-4

    with torch.inference_mode():
        engine.start(rows)
        right()
        for step in range(steps):
            kind = ["read", "rollback", "select", "extend", "read", "rollback", "read"][step % 7]
            if kind == "read":
                chunks = [draw(generator, generator.integers(0, 6)) for _ in rows]
                chunks[0] = chunks[0] if step < 7 else chunks[0][:0]  # nothing new in a row that was cut back or not
                found = engine.read(chunks)
                for row, chunk, values in zip(rows, chunks, found, strict=True):
                    assert values.shape == (len(chunk), len(policies))
                    if len(chunk):
                        assert np.abs(values - token_logs(policies, row, chunk)).max() < 1e-4
                rows = [np.append(row, chunk) for row, chunk in zip(rows, chunks, strict=True)]
                right()
            elif kind == "extend":
                tokens = draw(generator, len(rows))
                engine.extend(torch.from_numpy(tokens))
                rows = [np.append(row, token) for row, token in zip(rows, tokens, strict=True)]
                right()
            elif kind == "rollback":
                counts = [int(generator.integers(0, len(row) - n + 1)) for row, n in zip(rows, least, strict=True)]
                engine.rollback(np.array(counts))
                rows = [row[: len(row) - count] for row, count in zip(rows, counts, strict=True)]
                if step == 5:  # and again, to where the prompts end
                    engine.rollback(np.array([len(row) - n for row, n in zip(rows, least, strict=True)]))
                    rows = [row[:n] for row, n in zip(rows, least, strict=True)]
            else:
                chosen = generator.integers(0, len(rows), 5 if step < 7 else 2)
                engine.select(torch.from_numpy(chosen))
                rows, least = [rows[k] for k in chosen], [least[k] for k in chosen]
        engine.rollback(np.array([min(1, len(row) - n) for row, n in zip(rows, least, strict=True)]))
        rows = [row[: max(len(row) - 1, n)] for row, n in zip(rows, least, strict=True)]
        engine.read([np.zeros(0, np.int64)] * len(rows))  # what comes next, nothing being new
        right()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_reading_taking_back_and_forking_give_the_numbers_of_one_forward(kind):
    policies = [tiny(kind, seed) for seed in (0, 1)]
    for seed in range(2):
        follow(Several(*map(TransformersEngine, policies)), policies, seed)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapters_and_their_base_read_as_two_models(kind):
    from peft import LoraConfig, get_peft_model

    base = tiny(kind)
    config = LoraConfig(
        r=4,
        target_modules=LORA[kind],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=kind == "gpt2",
    )
    adapted = Policy(get_peft_model(copy.deepcopy(base.plain), config)).eval()
    merged = Policy(copy.deepcopy(adapted.model).merge_and_unload()).eval()
    follow(TransformersEngine(adapted, base_too=True), [merged, base])


@pytest.mark.parametrize("kind", ["window", "mamba", "hybrid"])
def test_caches_that_cannot_be_cut_back_are_made_anew(kind, caplog):
    policy = tiny(kind)
    engine = TransformersEngine(policy)
    assert engine.count.total == 0
    with caplog.at_level(logging.WARNING, logger="w2sg"):
        follow(engine, [policy])
        follow(engine, [policy], seed=1)
    said = [record for record in caplog.records if "read anew from their start" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(("kind", "prompt", "given"), [("mamba", 14 + 16, 10 + 30), ("hybrid", 14 + 16, 10)])
def test_several_tokens_are_read_on_from_a_state_by_models_that_can(kind, prompt, given):
    """Mamba would forget its state there without a word, and no state may see what fills up a shorter prompt."""
    generator = np.random.default_rng(0)
    start = draw(generator, 12)
    prompts = [np.append(start, draw(generator, n)) for n in (2, 4)]
    chunks = [draw(generator, 5), draw(generator, 5)]
    policy = tiny(kind)
    engine = TransformersEngine(policy)
    with torch.inference_mode():
        logits = engine.start(prompts)[0].log_softmax(-1).numpy()
        assert (engine.count.prompt, engine.count.given) == (prompt, 0)
        found = engine.read(chunks)
    for row, tokens, chunk, values in zip(logits, prompts, chunks, found, strict=True):
        assert np.abs(row - next_logs(policy, tokens)[-1]).max() < 1e-4
        assert np.abs(values - token_logs([policy], tokens, chunk)).max() < 1e-4
    assert engine.count.given == given


@pytest.mark.parametrize("window", [8, 20])
def test_a_window_is_of_tokens_and_not_of_what_fills_up_shorter_prompts(window):
    generator = np.random.default_rng(0)
    start = draw(generator, 10)
    rows = [np.append(start, draw(generator, n)) for n in (1, 8)]
    policy = tiny("window", window=window)
    engine = TransformersEngine(policy)
    with torch.inference_mode():
        logits = engine.start(rows)
        assert engine.count.prompt == 29
        # the common start is read once, where there is room; the shorter rest is filled up
        assert engine.count.computed == (10 + 2 * 8 if window == 20 else 2 * 18)
        for _ in range(6):
            for row, found in zip(rows, logits[0].log_softmax(-1).numpy(), strict=True):
                assert np.abs(found - next_logs(policy, row)[-1]).max() < 1e-4
            tokens = draw(generator, 2)
            logits = engine.extend(torch.from_numpy(tokens))
            rows = [np.append(row, token) for row, token in zip(rows, tokens, strict=True)]


def test_a_model_whose_cache_is_unknown_is_read_from_its_start(caplog):
    """One that swallows the cache would write every token as if it were the first."""
    policy, generator = tiny("llama"), np.random.default_rng(0)

    class Own(type(policy.plain)):
        def forward(self, input_ids, state=None, **options):
            return super().forward(input_ids)

    policy.plain.__class__ = Own
    rows = [draw(generator, 4), draw(generator, 9)]
    engine = TransformersEngine(policy)
    with torch.inference_mode():
        engine.start(rows)
        logits = engine.extend(torch.tensor([3, 5]))
    for row, token, found in zip(rows, (3, 5), logits[0].log_softmax(-1).numpy(), strict=True):
        assert np.abs(found - next_logs(policy, [*row, token])[-1]).max() < 1e-4
    TransformersEngine(policy)
    assert caplog.text.count("read anew from their start; this is slower") == 1


def test_tokens_read_are_counted():
    generator = np.random.default_rng(0)
    prompts, chunks = [draw(generator, 6), draw(generator, 3)], [draw(generator, 4), draw(generator, 2)]
    counts = {}
    for kind in ("llama", "window"):
        engine = TransformersEngine(tiny(kind))
        with torch.inference_mode():
            engine.start(prompts)
            engine.read(chunks)
            first = engine.count.given
            engine.rollback(np.array([3, 0]))
            engine.read([chunks[0][1:], chunks[1]])
        assert engine.count.prompt == 9
        counts[kind] = first, engine.count.given
    # the token that a row was cut back to is read again
    assert counts["llama"] == (6, 6 + 1 + 3 + 2)
    # and where the cache has no holes, all that stays
    assert counts["window"] == (6 + 9, 6 + 9 + 1 + 3 + 2 + 6 + 5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_last_token_of_a_reply_needs_no_position(kind):
    """A reply may be one token longer than what a model can read: nobody asks what comes after it."""
    policy = tiny(kind, places=16)
    generator = np.random.default_rng(0)
    rows = [draw(generator, 17), draw(generator, 13)]
    engine = TransformersEngine(policy)
    with torch.inference_mode():
        engine.start([row[:10] for row in rows])
        found = engine.read([row[10:] for row in rows])
        engine.read([rows[0][:0], rows[0][:2]])  # a full row beside one that goes on
        with pytest.raises(UserError, match="18 tokens is longer than the 16"):
            engine.read([rows[0][:1], rows[0][:0]])
    for row, values in zip(rows, found, strict=True):
        logs = next_logs(policy, row[:16])[9 : len(row) - 1][np.arange(len(row) - 10), row[10:]]
        assert np.abs(values[:, 0] - logs).max() < 1e-4


# -- searches with models ---------------------------------------------------------------------------------------------

PLAIN = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # columns of Settings


@pytest.fixture(scope="module")
def models():
    """A strong model, and a small one tuned and untuned."""
    return tiny("gpt2", 0), tiny("llama", 1), tiny("llama", 2)


def guides_of(models) -> Several:
    return Several(TransformersEngine(models[1]), TransformersEngine(models[2]))


def grower_of(engine, prompts, chunk: int, most: int, stops=STOPS, columns=PLAIN) -> EngineGrower:
    """Each prompt is its own id."""
    return EngineGrower(engine, Ids().prompts, Ids().text, prompts, columns, stops, chunk, most, seed=4)


def searched(models, prompts, beams, children, chunk, most, stops=STOPS, trace=False):
    """Results, and the engines of strong and small models."""
    strong, guides = TransformersEngine(models[0]), guides_of(models)
    value = ImplicitValue(guides, Ids(), True, stops)
    return (
        search(grower_of(strong, prompts, chunk, most, stops), value, prompts, beams, children, trace),
        strong,
        guides,
    )


def plain_samples(models, prompt: str, uniform, columns=PLAIN):
    """Replies by the decoder alone, from given random numbers."""
    settings = Settings.from_columns(torch.tensor([columns] * len(uniform)))
    ids, uniform = Ids().prompts([prompt]), torch.from_numpy(np.stack(uniform))
    return decode(TransformersEngine(models[0]), ids, settings, uniform, STOPS, [0] * len(uniform))


def value_anew(models, prompt: str, tokens) -> float:
    """The value of a reply, by models without a cache."""
    logs = token_logs(models[1:], Ids().prompts([prompt])[0], tokens)
    return float((logs[:, 0] - logs[:, 1]).sum())


def test_values_returned_are_those_of_the_texts_returned(models):
    prompts = prompts_of(3)
    results = searched(models, prompts, 3, 2, 4, 14)[0]
    finished = []
    for p, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        for h in (result.best, *result.beam):
            assert h.prompt == p
            assert h.text == Ids().text(h.tokens)
            assert h.value == pytest.approx(value_anew(models, prompt, h.tokens), abs=1e-4)
            logs = token_logs(models[:1], Ids().prompts([prompt])[0], h.tokens)
            assert np.allclose(h.log_probabilities, logs, atol=1e-4)
            assert h.finished == (int(h.tokens[-1]) in STOPS)
            assert h.finished or (h.cut and len(h.tokens) == 14)
            finished.append(h.finished)
        assert result.best.value >= max(h.value for h in result.beam)
        assert len({h.key for h in result.beam}) == len(result.beam) == 3
    assert set(finished) == {True, False}


def test_values_of_sampled_replies_of_tables_are_exact():
    for chunk, number in itertools.product((1, 2, 4), range(12)):
        engine = TabularEngine(STRONG[None])
        grower = EngineGrower(engine, Letters().prompts, spelt, [f"{number}"], PLAIN, [E], chunk, 4, seed=1)
        result = search(grower, by_tables(), [""], 3, 2, trace=True)[0]
        for h in (result.best, *result.beam):
            assert h.value == pytest.approx(hand_value(h.text), abs=1e-9)
            assert h.text == spelt(h.tokens)
        for line in result.trace:
            assert all(value == pytest.approx(hand_value(text), abs=1e-9) for text, value, _ in seen(line))
        assert len({h.text for h in result.beam}) == len(result.beam)


@pytest.mark.parametrize(("chunk", "penalty"), [(1, 1.0), (5, 1.0), (12, 1.0), (20, 1.0), (1, 1.6), (5, 1.6)])
def test_one_beam_with_one_child_is_plain_sampling(models, chunk, penalty):
    """A repetition penalty is of the whole reply, and not of a chunk."""
    prompts, columns = prompts_of(4, seed=1), [*PLAIN[:-1], penalty]
    results = search(grower_of(TransformersEngine(models[0]), prompts, chunk, 12, columns=columns), None, prompts, 1, 1)
    assert len({result.best.finished for result in results}) == 2
    for prompt, result in zip(prompts, results, strict=True):
        plain = plain_samples(models, prompt, [stream(4, prompt, 0, 12)], columns)
        assert result.best.tokens.tolist() == plain.tokens[0].tolist()
        assert result.best.finished == plain.stopped[0]
        assert np.allclose(result.best.log_probabilities, plain.log_probabilities[0], atol=1e-4)


def test_one_beam_whose_chunk_is_a_reply_is_best_of_n(models):
    prompts = prompts_of(2, seed=2)
    results = searched(models, prompts, 1, 6, 15, 15, trace=True)[0]
    for prompt, result in zip(prompts, results, strict=True):
        plain = plain_samples(models, prompt, [stream(4, prompt, sample, 15) for sample in range(6)])
        assert [note["chunk"] for note in result.trace[0]] == [Ids().text(tokens) for tokens in plain.tokens]
        values = [value_anew(models, prompt, t) for t in plain.tokens]
        assert result.best.tokens.tolist() == plain.tokens[int(np.argmax(values))].tolist()
        assert result.best.value == pytest.approx(max(values), abs=1e-4)


def test_results_depend_neither_on_the_other_prompts_nor_on_their_order(models):
    prompts = prompts_of(4, seed=3)
    together = searched(models, prompts, 2, 3, 3, 9)[0]
    back = searched(models, prompts[::-1], 2, 3, 3, 9)[0][::-1]
    assert {h.finished for result in together for h in result.beam} == {True, False}
    for p, prompt in enumerate(prompts):
        alone = searched(models, [prompt], 2, 3, 3, 9)[0][0]
        for other in (back[p], alone):
            assert [h.tokens.tolist() for h in other.beam] == [h.tokens.tolist() for h in together[p].beam]
            assert other.best.tokens.tolist() == together[p].best.tokens.tolist()
            assert other.best.value == pytest.approx(together[p].best.value, abs=1e-4)
            assert (other.rule, other.rounds) == (together[p].rule, together[p].rounds)


def test_a_reply_hangs_on_its_lineage_and_not_on_what_was_pruned(models):
    """Written by itself, without forks and siblings that were dropped on the way, it is the same."""
    prompts = prompts_of(2, seed=5)
    results = searched(models, prompts, 2, 3, 3, 12)[0]
    forked = 0
    for prompt, result in zip(prompts, results, strict=True):
        for h in result.beam:
            name, *forks = h.lineage.split("/")
            uniform = stream(4, prompt, name, 12)
            for fork in forks:
                name, start = f"{name}/{fork}", int(fork.split(".")[0])
                uniform[start:] = stream(4, prompt, name, 12)[start:]
            assert plain_samples(models, prompt, [uniform]).tokens[0].tolist() == h.tokens.tolist()
            forked += len(forks)
    assert forked > 0


@pytest.mark.parametrize(("beams", "children", "chunk", "most"), [(2, 2, 5, 20), (3, 2, 4, 10), (1, 6, 12, 12)])
def test_each_model_reads_each_token_once(models, beams, children, chunk, most):
    """P + B T tokens for B rows, where reading every text anew after every chunk grows with the square of T."""
    prompts = prompts_of(2, seed=6)
    size, rows = sum(map(len, Ids().prompts(prompts))), 2 * beams * children
    results, strong, guides = searched(models, prompts, beams, children, chunk, most, stops=[], trace=True)
    rounds = math.ceil(most / chunk)
    for result in results:
        assert result.rounds == rounds
        assert [len(line) for line in result.trace] == [beams * children] * rounds  # no duplicates
    for engine in guides.engines:
        assert engine.count.total == size + rows * most
        assert engine.count.computed <= engine.count.total + 12  # the shorter prompt is filled up
    assert strong.count.prompt == size
    # the last token of a chunk is read by those alone that go on
    assert strong.count.written == rows * (most - rounds) + 2 * beams * (rounds - 1)
    assert strong.count.given == 0


def test_replies_up_to_the_last_position_are_valued():
    models = tiny("gpt2", 0, places=16), tiny("llama", 1, places=16), tiny("llama", 2, places=16)
    prompts = [Ids().text(range(2, 12)), Ids().text(range(20, 24))]
    results = searched(models, prompts, 2, 2, 4, 9, stops=[])[0]
    assert [len(result.best.tokens) for result in results] == [7, 9]
    assert all(h.cut for result in results for h in result.beam)
    h = results[0].best
    ids = np.append(np.arange(2, 12), h.tokens)
    logs = [next_logs(policy, ids[:16])[9:][np.arange(7), h.tokens] for policy in models[1:]]
    assert h.value == pytest.approx(float((logs[0] - logs[1]).sum()), abs=1e-4)


# -- tilted -----------------------------------------------------------------------------------------------------------


def tilted(beta: float, base=STRONG) -> Tilted:
    return Tilted(TabularEngine(base[None]), TabularEngine(np.stack([TUNED, UNTUNED])), beta)


@pytest.mark.parametrize("beta", sorted(TILTED))
def test_tilted_laws_are_those_of_the_reference(beta):
    engine = tilted(beta)
    logits = engine.start([letters(""), letters("a"), letters("b")])
    for found in (logits, engine.logits):
        assert np.allclose(found.softmax(-1)[0].numpy(), TILTED[beta], atol=1e-9)
    engine.select(torch.tensor([2, 0]))
    found = engine.extend(torch.tensor([0, 1])).softmax(-1)[0].numpy()
    assert np.allclose(found, TILTED[beta][1:], atol=1e-9)


def test_the_limits_of_a_tilt():
    rows = [letters(""), letters("a"), letters("b")]
    assert torch.equal(tilted(0.0).start(rows), TabularEngine(STRONG[None]).start(rows))
    whole = tilted(1.0, UNTUNED).start(rows)
    assert torch.allclose(whole, TabularEngine(TUNED[None]).start(rows), rtol=0, atol=1e-12)


def test_a_tilted_model_is_searched_as_any_other(models):
    """With the untuned model as its base it is the tuned one, token for token."""
    prompts = prompts_of(2, seed=7)
    found = []
    for tilt in (True, False):
        base, tuned, untuned = (TransformersEngine(models[k]) for k in (2, 1, 2))
        engine = Tilted(base, Several(tuned, untuned), 1.0) if tilt else tuned
        value = ImplicitValue(guides_of(models), Ids(), True, STOPS)
        found.append(search(grower_of(engine, prompts, 4, 12), value, prompts, 2, 2))
    for a, b in zip(*found, strict=True):
        assert a.best.tokens.tolist() == b.best.tokens.tolist()
        assert a.best.log_probabilities.shape == (len(a.best.tokens), 1)
        assert np.allclose(a.best.log_probabilities, b.best.log_probabilities, atol=1e-4)
        assert a.best.value == pytest.approx(b.best.value, abs=1e-4)
