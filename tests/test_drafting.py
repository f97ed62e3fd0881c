"""Weak-to-strong decoding: against the rule on whole drafts, tables worked out by hand, and models read anew."""

import itertools

import numpy as np
import pytest
import torch
from test_dialogue import END, PROMPT, tokenizer_of
from test_search import Ids, next_logs, prompts_of, tiny, token_logs

from w2sg.data.dialogue import EXAMPLES, Chat, TextChat
from w2sg.decoding.by_transformers import TransformersEngine
from w2sg.decoding.contrastive import decode, stream
from w2sg.decoding.drafting import SCAN, Draft, Drafting, Rule, switch_after
from w2sg.decoding.engine import TabularEngine
from w2sg.decoding.scores import Settings

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


def drafted(engines, chats, rule, prompts, columns=(SAMPLED, SAMPLED), identities=None) -> list[Draft]:
    return Drafting(*engines, chats, columns, rule, identities or prompts, seed=9).write(prompts)


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
    prompts = [f"\n\nHuman: {word}?\n\nAssistant:" for word in ("good", "bad", "warm", "cold", "rude", "kind")]
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
        draft = write(engine, ids, prompt, "draft", 0, rule.draft, small.stop)[0]
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
    prompt = "\n\nHuman: Hi\n\nAssistant:"
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
    prompts = ["\n\nHuman: Hi\n\nAssistant:"]
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


# -- prompts as text --------------------------------------------------------------------------------------------------


def text_of(chat: Chat, prompt: str) -> str:
    return chat.tokenizer.decode(chat.prompts([prompt])[0].tolist())


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
    ids = chat.prompts([PROMPT, "Hi"])
    for row in ids:
        assert (row == chat.tokenizer.bos_token_id).tolist() == [True] + [False] * (len(row) - 1)
    plain = TextChat(tokenizer_of(bos=bos), style)
    for row, other in zip(plain.prompts([PROMPT, "Hi"]), ids, strict=True):
        assert row.tolist() == other[1:].tolist()
    reply = chat.replies(["warm\n"])[0]
    assert chat.text(reply) == "warm"
    assert chat.tokenizer.bos_token_id not in reply
    assert chat.end == chat.tokenizer.convert_tokens_to_ids(END)


def test_styles_do_not_share_what_was_written_under_another():
    styles = {TextChat(tokenizer_of(), style).fingerprint for style in ("roles", "urial")}
    assert len(styles | {Chat(tokenizer_of()).fingerprint}) == 3
