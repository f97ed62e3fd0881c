"""Replies and pairs of them: joined by prompt id, whatever their order."""

from types import SimpleNamespace

import numpy as np
import pytest

from w2sg.data.messages import Dialogue
from w2sg.data.replies import Replies, best_and_worst, gold_pairs, join_pairs, prompt_id, prompts_of
from w2sg.data.sources import pair as pair_of
from w2sg.data.table import Table


def replies_of(texts: dict[str, str] | list[tuple[str, str]], key: str = "k", **given) -> Replies:
    rows = list(texts.items()) if isinstance(texts, dict) else texts
    count = len(rows)
    return Replies(
        ids=[i for i, _ in rows],
        prompts=[f"prompt {i}" for i, _ in rows],
        texts=[text for _, text in rows],
        finished=given.pop("finished", np.ones(count, bool)),
        sample=given.pop("sample", np.arange(count)),
        group=given.pop("group", np.zeros(count, np.int64)),
        key={"from": key},
        **given,
    )


def as_rows(pairs) -> list[tuple[str, str, str]]:
    assert pairs.chosen.ids == pairs.rejected.ids
    return list(zip(pairs.chosen.ids, pairs.chosen.texts, pairs.rejected.texts, strict=True))


# check 22
CONTRASTIVE = {"p0": "A", "p1": "B", "p2": "same", "p3": "", "p4": "C"}
OWN = {"p0": "x", "p1": "y", "p2": "same", "p3": "z", "p4": ""}


def test_pairs_are_joined_by_prompt_and_drops_are_counted():
    pairs = join_pairs(replies_of(CONTRASTIVE, "cd"), replies_of(OWN, "own"))
    assert as_rows(pairs) == [("p0", "A", "x"), ("p1", "B", "y")]
    assert pairs.dropped == {"identical replies": 1, "empty chosen reply": 1, "empty rejected reply": 1}
    assert sum(pairs.dropped.values()) == 3
    assert pairs.key == {"chosen": {"from": "cd"}, "rejected": {"from": "own"}}
    assert pairs.ids == ["p0", "p1"]


def test_a_lost_reply_shifts_nothing():
    """Fault 5: after a failed prompt, a join by position pairs every later reply with another prompt's."""
    chosen = {f"p{k}": f"good {k}" for k in range(20) if k not in (3, 11)}
    rejected = {f"p{k}": f"bad {k}" for k in reversed(range(20)) if k not in (5, 7, 8)}
    pairs = join_pairs(replies_of(chosen), replies_of(rejected))
    assert len(pairs) == 15
    assert all((a, b) == (f"good {i[1:]}", f"bad {i[1:]}") for i, a, b in as_rows(pairs))
    assert all(p == f"prompt {i}" for p, i in zip(pairs.rejected.prompts, pairs.rejected.ids, strict=True))
    assert pairs.dropped == {"no rejected reply": 3, "no chosen reply": 2}


def test_blanks_count_as_empty_and_make_no_difference():
    pairs = join_pairs(replies_of({"a": " \n", "b": "same ", "c": "x"}), replies_of({"a": "x", "b": "same", "c": "\t"}))
    assert len(pairs) == 0
    assert pairs.dropped == {"empty chosen reply": 1, "identical replies": 1, "empty rejected reply": 1}


def test_nothing_to_join_is_no_pair():
    pairs = join_pairs(replies_of({"a": "x"}), replies_of({"b": "y"}))
    assert as_rows(pairs) == []
    assert pairs.dropped == {"no rejected reply": 1, "no chosen reply": 1}


@pytest.mark.parametrize("side", [0, 1])
def test_two_replies_to_a_prompt_are_refused(side):
    sides = [replies_of({"a": "x"}), replies_of({"a": "y"})]
    sides[side] = replies_of([("a", "x"), ("a", "z")])
    with pytest.raises(ValueError, match="more than one reply"):
        join_pairs(*sides)


def test_rows_keep_all_that_belongs_to_them():
    logs = [np.full((k + 1, 2), k, float) for k in range(4)]
    tokens = [np.arange(k + 1) for k in range(4)]
    whole = replies_of(
        {f"p{k}": f"text {k}" for k in range(4)},
        finished=np.array([True, False, True, False]),
        group=np.array([0, 1, 0, 1]),
        tokens=tokens,
        log_probabilities=logs,
        fingerprint="f",
    )
    for found in (whole.take([3, 1]), whole.take(np.array([3, 1]))):
        assert found.ids == ["p3", "p1"]
        assert found.prompts == ["prompt p3", "prompt p1"]
        assert found.texts == ["text 3", "text 1"]
        assert found.finished.tolist() == [False, False]
        assert found.sample.tolist() == [3, 1]
        assert found.lengths.tolist() == [4, 2]
        assert found.log_probabilities[0] is logs[3]
        assert (found.fingerprint, found.key) == ("f", {"from": "k"})
    assert whole.of_group(1).ids == ["p1", "p3"]
    assert len(whole.of_group(2)) == 0
    assert replies_of({"a": "x"}).take([0]).tokens is None
    joined = join_pairs(whole, replies_of({"p3": "other", "p0": "another"}))
    assert [len(t) for t in joined.chosen.tokens] == [1, 4]


def test_implicit_rewards_are_sums_over_tokens():
    logs = [np.array([[-1.0, -2.0], [-0.5, -0.25]]), np.array([[-3.0, -1.0]])]
    assert replies_of({"a": "x", "b": "y"}, log_probabilities=logs).implicit_rewards().tolist() == [0.75, -2.0]


def test_the_best_and_the_worst_sample_of_each_prompt():
    rows = [("b", "m"), ("a", "x"), ("a", "y"), ("b", "n"), ("a", "z"), ("a", " "), ("c", "s"), ("c", "s")]
    rows += [("d", "t"), ("d", "u"), ("e", ""), ("e", " "), ("f", "lone"), ("f", "")]
    rewards = np.array([5, 1, 3, 7, -2, 99, 1, 2, 4, 4, 1, 2, 3, 9], float)
    pairs = best_and_worst(replies_of(rows), rewards, {"rewards": "r"})
    assert as_rows(pairs) == [("b", "n", "m"), ("a", "y", "z")]
    assert pairs.chosen.sample.tolist() == [3, 2]
    assert pairs.dropped == {"identical samples": 2, "equal rewards": 1, "empty samples": 1}
    assert pairs.key == {"rewards": "r"}
    assert len(set(i for i, _ in rows)) == len(pairs) + sum(pairs.dropped.values())
    assert as_rows(best_and_worst(replies_of(rows[:3]), rewards[:3], {})) == [("a", "y", "x")]
    assert len(best_and_worst(replies_of({"a": "x"}), np.ones(1), {})) == 0


def table_of(rows: list[tuple[str, str, str]], first: list[int]) -> Table:
    """A table of pairs as sources and splits make it, with the coin flips given."""
    found = [pair_of(Dialogue.of_text(prompt), prompt + chosen, prompt + rejected) for prompt, chosen, rejected in rows]
    first = np.array(first)
    preferred = np.array([example.answer for example in found])
    return Table(
        "test",
        "pairs",
        2,
        [f"pair {k}" for k in range(len(found))],
        [example.prompt for example in found],
        [example.texts for example in found],
        first,
        np.where(preferred == first, 0, 1),
    )


def test_the_preferred_reply_is_chosen_whatever_the_coin_says():
    prompt = "\n\nHuman: {}?\n\nAssistant:"
    rows = [(prompt.format(k), f" yes {k}", f" no {k}") for k in range(3)]
    rows += [(prompt.format(k), f" a{k}", f" b{k}") for k in range(3, 6)]
    for first in ([0] * 6, [1] * 6, [0, 1, 1, 0, 1, 0]):
        pairs = gold_pairs(table_of(rows, first))
        assert pairs.chosen.texts == [chosen.strip() for _, chosen, _ in rows]
        assert pairs.rejected.texts == [rejected.strip() for *_, rejected in rows]
        asked = [Dialogue.of_text(p) for p, *_ in rows]
        assert pairs.chosen.prompts == asked
        assert pairs.chosen.ids == pairs.rejected.ids == [prompt_id(p) for p in asked]
        assert pairs.ids == [f"pair {k}" for k in range(6)]
        assert pairs.chosen.finished.all()
    flipped = table_of(rows, [0] * 6)
    other = Table(**{**vars(flipped), "labels": 1 - flipped.labels})
    assert gold_pairs(other).chosen.texts == [rejected.strip() for *_, rejected in rows]
    assert gold_pairs(other).key != gold_pairs(flipped).key


def test_gold_pairs_without_a_prompt_keep_their_texts():
    pairs = gold_pairs(table_of([("", "good text", "bad text")], [1]))
    assert (pairs.chosen.texts, pairs.rejected.texts) == (["good text"], ["bad text"])


def test_prompts_come_once_and_in_order():
    rows = [("q one", " a", " b"), ("q two", " a", " b"), ("q one", " c", " d")]
    prompts = prompts_of(table_of(rows, [0, 0, 0]))
    asked = [Dialogue.of_text("q one"), Dialogue.of_text("q two")]
    assert prompts.texts == asked
    assert prompts.ids == [prompt_id(p) for p in asked]
    assert len(prompts.first(1)) == 1
    assert len(prompts.first(None)) == 2
    assert prompts.content_hash() != prompts.first(1).content_hash()


def test_ids_travel_between_equal_tokenizers_only():
    asked = []

    def chat(fingerprint):
        again = lambda texts, finished=None: asked.append(list(texts)) or [np.array([77])] * len(texts)  # noqa: E731
        return SimpleNamespace(fingerprint=fingerprint, stop=[0, 5], replies=again)

    tokens = [np.array([1, 2, 0]), np.array([1, 5, 3]), np.array([0]), np.array([], np.int64)]
    written = replies_of({f"p{k}": f"t{k}" for k in range(4)}, tokens=tokens, fingerprint="f")
    # the token that ended a reply is not part of it; one in its middle is
    assert [row.tolist() for row in written.encode(chat("f"))] == [[1, 2], [1, 5, 3], [], []]
    assert asked == []
    assert [row.tolist() for row in written.encode(chat("g"))] == [[77]] * 4
    assert asked == [["t0", "t1", "t2", "t3"]]
    # each keeps the end that was written
    for one, ends in (("f", [0, 7, 0, 7]), ("g", [7] * 4)):
        assert written.ends(SimpleNamespace(fingerprint=one, stop=[0, 5, 7], end=7)) == ends
    came_as_text = replies_of({"a": "x"}, fingerprint=None)
    assert [row.tolist() for row in came_as_text.encode(chat("f"))] == [[77]]
