"""Weak-to-strong decoding: against the rule on whole drafts, tables worked out by hand, and models read anew."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, compose, save_tiny_model
from dialogues import CHATML, END, PROMPT, tokenizer_of
from pydantic import TypeAdapter
from tiny_engines import Ids, next_logs, prompts_of, tiny, token_logs

from w2sg.config.check import check
from w2sg.data.dialogue import EXAMPLES, Chat, TextChat
from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import decode, stream
from w2sg.decoding.decoders import AnyDecoder, decoder_in
from w2sg.decoding.drafting import SCAN, Draft, Drafting, Rule, switch_after
from w2sg.decoding.engine import TabularEngine
from w2sg.decoding.nudging import Nudged, Nudging, encode_beginning
from w2sg.decoding.sampling import Settings
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import ConfigError
from w2sg.experiment.run import run_method

# reference 12
PROBABILITIES = [0.02, 0.4, 0.9, 0.05, 0.97, 0.99, 0.25, 0.97, 0.98, 0.97, 0.96, 0.91, 0.99, 0.97, 0.1, 0.99]
CASES = [  # window, threshold, tokens kept, whether it was reached
    (6, 0.8, 13, True),
    (1, 0.8, 3, True),
    (3, 0.8, 10, True),
    (6, 0.9, 13, True),
    (6, 0.95, 13, True),
    (6, 0.5, 10, True),
    (16, 0.5, 16, False),
    (17, 0.1, 16, False),
]
SAMPLED = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # columns of Settings
GREEDY = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
HALF = "\N{REPLACEMENT CHARACTER}"

of = Dialogue.of_text


def logs_of(probabilities) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "threshold", "kept", "reached"), CASES)
def test_the_switch_is_where_the_reference_has_it(window, threshold, kept, reached):
    assert switch_after(logs_of(PROBABILITIES), window, threshold) == (kept, reached)


def test_the_switch_of_ties_zeros_and_numbers_that_underflow():
    assert switch_after(logs_of([0.8] * 6), 6, 0.8) == (6, True)
    assert switch_after(logs_of([0.0] + [0.9] * 7), 6, 0.8) == (7, True)
    assert switch_after(logs_of([0.99] * 3), 6, 0.8) == (3, False)
    assert switch_after(logs_of([1e-60] * 6 + [0.9] * 6), 6, 0.8) == (12, True)  # one product of all would be 0
    assert switch_after(logs_of([]), 1, 0.5) == (0, False)
    # two correct formulas differ at 0.55 and 0.57 if they are compared without a tolerance
    for probability in np.arange(1, 100) / 100:
        assert switch_after(logs_of([probability] * 6), 6, probability) == (6, True)
        assert switch_after(logs_of([probability] * 6), 6, probability + 1e-6) == (6, False)


# -- drafts of tables -------------------------------------------------------------------------------------------------


class Few(Ids):
    """Ids of a small vocabulary, whose last ends a reply."""

    end, stop = 5, [5]


def names(prompts) -> list[str]:
    return [getattr(prompt, "text", prompt) for prompt in prompts]


def drafted(engines, chats, rule, prompts, columns=(SAMPLED, SAMPLED), identities=None) -> list[Draft]:
    sides = map(Side, engines, chats, columns)
    return Drafting(*sides, rule, identities or names(prompts), seed=9).write(prompts)


def write(engine, ids, identity: str, sample, start: int, most: int, stop, columns=SAMPLED):
    """A reply from a place on, by the decoder alone."""
    uniform = torch.from_numpy(stream(9, identity, sample, most)[None, start:])
    found = decode(engine, [ids], Settings.from_columns(torch.tensor([columns])), uniform, stop)
    return found.tokens[0], bool(found.stopped[0]), found.log_probabilities[0][:, 0]


def offline(tables, prompt: str, rule: Rule):
    """Draft to the end, read all of it, find the switch, and write on from there: one after the other."""
    chat = Few()
    ids = chat.prompts([prompt])[0]
    draft, complete, _ = write(TabularEngine(tables[:1]), ids, prompt, "draft", 0, rule.draft, chat.stop)
    whole = len(draft)
    draft = draft[:-1] if complete else draft
    base = TabularEngine(tables[1:])
    base.start([ids])
    logs = base.read([draft])[0][:, 0]
    kept, reached = switch_after(logs, rule.window, rule.threshold)
    fate = "reached" if reached else "complete" if complete else "longest"
    tokens, logs, finished = draft[:kept], logs[:kept], fate == "complete"
    if fate != "complete" and kept < rule.most:
        start = np.append(ids, tokens)
        more, finished, its_logs = write(TabularEngine(tables[1:]), start, prompt, 0, kept, rule.most, chat.stop)
        tokens, logs = np.append(tokens, more), np.append(logs, its_logs)
    return tokens, logs, kept, fate, finished, whole


@pytest.fixture(scope="module")
def many():
    """Tables, rules and prompts at random, and what the three passes make of them."""
    generator = np.random.default_rng(0)
    prompts = [f"{a} {b}" for a, b in itertools.product(range(5), range(2))]
    found = []
    for _ in range(24):
        tables = generator.dirichlet(np.ones(6) * 0.4, (2, 7)) + 0.005
        tables[0, :, 5] *= 0.3  # drafts shall not end at once
        tables /= tables.sum(-1, keepdims=True)
        draft = int(generator.integers(5, 40))
        window, threshold = int(generator.choice([1, 3, 6])), float(generator.uniform(0.05, 0.6))
        rule = {"window": window, "threshold": threshold, "draft": draft}
        rule["most"] = draft + int(generator.integers(0, 12))
        wanted = [offline(tables, prompt, Rule(check=1, **rule)) for prompt in prompts]
        found.append((tables, rule, prompts, wanted))
    return found


@pytest.mark.parametrize("check", [1, 4, 16])
def test_looking_while_it_is_drafted_finds_the_switch_of_the_whole_draft(many, check):
    fates, later = {}, 0
    for tables, rule, prompts, wanted in many:
        engines = TabularEngine(tables[:1]), TabularEngine(tables[1:])
        found = drafted(engines, (Few(), Few()), Rule(check=check, **rule), prompts)
        for d, (tokens, logs, kept, fate, finished, whole) in zip(found, wanted, strict=True):
            assert (d.kept, d.switch, d.finished) == (kept, fate, finished)
            assert d.tokens.tolist() == tokens.tolist()
            assert d.log_probabilities.tolist() == pytest.approx(logs.tolist(), abs=1e-5)
            assert d.text == Few().text(tokens)
            # never a token more than to the next look
            assert d.drafted == (min(-(-kept // check) * check, whole) if fate == "reached" else whole)
            fates[fate] = fates.get(fate, 0) + 1
            later += d.drafted < whole
    assert sum(fates.values()) == 240
    assert min(fates["reached"], fates["complete"], fates["longest"]) >= 15
    assert later > 0 or check == 16


def test_a_repetition_penalty_is_of_the_whole_reply(many):
    """So that looking more often changes no draft, and what the large one writes is not what was drafted."""
    columns = [*SAMPLED[:-1], 1.7]
    plain, changed = 0, 0
    for tables, rule, prompts, _ in many[:8]:
        found = [
            drafted(
                (TabularEngine(tables[:1]), TabularEngine(tables[1:])),
                (Few(), Few()),
                Rule(check=check, **rule),
                prompts,
                (columns, columns),
            )
            for check in (1, 16)
        ]
        assert [d.tokens.tolist() for d in found[0]] == [d.tokens.tolist() for d in found[1]]
        unlike = drafted(
            (TabularEngine(tables[:1]), TabularEngine(tables[1:])), (Few(), Few()), Rule(check=1, **rule), prompts
        )
        plain += len(unlike)
        changed += sum(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(unlike, found[0], strict=True))
    assert changed > plain / 4


def test_a_complete_draft_is_left_as_it_is():
    """Where nothing was reached and the small model came to an end, the large one writes nothing."""
    tables = np.full((2, 7, 6), 0.01)
    for token in range(5):
        tables[0, token + 1, token + 1] = 0.95  # 0 1 2 3 4, and the end
    tables[1, :, 0] = 0.95
    base = TabularEngine(tables[1:])
    rule = Rule(window=2, threshold=0.5, check=3, draft=20, most=30)
    d = drafted((TabularEngine(tables[:1]), base), (Few(), Few()), rule, ["0"], (GREEDY, GREEDY))[0]
    assert (d.tokens.tolist(), d.kept, d.switch, d.finished, d.drafted) == ([1, 2, 3, 4], 4, "complete", True, 5)
    assert (base.count.prompt, base.count.given, base.count.written) == (1, 4, 0)
    # what does not fit into the large one's positions is cut, and what is cut has no end
    narrow = TabularEngine(tables[1:])
    narrow.limit = 3
    d = drafted((TabularEngine(tables[:1]), narrow), (Few(), Few()), rule, ["0"], (GREEDY, GREEDY))[0]
    assert (d.tokens.tolist(), d.switch, d.finished) == ([1, 2, 3], "longest", False)
    # with no more room for it, the large one goes on
    d = drafted(
        (TabularEngine(tables[:1]), TabularEngine(tables[1:])),
        (Few(), Few()),
        Rule(window=2, threshold=0.5, check=3, draft=2, most=5),
        ["0"],
        (GREEDY, GREEDY),
    )[0]
    assert (d.tokens.tolist(), d.kept, d.switch, d.finished, d.drafted) == ([1, 2, 0, 0, 0], 2, "longest", False, 2)


# -- what it costs: reference 15b, a prompt of 100 tokens, a switch at 60 and a look every 16 -------------------------


class Endless(Ids):
    stop = ()


def counting(size: int) -> np.ndarray:
    """[1 + V, V]: after k comes k + 1."""
    table = np.full((size + 1, size), 1e-4)
    table[np.arange(size) + 1, (np.arange(size) + 1) % size] = 0.99
    return table


def test_draft_and_check_cost_what_the_reference_says():
    small, large = counting(100), counting(100)
    large[np.arange(54) + 1, np.arange(54) + 1] = 0.1  # the first 54 tokens are not what the base model would say
    drafter, base = TabularEngine(small[None]), TabularEngine(large[None])
    rule = Rule(window=6, threshold=0.8, check=16, draft=512, most=1024)
    prompts = [Ids().text([0] * 100)]
    d = drafted((drafter, base), (Endless(), Endless()), rule, prompts, (GREEDY, GREEDY))[0]
    assert (d.kept, d.drafted, len(d.tokens), d.switch, d.finished) == (60, 64, 1024, "reached", False)
    assert (drafter.count.prompt, drafter.count.written) == (100, 63)  # of the last one nobody asks what comes next
    assert (base.count.prompt + base.count.given, base.count.written) == (164, 963)


def test_a_model_reads_one_token_again_where_the_switch_is_within_a_look():
    """The last token kept, because what comes after it was not noted; none where the switch is at the look itself."""

    class Sure(TransformersEngine):
        """Agrees with the draft after some tokens."""

        at = after = 0

        def read(self, chunks):
            super().read(chunks)
            values = np.where(np.arange(self.at, self.at + len(chunks[0])) < self.after, 0.1, 0.99)
            self.at += len(chunks[0])
            return [np.log(values)[:, None]]

    small, large = tiny("gpt2", 0, places=256), tiny("llama", 1, places=256)
    rule = Rule(window=6, threshold=0.8, check=16, draft=100, most=90)
    prompt = Ids().text(np.random.default_rng(0).integers(2, 60, 100))
    for after, kept, extra in ((54, 60, 1), (58, 64, 0)):
        drafter, base = TransformersEngine(small), Sure(large)
        base.at, base.after = 0, after
        d = drafted((drafter, base), (Endless(), Endless()), rule, [prompt], (GREEDY, GREEDY))[0]
        assert (d.kept, d.drafted, len(d.tokens)) == (kept, 64, 90)
        assert base.count.prompt + base.count.given == 164 + extra
        assert base.count.written == 90 - kept - 1
        assert drafter.count.total == 163


# -- drafts of models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return tiny("gpt2", 3), tiny("llama", 4)


RULE = Rule(window=2, threshold=0.03, check=5, draft=18, most=40)


def test_the_base_model_goes_on_from_what_it_has_read(pair):
    prompts = prompts_of(8, seed=1)
    engines = tuple(map(TransformersEngine, pair))
    found = drafted(engines, (Ids(), Ids()), RULE, prompts, (SAMPLED, GREEDY))
    fates = {d.switch for d in found}
    assert fates >= {"reached", "longest"}
    assert len({d.kept % RULE.check for d in found if d.switch == "reached"}) > 1
    for prompt, d in zip(prompts, found, strict=True):
        ids = Ids().prompts([prompt])[0]
        logs = token_logs(pair[1:], ids, d.tokens)[:, 0]
        assert np.allclose(d.log_probabilities, logs, atol=1e-4)
        assert switch_after(logs[: d.kept], RULE.window, RULE.threshold) == (d.kept, d.switch == "reached")
        if d.switch != "complete":
            start = np.append(ids, d.tokens[: d.kept])
            engine = TransformersEngine(pair[1])
            fresh, ended, _ = write(engine, start, prompt, 0, d.kept, RULE.most, Ids.stop, GREEDY)
            assert d.tokens[d.kept :].tolist() == fresh.tolist()
            assert d.finished == ended


def test_a_batch_is_written_as_its_prompts_one_by_one(pair):
    prompts = prompts_of(6, seed=2)
    together = drafted(tuple(map(TransformersEngine, pair)), (Ids(), Ids()), RULE, prompts)
    assert len({d.kept for d in together}) > 2
    for prompt, d in zip(prompts, together, strict=True):
        alone = drafted(tuple(map(TransformersEngine, pair)), (Ids(), Ids()), RULE, [prompt])[0]
        assert alone.tokens.tolist() == d.tokens.tolist()
        assert np.allclose(alone.log_probabilities, d.log_probabilities, atol=1e-4)
        for name in ("kept", "switch", "finished", "text", "drafted"):
            assert getattr(alone, name) == getattr(d, name)


def test_drafts_and_replies_end_where_the_base_model_has_no_position_left():
    models = tiny("gpt2", 3), tiny("llama", 4, places=32)
    prompts = [Ids().text(range(6, 26)), Ids().text(range(6, 10))]
    rule = Rule(window=3, threshold=0.99, check=5, draft=30, most=40)
    found = drafted(tuple(map(TransformersEngine, models)), (Endless(), Endless()), rule, prompts)
    assert [(len(d.tokens), d.kept, d.switch, d.finished) for d in found] == [
        (13, 13, "longest", False),
        (29, 29, "longest", False),
    ]
    ids = np.append(np.arange(6, 26), found[0].tokens)
    logs = next_logs(models[1], ids[:32])[19:][np.arange(13), found[0].tokens]
    assert np.allclose(found[0].log_probabilities, logs, atol=1e-4)


# -- different tokenizers ---------------------------------------------------------------------------------------------


def among(chat: Chat, texts, generator) -> TabularEngine:
    """Writes the tokens of some texts, in any order."""
    size = len(chat.tokenizer)
    table = np.full((size + 1, size), 1e-12)
    tokens = sorted({int(token) for ids in chat.replies(texts) for token in ids})
    table[:, tokens] = generator.dirichlet(np.ones(len(tokens)), size + 1)
    return TabularEngine(table[None])


def test_with_another_tokenizer_the_switch_is_that_of_the_draft_tokenised_anew():
    small = Chat(tokenizer_of(words=["good", "bad", "warm", "cold", "silly"]))
    large = Chat(tokenizer_of(words=["go", "odba", "war", "ms", "ill", "ycold"]))
    assert small.vocabulary != large.vocabulary
    model = tiny("llama", 5, places=256, size=len(large.tokenizer))
    texts = ["good bad warm cold silly", "g o a r m\n", " s il co"]
    drafter = among(small, texts, np.random.default_rng(0))
    prompts = [of(f"\n\nHuman: {word}?\n\nAssistant:") for word in ("good", "bad", "warm", "cold", "rude", "kind")]
    rule = Rule(window=3, threshold=0.006, check=4, draft=40, most=150)
    base = TransformersEngine(model)
    rolled = []
    back = base.rollback
    base.rollback = lambda counts: (rolled.append(int(np.sum(counts))), back(counts))[1]
    found = drafted((drafter, base), (small, large), rule, prompts)
    early = 0
    for prompt, d in zip(prompts, found, strict=True):
        ids = small.prompts([prompt])[0]
        engine = TabularEngine(np.exp(drafter.tables.numpy()))
        draft = write(engine, ids, prompt.text, "draft", 0, rule.draft, small.stop)[0]
        again = large.replies([small.text(draft)])[0]
        logs = token_logs([model], large.prompts([prompt])[0], again)[:, 0]
        kept, reached = switch_after(logs, rule.window, rule.threshold)
        assert (d.kept, d.switch) == (kept, "reached" if reached else "longest")
        assert d.tokens[:kept].tolist() == again[:kept].tolist()
        logs = token_logs([model], large.prompts([prompt])[0], d.tokens)[:, 0]
        assert np.allclose(d.log_probabilities, logs, atol=1e-4)
        assert d.text == large.text(d.tokens)
        early += d.drafted < len(draft)
    assert {d.switch for d in found} == {"reached", "longest"}
    assert early > 0
    assert sum(rolled[::2]) > 0  # words grew, and were read again as other tokens


def test_a_draft_that_is_cut_within_a_character_is_read_without_it():
    small, large = Chat(tokenizer_of()), Chat(tokenizer_of(words=["warm", "café"]))
    prompt = of("\n\nHuman: Hi\n\nAssistant:")
    last = int(small.prompts([prompt])[0][-1])
    path = [last, *small.replies(["warm é"])[0]]
    drafter = chain(small, path)
    base = among(large, ["cold"], np.random.default_rng(0))
    read = []
    plain = large.replies
    large.replies = lambda texts: (read.extend(texts), plain(texts))[1]
    rule = Rule(window=2, threshold=0.99, check=2, draft=len(path) - 2, most=30)
    assert small.text(path[1:-1]).endswith(HALF)
    d = drafted((drafter, base), (small, large), rule, [prompt], (GREEDY, SAMPLED))[0]
    assert d.switch == "longest"
    assert large.text(d.tokens[: d.kept]) == "warm"
    assert not any(HALF in text for text in (*read, d.text))


# -- strings that end a reply -----------------------------------------------------------------------------------------


def chain(chat: Chat, *paths) -> TabularEngine:
    """After each token of a path comes the next one; of several paths the first is the likelier."""
    size = len(chat.tokenizer)
    table = np.full((size + 1, size), 1e-6)
    for share, path in zip((0.6, 0.3), paths, strict=False):
        for before, after in itertools.pairwise(map(int, path)):
            table[before + 1, after] = share
    return TabularEngine(table[None])


def test_a_string_that_ends_a_turn_cuts_the_text_and_finishes_it():
    tokenizer = tokenizer_of()
    small, large = Chat(tokenizer), TextChat(tokenizer, "roles")
    assert small.vocabulary == large.vocabulary
    calm, warm = (int(small.replies([word])[0][0]) for word in ("calm", "warm"))
    turn = [int(token) for token in tokenizer("\n[User]")["input_ids"]]
    assert len(set(turn)) == len(turn)  # so that each of them knows what comes next
    prompts = [of("\n\nHuman: Hi\n\nAssistant:")]
    first, newline = int(small.prompts(prompts)[0][-1]), turn[0]
    assert int(large.prompts(prompts)[0][-1]) == newline
    # the base model goes on with "calm" by the beginning of a turn, and that for ever
    base = chain(large, [calm, *turn, newline], [newline, calm])
    rule = Rule(window=1, threshold=0.2, check=1, draft=9, most=100)
    d = drafted((chain(small, [first, calm, warm]), base), (small, large), rule, prompts, (GREEDY, GREEDY))[0]
    assert (d.text, d.finished, d.kept, d.switch) == ("calm", True, 1, "reached")
    assert len(d.tokens) == 1 + SCAN
    assert d.tokens[1 : len(turn) + 2].tolist() == [*turn, newline]
    # what stands in the draft is the small model's, who ends its turns by itself
    base = chain(large, [calm, *turn, warm, large.end], [newline, calm])
    rule = Rule(window=len(turn) + 2, threshold=0.2, check=3, draft=30, most=100)
    drafter = chain(small, [first, calm, *turn, warm])
    d = drafted((drafter, base), (small, large), rule, prompts, (GREEDY, GREEDY))[0]
    assert (d.text, d.finished, d.kept, d.switch) == ("calm\n[User] warm", True, len(turn) + 2, "reached")
    assert int(d.tokens[-1]) == large.end


@pytest.mark.parametrize(
    ("style", "text", "wanted"),
    [
        ("roles", "press [User] and wait", None),
        ("roles", "press the key\nand [User] too", None),
        ("roles", "a [Assistant]\n[other]\nUser]", None),
        ("roles", "Hello.\n\n[User]\nBye", "Hello."),
        ("roles", "Hello.\n[Assistant]\nBye\n[User]", "Hello."),
        ("roles", "Hello.\n\n[System]", "Hello."),
        ("roles", "[User]\nBye", ""),
        ("urial", "The ``` fence and # Query: are marks", None),
        ("urial", "Hello.\n```\n\n# Query:\n```\nBye", "Hello."),
        ("urial", "Hello.\n# Query:\nBye", "Hello."),
    ],
)
def test_strings_end_a_reply_at_the_start_of_a_line_alone(style, text, wanted):
    chat = TextChat(tokenizer_of(), style)
    assert chat.until_stop(text) == ((text, False) if wanted is None else (wanted, True))
    assert chat.until_stop(text, len(text)) == (text, False)
    assert chat.until_stop(f"So {text}", 3)[1] == (bool(wanted))  # where a part begins is no start of a line
    assert Chat(tokenizer_of()).until_stop(text) == (text, False)


# -- nudging: both take turns ------------------------------------------------------------------------------------------

TURNS = [of(f"\n\nHuman: {question}\n\nAssistant:") for question in ("good?", "is it warm?", "cold")]


def by_turns(engines, chats, threshold, most, prompts=TURNS, columns=(GREEDY, GREEDY)) -> list[Nudged]:
    sides = map(Side, engines, chats, columns)
    return Nudging(*sides, threshold, most, names(prompts), seed=9).write(prompts)


def top(engine: TabularEngine, ids) -> tuple[int, float]:
    row = engine.tables[0, int(ids[-1]) + 1].exp().numpy()
    return int(row.argmax()), float(row.max())


def round_by_round(small, base, chats, prompt: Dialogue, threshold: float, most: int):
    """Nudging as its authors tell it, with tables that know the last token: words of the small model up to a place
    where the base model is sure, then what that is sure of. All with their writers, the number of rounds, and whether
    the small model ended it. What is handed over is text where the tokenizers differ.
    """
    before = [chat.prompts([prompt])[0] for chat in chats]
    shared = chats[0].vocabulary == chats[1].vocabulary

    def handed(ids: list[int], giver: int, taker: int) -> list[int]:
        if shared or giver == taker:
            return ids
        text = chats[giver].tokenizer.decode(ids).removeprefix(" ")
        return chats[taker].tokenizer(text if text[0].isspace() else f" {text}")["input_ids"] if text else []

    def sure(ids: list[int]) -> tuple[int, bool]:
        token, probability = top(base, np.append(before[1], ids))
        return token, probability >= threshold and token not in chats[1].stop

    said, by, rounds = [], [], 0  # in the base model's tokens
    while True:
        rounds += 1
        ids = handed(said, 1, 0)
        own, start = list(ids), len(ids)
        while True:
            token, _ = top(small, np.append(before[0], own))
            ended = token in chats[0].stop
            starts_word = len(own) > start and chats[0].tokenizer.decode([token])[0].isspace()
            if ended or (starts_word and sure(handed(own, 0, 1))[1]):
                break
            own.append(token)
            if len(handed(own, 0, 1)) >= most:
                break
        said = handed(own, 0, 1)[:most]
        by += [True] * (len(said) - len(by))
        if ended or len(said) >= most:
            return said, by, rounds, ended
        while (found := sure(said))[1]:
            said, by = [*said, found[0]], [*by, False]
            if len(said) >= most:
                return said, by, rounds, False


def speaking(chat: Chat, texts, generator, end: float = 0.1) -> TabularEngine:
    """Likes some tokens of texts after each token, now one and now several; and sometimes an end."""
    size = len(chat.tokenizer)
    table = np.full((size + 1, size), 1e-9)
    tokens = sorted({int(token) for text in texts for token in chat.tokenizer(text)["input_ids"]})
    table[:, tokens] = generator.dirichlet(np.full(len(tokens), 0.25), size + 1)
    table[:, chat.end] = generator.uniform(0, 1, size + 1) < end
    return TabularEngine((table / table.sum(-1, keepdims=True))[None])


SPOKEN = [" good bad", " warmly cold", "ly silly", " a wise", " brave\n", "ness true"]


def test_turns_are_those_of_the_authors_rounds():
    chat = Chat(tokenizer_of())
    endings, rounds, shares = set(), set(), []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        tables = [speaking(chat, SPOKEN, generator).tables.exp().numpy() for _ in range(2)]
        threshold = float(generator.choice([0.2, 0.4, 0.6, 0.8]))
        engines = [TabularEngine(table) for table in tables]
        found = by_turns(engines, (chat, chat), threshold, 30)
        for prompt, reply in zip(TURNS, found, strict=True):
            tokens, by_small, turns, finished = round_by_round(*engines, (chat, chat), prompt, threshold, 30)
            assert reply.text == chat.text(tokens)
            assert reply.tokens.tolist() == tokens
            assert (reply.nudged.tolist(), reply.nudges, reply.finished) == (by_small, turns, finished)
            after = [chat.prompts([prompt])[0][-1], *tokens]
            logs = [np.log(tables[1][0, last + 1, token]) for last, token in itertools.pairwise(after)]
            assert reply.log_probabilities.tolist() == pytest.approx(logs)
            endings.add(finished)
            rounds.add(turns)
            shares += by_small
        # each model has read each token once, whoever wrote it; the small one may not have read the base's last
        written = sum(len(reply.tokens) for reply in found)
        assert engines[1].count.given == written
        assert engines[0].count.given <= written
    assert endings == {True, False}
    assert max(rounds) > 4
    assert 0.2 < np.mean(shares) < 0.9


def test_turns_by_hand():
    """fine|ly (unsure) bad (sure) -> warm (sure) ... each end that only the base model wants is the other's turn."""
    chat = Chat(tokenizer_of())
    fine, ly, bad, warm, cold, end = (
        int(chat.tokenizer(text)["input_ids"][0]) for text in (" fine", "ly", " bad", " warm", " cold", "<|endoftext|>")
    )
    assert end == chat.end
    first = int(chat.prompts(TURNS[:1])[0][-1])
    small, base = (np.full((len(chat.tokenizer) + 1, len(chat.tokenizer)), 1e-9) for _ in range(2))

    def after(table, last: int, **shares):
        names = {"fine": fine, "ly": ly, "bad": bad, "warm": warm, "cold": cold, "end": end}
        table[last + 1] = (1 - sum(shares.values())) / (len(table[0]) - len(shares))
        for name, share in shares.items():
            table[last + 1, names[name]] = share

    after(small, first, fine=0.9)
    after(small, fine, ly=0.9)
    after(small, ly, bad=0.9)
    after(small, bad, warm=0.9)
    after(small, warm, cold=0.9)
    after(small, cold, end=0.9)
    after(base, first, warm=0.99)  # not asked: the small model begins
    after(base, fine, warm=0.99)  # nor is it asked within a word
    after(base, ly, cold=0.39, bad=0.3)  # unsure
    after(base, bad, warm=0.4, cold=0.3)  # just sure enough
    after(base, warm, end=0.95)  # ends are the small model's
    after(base, cold, end=0.95)
    engines = TabularEngine(small[None]), TabularEngine(base[None])
    (reply,) = by_turns(engines, (chat, chat), 0.4, 20, TURNS[:1])
    assert reply.tokens.tolist() == [fine, ly, bad, warm, cold]
    assert reply.nudged.tolist() == [True, True, True, False, True]
    assert (reply.nudges, reply.finished, reply.text) == (2, True, "finely bad warm cold")
    (reply,) = by_turns(
        engines, (chat, chat), 0.39, 20, TURNS[:1]
    )  # now it says " cold" after "ly", and the other ends
    assert (reply.text, reply.nudges, reply.finished) == ("finely cold", 2, True)
    (reply,) = by_turns(engines, (chat, chat), 0.4, 4, TURNS[:1])
    assert (reply.text, reply.nudges, reply.finished) == ("finely bad warm", 1, False)


@pytest.mark.parametrize("columns", [(GREEDY, GREEDY), (SAMPLED, SAMPLED)])
def test_turns_of_models_are_the_same_alone_and_read_anew(columns):
    chat = Chat(tokenizer_of())
    size = len(chat.tokenizer)
    models = tiny("gpt2", 3, places=128, size=size), tiny("llama", 4, places=128, size=size)
    prompts = [of(f"\n\nHuman: {word}?\n\nAssistant:") for word in ("good", "bad", "warm", "so cold", "rude")]
    threshold = 0.02
    together = by_turns(list(map(TransformersEngine, models)), (chat, chat), threshold, 16, prompts, columns)
    assert len({tuple(reply.nudged.tolist()) for reply in together}) > 1
    for prompt, reply in zip(prompts, together, strict=True):
        engines = list(map(TransformersEngine, models))
        (alone,) = by_turns(engines, (chat, chat), threshold, 16, [prompt], columns)
        assert alone.tokens.tolist() == reply.tokens.tolist()
        assert (alone.nudged.tolist(), alone.nudges, alone.finished) == (
            reply.nudged.tolist(),
            reply.nudges,
            reply.finished,
        )
        ids = chat.prompts([prompt])[0]
        assert np.allclose(reply.log_probabilities, token_logs(models[1:], ids, reply.tokens)[:, 0], atol=1e-4)
        logs = next_logs(models[1], np.append(ids, reply.tokens))[len(ids) - 1 :]
        sure = logs.max(-1) >= np.log(threshold)
        assert reply.nudged[0]
        assert sure[np.flatnonzero(~reply.nudged)].all()


def test_turns_with_another_tokenizer_go_by_text():
    chats = Chat(tokenizer_of(words=WORDS[:12])), Chat(tokenizer_of(words=WORDS[6:]))
    assert chats[0].vocabulary != chats[1].vocabulary
    found = 0
    for seed in range(12):
        generator = np.random.default_rng(seed)
        engines = [speaking(chat, SPOKEN, generator) for chat in chats]
        for prompt, reply in zip(TURNS, by_turns(engines, chats, 0.4, 40), strict=True):
            tokens, _, turns, finished = round_by_round(*engines, chats, prompt, 0.4, 40)
            assert (reply.text, reply.finished) == (chats[1].text(tokens), finished)
            assert reply.nudges == turns
            assert reply.tokens.tolist() == tokens
            found += turns > 2
    assert found > 5


def test_a_turn_keeps_the_whitespace_that_it_ends_in():
    plain, templated = Chat(tokenizer_of()), Chat(tokenizer_of(CHATML))
    roles = TextChat(tokenizer_of(), "roles")
    texts = {"good\n\n": "good\n\n", " good bad ": "good bad ", "\n\ngood": "\n\ngood", f"good{HALF}": "good", " ": ""}
    for chat, begins in ((plain, " "), (templated, ""), (roles, "")):
        for text, kept in texts.items():
            begun = kept if not kept or kept[0] == "\n" else begins + kept
            assert chat.tokenizer.decode(encode_beginning(chat, text)) == begun


def test_turns_that_say_nothing_come_to_an_end():
    """A space that begins a reply is no token of the other's, whoever wrote it."""
    chats = Chat(tokenizer_of(words=WORDS[:12])), Chat(tokenizer_of(words=WORDS[6:]))
    engines = []
    for chat in chats:
        table = np.full((len(chat.tokenizer) + 1, len(chat.tokenizer)), 1e-9)
        table[:, chat.tokenizer(" ")["input_ids"]] = 1.0
        engines.append(TabularEngine((table / table.sum(-1, keepdims=True))[None]))
    for reply in by_turns(engines, chats, 0.4, 10):
        assert (reply.text, reply.finished) == ("", False)


def test_a_string_that_ends_the_base_models_turn_is_cut_off_and_the_other_goes_on():
    tokenizer = tokenizer_of()
    small, large = Chat(tokenizer), TextChat(tokenizer, "roles")
    kind, bad, warm = (int(tokenizer(f" {word}")["input_ids"][0]) for word in ("kind", "bad", "warm"))
    turn = [int(token) for token in tokenizer("\n[User]")["input_ids"]]
    first = int(small.prompts(TURNS[:1])[0][-1])
    drafter = chain(small, [first, kind, bad, warm, small.end])
    base = chain(large, [kind, bad, *turn, warm])
    (reply,) = by_turns((drafter, base), (small, large), 0.5, 30, TURNS[:1])
    assert (reply.text, reply.finished, reply.nudges) == ("kind bad warm", True, 2)
    assert reply.nudged.tolist() == [True, False, True]


def test_turns_end_where_a_model_has_no_position_left():
    chat = Chat(tokenizer_of())
    size = len(chat.tokenizer)
    chat.stop = []
    longest = max(len(row) for row in chat.prompts(TURNS))
    for places in ((longest + 4, 128), (128, longest + 4)):
        models = [tiny(kind, 3, places=n, size=size) for kind, n in zip(("gpt2", "llama"), places, strict=True)]
        found = by_turns(list(map(TransformersEngine, models)), (chat, chat), 0.01, 40)
        for row, reply in zip(chat.prompts(TURNS), found, strict=True):
            assert (len(reply.tokens), reply.finished) == (longest + 4 - len(row) + 1, False)


# -- nudging from the configuration ------------------------------------------------------------------------------------


def decoding(pairs_folder, folder, *more: str) -> list[str]:
    return [
        "decoder=nudging",
        "decoder.max_new_tokens=10",
        "dataset=local",
        f"dataset.path={pairs_folder}",
        "dataset.sizes={weak_train: 8, transfer: 8, test: 6}",
        *(f"{role}=hf" for role in ("weak", "strong")),
        *(f"{role}.name={folder / role}" for role in ("weak", "strong")),
        f"weak.before_alignment={folder / 'weak'}",
        *(f"{role}.{key}" for role in ("weak", "strong") for key in ("train=full", "max_length=96")),
        "method.judge.model=null",
        "method.evaluation.surprise=false",
        "trainer=cpu",
        "logger=none",
        f"out={folder}",
        *more,
    ]


@pytest.mark.parametrize("style", ["chat", "roles"])
def test_nudging_as_a_run(pairs_folder, tmp_path, style):
    save_tiny_model(tmp_path / "weak", width=16)
    save_tiny_model(tmp_path / "strong", "llama", seed=1)
    replies = {}
    for name, more in (("run", []), ("again", ["decoder.batch_size=2"])):
        typed = decoding(pairs_folder, tmp_path, "decoder.threshold=0.006", f"method.style={style}", *more)
        typed.append(f"store={tmp_path / name}-store")
        content = run_method(check(compose(*typed, name="decode")), tmp_path / name, typed).content
        rows = pq.read_table(tmp_path / name / "samples.parquet").to_pylist()
        replies[name] = {row["prompt_id"]: row for row in rows if row["system"] == "nudging"}
    assert {i: row["reply"] for i, row in replies["run"].items()} == {
        i: r["reply"] for i, r in replies["again"].items()
    }
    assert len(replies["run"]) == 6
    for row in replies["run"].values():
        assert 1 <= row["nudges"] <= row["kept"] <= row["tokens"] <= 10
    found = content["decoding"]
    assert sum(found["switch"]["fates"].values()) == 6
    assert 0 < found["switch"]["share"] <= 1
    assert found["systems"]["nudging"]["cost"]["guide"] > 0
    for example in found["examples"]:
        (reply,) = [r for r in example["replies"] if r["system"] == "nudging"]
        assert reply["reply"].startswith(reply["draft"])


EARLIER = ["decoder=wsd", "decoder.rule=top1", "decoder.window=1", "decoder.check=null", "decoder.draft=null"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([*EARLIER, "decoder.window=6"], "decoder.window: read only by rule=geometric_mean; set it to 1"),
        ([*EARLIER, "decoder.check=16"], "decoder.check: read only by rule=geometric_mean; set it to null"),
        ([*EARLIER, "decoder.draft=8"], "decoder.draft: read only by rule=geometric_mean; set it to null"),
        ([*EARLIER, "decoder.rule=geometric_mean"], r"decoder.check: .*integer \(got None\)"),
        (["decoder=wsd", "decoder.rule=top1"], "decoder.window: .* as decoder=nudging has it"),
        (["decoder=wsd", "decoder.rule=top_1"], "decoder.rule"),
        (["+decoder.window=6"], "decoder.window: no such key"),
    ],
)
def test_options_of_the_other_rule_are_refused(pairs_folder, tmp_path, typed, said):
    with pytest.raises(ConfigError, match=said):
        check(compose(*decoding(pairs_folder, tmp_path, *typed), name="decode"))


def test_nudging_of_earlier_versions_is_the_same_in_the_store():
    """Its options as files of conf/decoder, reports and keys had them."""
    shared = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 256}
    earlier = {"kind": "wsd", "rule": "top1", "threshold": 0.4, "window": 1, "check": None, "draft": None, **shared}
    decoder = TypeAdapter(AnyDecoder).validate_python({**earlier, "batch_size": 16})
    assert decoder == TypeAdapter(AnyDecoder).validate_python({"kind": "nudging"})
    assert (decoder.key(), decoder.stage) == (earlier, "wsd")
    assert (decoder.kind, decoder.setting()) == ("nudging", "gamma 0.4")
    assert decoder_in(earlier).words == "nudging"


# -- prompts as text --------------------------------------------------------------------------------------------------


def text_of(chat: Chat, prompt: str) -> str:
    return chat.tokenizer.decode(chat.prompts([of(prompt)])[0].tolist())


def test_roles_as_text():
    chat = TextChat(tokenizer_of(bos="<|begin_of_text|>"), "roles")
    wanted = "[User]\nHi\n\n[Assistant]\nHello\n\n[User]\nwarm or cold?\n\n[Assistant]\n"
    assert text_of(chat, PROMPT) == wanted
    system = "\n\nSystem: Be brief.\n\nHuman: {a} or {b}?\n\nAssistant:"  # braces are text
    assert text_of(chat, system) == "[System]\nBe brief.\n\n[User]\n{a} or {b}?\n\n[Assistant]\n"


def test_instructions_and_examples_as_text():
    found = text_of(TextChat(tokenizer_of(), "urial"), PROMPT)
    assert found.startswith("Below are questions of people")
    assert found.endswith(
        "\n\n# Query:\n```\nHi\n```\n\n# Answer:\n```\nHello\n```"
        "\n\n# Query:\n```\nwarm or cold?\n```\n\n# Answer:\n```\n"
    )
    for question, answer in EXAMPLES:
        assert f"# Query:\n```\n{question}\n```\n\n# Answer:\n```\n{answer}\n```\n" in found
    assert found.count("# Query:") == found.count("# Answer:") == len(EXAMPLES) + 2


@pytest.mark.parametrize("style", ["roles", "urial"])
def test_text_has_one_beginning_where_the_model_has_one(style):
    bos = "<|begin_of_text|>"
    chat = TextChat(tokenizer_of(bos=bos, adds_bos=True), style)
    ids = chat.prompts([of(PROMPT), of("Hi")])
    for row in ids:
        assert (row == chat.tokenizer.bos_token_id).tolist() == [True] + [False] * (len(row) - 1)
    plain = TextChat(tokenizer_of(bos=bos), style)
    for row, other in zip(plain.prompts([of(PROMPT), of("Hi")]), ids, strict=True):
        assert row.tolist() == other[1:].tolist()
    reply = chat.replies(["warm\n"])[0]
    assert chat.text(reply) == "warm"
    assert chat.tokenizer.bos_token_id not in reply
    assert chat.end == chat.tokenizer.convert_tokens_to_ids(END)


def test_styles_do_not_share_what_was_written_under_another():
    styles = {TextChat(tokenizer_of(), style).fingerprint for style in ("roles", "urial")}
    assert len(styles | {Chat(tokenizer_of()).fingerprint}) == 3
