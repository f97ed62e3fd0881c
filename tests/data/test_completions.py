"""Prompts with replies as rows: which state predicts which token, what sees what, and what encoding drops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from data_rows import mask_of
from torch import nn
from transformers import PretrainedConfig

from w2sg.data.completions import Completions, _bins, encode_rows, per_reply
from w2sg.models.packing import keeps_replies_apart
from w2sg.models.policy import Policy

KINDS = ["gpt2", "llama", "neox"]
END = 9


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def draw(count: int, replies: int, seed: int = 0, longest: int = 12) -> Completions:
    """Random prompts and replies of different lengths, replies of one token among them."""
    generator = np.random.default_rng(seed)
    tokens = lambda: generator.integers(0, 280, generator.integers(1, longest))  # noqa: E731
    prompts = [tokens() for _ in range(count)]
    rows = [tuple(tokens() for _ in range(replies)) for _ in range(count)]
    rows[0] = tuple(reply[:1] for reply in rows[0])
    return Completions(prompts, rows)


def unpacked(rows: Completions) -> Completions:
    return Completions(rows.prompts, rows.replies, rows.columns, packed=False)


@pytest.fixture(scope="module", params=KINDS)
def policy(request, tmp_path_factory) -> Policy:
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("completions") / request.param, request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return Policy(model).eval()


# -- rows -------------------------------------------------------------------------------------------------------------


def test_one_row_holds_a_prompt_and_both_replies():
    """Check 16, in which our rows lack the last token of each reply: places 4 and 7 of its row."""
    rows = Completions([ids(10, 11, 12)], [(ids(20, 21), ids(30, 31, 32))])
    batch = rows.collate([0])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 30, 31]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4]]
    assert mask_of(batch["part"], batch["example"])[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert batch["source"].tolist() == [2, 3, 2, 4, 5]  # the first rejected token comes from the end of the prompt
    assert batch["targets"].tolist() == [20, 21, 30, 31, 32]
    assert batch["owner"].tolist() == [0, 0, 1, 1, 1]
    assert batch["sizes"].tolist() == [[2, 3]]
    assert rows.lengths.tolist() == rows.useful.tolist() == [6]


def test_several_examples_share_a_row_and_never_see_each_other():
    """Check 17, with one long example more, so that its three segments fit into one row."""
    prompts = [ids(1, 2), ids(3), ids(4, 5), np.arange(20, 30)]
    replies = [(ids(6, 7),), (ids(8, 9),), (ids(10, 11, 12),), (ids(13, 14),)]
    batch = Completions(prompts, replies).collate([0, 1, 2, 3])
    assert batch["input_ids"].tolist() == [[*range(20, 30), 13], [4, 5, 10, 11, 1, 2, 6, 3, 8, 0, 0]]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0]
    assert batch["sizes"].flatten().tolist() == [2, 2, 3, 2]
    assert torch.bincount(batch["owner"]).tolist() == [2, 2, 3, 2]
    assert (batch["source"] - 11).tolist() == [5, 6, 7, 8, 1, 2, 3, -2, -1]
    assert batch["targets"].tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14]
    example, mask = batch["example"], mask_of(batch["part"], batch["example"])
    other = example[:, :, None] != example[:, None, :]
    assert other.any()
    assert not mask[other].any()
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()  # no query without a key, not even in the filling


@pytest.mark.parametrize("packed", [True, False])
def test_every_source_reads_what_stands_before_its_target(packed):
    rows = draw(9, 3)
    rows = rows if packed else unpacked(rows)
    index = [4, 0, 8, 2, 5]
    batch = rows.collate(index)
    width = batch["input_ids"].shape[1]
    mask = torch.ones(width, width, dtype=torch.bool).tril().expand(len(batch["input_ids"]), -1, -1)
    if packed:
        mask = mask_of(batch["part"], batch["example"])
    at = 0
    for i in index:
        for reply in rows.replies[i]:
            for k in range(len(reply)):
                place = int(batch["source"][at])
                r, c = divmod(place, width)
                seen = batch["input_ids"][r][mask[r, c]]
                assert seen.tolist() == [*rows.prompts[i], *reply[:k]]
                assert batch["position_ids"][r][mask[r, c]].tolist() == list(range(len(rows.prompts[i]) + k))
                assert batch["targets"][at] == reply[k]
                at += 1
    assert at == len(batch["targets"]) == len(batch["owner"]) == int(batch["sizes"].sum())
    assert ("example" in batch) == packed


def test_an_end_token_in_the_prompt_or_as_filling_is_never_mistaken():
    """GPT-2's BOS, EOS and padding are one token: what is asked for goes by place, never by id."""
    rows = Completions([ids(0, 0, 5), ids(0)], [(ids(0, 7, 0), ids(0)), (ids(3, 0), ids(0, 0, 0, 0))])
    batch = rows.collate([0, 1])
    assert batch["targets"].tolist() == [0, 7, 0, 0, 3, 0, 0, 0, 0, 0]
    assert batch["sizes"].tolist() == [[3, 1], [2, 4]]


def test_bins_never_exceed_the_longest():
    generator = np.random.default_rng(0)
    for count in (1, 2, 7, 60):
        lengths = generator.integers(1, 90, count).tolist()
        rows = _bins(lengths)
        assert sorted(k for row in rows for k in row) == list(range(count))
        assert max(sum(lengths[k] for k in row) for row in rows) == max(lengths)
        loads = sorted(sum(lengths[k] for k in row) for row in rows)
        assert len(loads) < 2 or loads[0] + loads[1] > max(lengths)  # no two rows would fit into one
    assert _bins([3, 5, 2, 5]) == [[1], [3], [0, 2]]


def test_counts_of_tokens():
    rows = Completions([ids(1, 2, 3), ids(1)], [(ids(4, 5), ids(6)), (ids(7), ids(8, 9, 7, 7))])
    assert rows.sizes.tolist() == [[2, 1], [1, 4]]
    assert rows.useful.tolist() == rows.lengths.tolist() == [4, 4]
    assert unpacked(rows).useful.tolist() == [7, 5]
    assert unpacked(rows).lengths.tolist() == [8, 8]
    for case in (rows, unpacked(rows)):
        for index in ([0], [1], [0, 1]):
            assert case.collate(index)["input_ids"].numel() <= case.lengths[index].max() * len(index)
        assert case.useful[0] <= case.lengths[0]
    batch = unpacked(rows).collate([0, 1])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 3, 0], [1, 0, 0, 0], [1, 8, 9, 7]]
    assert batch["source"].tolist() == [2, 3, 6, 8, 12, 13, 14, 15]


def test_columns_stay_with_their_tokens():
    rows = draw(6, 2)
    columns = [np.concatenate(replies)[:, None] * np.array([[1.0, 10.0]]) for replies in rows.replies]
    rows = Completions(rows.prompts, rows.replies, columns)
    for case in (rows, unpacked(rows), rows.take(np.array([3, 3, 0, 5, 1]))):
        batch = case.collate([4, 1, 0])
        assert batch["columns"].dtype == torch.float32
        assert batch["columns"][:, 0].tolist() == batch["targets"].tolist()
        assert batch["columns"][:, 1].tolist() == (10 * batch["targets"]).tolist()
    assert "columns" not in rows.take(np.array([0])).__class__(rows.prompts, rows.replies).collate([0])


def test_take_is_in_the_order_asked_for():
    rows = unpacked(draw(5, 2))
    taken = rows.take(np.array([4, 0]))
    assert [p.tolist() for p in taken.prompts] == [rows.prompts[4].tolist(), rows.prompts[0].tolist()]
    assert taken.replies[0] is rows.replies[4]
    assert not taken.packed
    assert taken.content != rows.content
    assert rows.take(np.arange(5)).content == rows.content


def test_the_content_tells_where_replies_begin():
    contents = {
        Completions([ids(1, 2)], [(ids(3, 4),)]).content,
        Completions([ids(1, 2, 3)], [(ids(4),)]).content,
        Completions([ids(1, 2)], [(ids(3), ids(4))]).content,
        Completions([ids(1, 2)], [(ids(3, 5),)]).content,
    }
    assert len(contents) == 4
    rows = draw(4, 2)
    assert rows.content == unpacked(rows).content


def test_sums_over_replies():
    sizes = torch.tensor([[2, 1], [1, 3]])
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    assert per_reply(torch.arange(7.0), owner, sizes).tolist() == [[1, 2], [3, 15]]


# -- log-probabilities ------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A model that has the given logits at the places of a batch."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        rows, length, vocabulary = logits.shape
        self.config = PretrainedConfig()
        self.output = nn.Linear(rows * length, vocabulary, bias=False)
        self.output.weight.data = logits.reshape(-1, vocabulary).T.clone()
        self.places = torch.eye(rows * length).view(rows, length, -1)

    def base_model(self, input_ids, **_):
        assert input_ids.shape == self.places.shape[:2]
        return SimpleNamespace(last_hidden_state=self.places)

    def get_output_embeddings(self):
        return self.output


LOGITS = [  # check 11, without the logits that predict nothing
    [
        [1.28580653, 0.10454046, 0.99143264, -1.20371292, -1.16715007, -1.05377471, 0.90980977],
        [-2.59147091, -1.7174445, 0.00786477, 0.21010461, -0.4693648, -0.85640252, -0.21717716],
        [-0.65662639, -2.40492289, -0.50309332, 0.08063683, 2.07641116, 0.60279961, -0.17953445],
        [-0.67789506, 0.03123927, -0.76879112, 0.67743036, -0.73967143, 0.57134682, 0.178214],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ],
    [
        [0.04292019, -1.0723813, 0.44590385, -1.00250147, 0.51286443, -1.84411444, 0.34599378],
        [1.60433345, -0.23952973, -0.42983752, 0.62535149, -0.79119535, 1.23766242, 2.57554648],
        [0.39177332, 0.75184823, -0.40647439, 1.1759195, -0.83247895, 0.39866133, -0.15815965],
        [-0.04953445, -0.63121035, 1.56106421, -1.11843891, -1.81098435, 0.68928506, -0.0903735],
        [0.77673913, -0.04489551, -0.92146909, 1.0709741, 0.63678951, 0.82946708, 0.2955959],
    ],
]
PER_TOKEN = [-1.2603036058713, -1.9572288082588916, -1.972239272617911]
PER_TOKEN += [-1.4345585905093197, -3.6614479493700487, -2.488957657538268, -2.3158363488051954, -1.8458686456948037]


def test_log_probabilities_of_given_logits():
    rows = Completions([ids(1, 1), ids(1)], [(ids(3, 5, 1),), (ids(2, 2, 6, 0, 4),)], packed=False)
    batch = rows.collate([0, 1])
    found = Policy(Given(torch.tensor(LOGITS)))(batch)
    assert found.tolist() == pytest.approx(PER_TOKEN, abs=1e-6)
    sums = per_reply(found, batch["owner"], batch["sizes"])
    assert sums.flatten().tolist() == pytest.approx([-5.189771686748102, -11.746669191917636], abs=1e-5)


def test_log_probabilities_are_those_of_the_whole_model(policy):
    rows = draw(5, 2)
    with torch.no_grad():
        found = policy(rows.collate(range(5))).split(rows.sizes.flatten().tolist())
        for k, (prompt, reply) in enumerate(
            (p, r) for p, rs in zip(rows.prompts, rows.replies, strict=True) for r in rs
        ):
            whole = torch.from_numpy(np.concatenate([prompt, reply]))
            logs = policy.plain(input_ids=whole[None]).logits[0].log_softmax(-1)
            wanted = logs[:-1].gather(1, whole[1:, None])[len(prompt) - 1 :, 0]
            assert torch.allclose(found[k], wanted, atol=1e-5)


def read(policy: Policy, rows: Completions, batches: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities in the order of the examples, and the gradient of their weighted sum."""
    policy.zero_grad()
    found = []
    for index in batches:
        batch = rows.collate(index)
        values = policy(batch)
        (values * torch.sin(1.0 + batch["targets"])).sum().backward()
        found.append(values.detach())
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return torch.cat(found), gradient.clone()


def test_packed_unpacked_and_alone_are_the_same(policy):
    rows = draw(8, 2, seed=3)
    everything = [list(range(8))]
    packed = rows.collate(everything[0])
    assert len(packed["input_ids"]) < 8  # several examples in a row
    assert (packed["example"] == -1).any()  # and filling
    wanted, gradient = read(policy, unpacked(rows), [[k] for k in range(8)])
    for case, batches in (
        (rows, everything),
        (unpacked(rows), everything),
        (rows, [[k] for k in range(8)]),
        (rows, [[0, 1, 2], [3, 4, 5, 6, 7]]),
    ):
        found, other = read(policy, case, batches)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert torch.allclose(other, gradient, atol=1e-4 * float(gradient.abs().max()))
    changed = unpacked(Completions(rows.prompts, [tuple(r[::-1].copy() for r in pair) for pair in rows.replies]))
    assert not torch.allclose(read(policy, changed, everything)[1], gradient, atol=1e-2 * float(gradient.abs().max()))


def test_replies_and_examples_do_not_leak(policy):
    rows = Completions([ids(1, 2, 3), ids(4, 5)], [(ids(6, 7, 8), ids(9, 10)), (ids(11), ids(12, 13))])
    with torch.no_grad():
        first = policy(rows.collate([0, 1]))
        other = Completions(rows.prompts, [(ids(50, 51, 52), ids(9, 10)), (ids(53), ids(12, 13))])
        second = policy(other.collate([0, 1]))
    unchanged = torch.tensor([3, 4, 6, 7])
    assert torch.allclose(first[unchanged], second[unchanged], atol=1e-6)
    assert not torch.isclose(first[:3], second[:3]).any()


def test_common_models_keep_replies_apart(policy):
    assert keeps_replies_apart(policy)


class Leaky(Policy):
    """Ignores the mask but for its causality, as some attention kernels do."""

    def states(self, batch):
        return super().states({k: v for k, v in batch.items() if k not in ("example", "part")})


class Refusing(Policy):
    def states(self, batch):
        if "example" in batch:
            raise ValueError("this attention takes no mask")
        return super().states(batch)


@pytest.mark.parametrize("kind", [Leaky, Refusing])
def test_a_model_that_ignores_the_mask_is_found_out(policy, kind):
    assert not keeps_replies_apart(kind(policy.model))


# -- encoding ---------------------------------------------------------------------------------------------------------


def test_only_finished_replies_get_an_end():
    found = encode_rows(["a", "b"], [ids(1), ids(2)], [(ids(3, 4),), (ids(3, 4),)], [(True,), (False,)], END, 10)
    assert [r[0].tolist() for r in found.completions.replies] == [[3, 4, END], [3, 4]]
    assert found.truncated == 0
    assert found.dropped == {}
    assert found.kept.tolist() == [0, 1]


def test_a_reply_that_is_cut_has_no_end():
    replies = [(ids(3, 4, 5),), (ids(3, 4),), (ids(3, 4, 5),), (ids(3, 4, 5, 6),)]
    finished = [(True,), (True,), (False,), (False,)]
    found = encode_rows(list("abcd"), [ids(1, 2)] * 4, replies, finished, END, 5)
    assert [r[0].tolist() for r in found.completions.replies] == [[3, 4, 5], [3, 4, END], [3, 4, 5], [3, 4, 5]]
    assert found.truncated == 2  # the first lost its end alone, the last a token
    assert (
        max(len(p) + len(r[0]) for p, r in zip(found.completions.prompts, found.completions.replies, strict=True)) == 5
    )


def test_what_cannot_be_used_is_dropped_by_id_and_counted():
    cases = {
        "fine": (ids(1), (ids(2), ids(3)), (True, True)),
        "long": (ids(1, 1, 1, 1), (ids(2), ids(3)), (True, True)),
        "longer": (ids(1, 1, 1, 1, 1, 1), (ids(2), ids(3)), (True, True)),
        "no prompt": (ids(), (ids(2), ids(3)), (True, True)),
        "no chosen": (ids(1), (ids(), ids(3)), (True, True)),
        "no rejected": (ids(1), (ids(2), ids()), (True, False)),
        "same": (ids(1), (ids(2, 3), ids(2, 3)), (True, True)),
        "one unfinished": (ids(1), (ids(2), ids(2)), (True, False)),
        "same once cut": (ids(1, 1), (ids(2, 3, 4), ids(2, 3, 5)), (True, True)),
        "same once cut, one at its end": (ids(1, 1), (ids(2, 3), ids(2, 3, 5)), (False, True)),
        "fits exactly": (ids(1, 1, 1), (ids(2, 5), ids(3)), (True, True)),
    }
    found = encode_rows(list(cases), *zip(*cases.values(), strict=True), END, 4)
    names = list(cases)
    assert [names[k] for k in found.kept] == ["fine", "one unfinished", "fits exactly"]
    assert found.dropped == {
        "prompt longer than max_length": ["long", "longer"],
        "prompt refused by the chat template": ["no prompt"],
        "empty reply": ["no chosen", "no rejected"],
        "identical replies": ["same"],
        "identical once cut to max_length": ["same once cut", "same once cut, one at its end"],
    }
    assert [[r.tolist() for r in pair] for pair in found.completions.replies] == [
        [[2, END], [3, END]],
        [[2, END], [2]],
        [[2], [3]],
    ]
    assert found.truncated == 2
    assert len(found.completions) + sum(map(len, found.dropped.values())) == len(cases)


def test_each_side_of_a_pair_is_cut_by_its_own_length():
    found = encode_rows(["a"], [ids(1, 2)], [(ids(3), ids(4, 5, 6, 7, 8))], [(True, True)], END, 6)
    assert [r.tolist() for r in found.completions.replies[0]] == [[3, END], [4, 5, 6, 7]]


def test_replies_may_end_in_different_tokens():
    pair = (ids(3), ids(4))
    found = encode_rows(["a", "b"], [ids(1)] * 2, [pair, pair], [(True, True), (True, False)], [(8, 9), (9, 8)], 6)
    assert [[r.tolist() for r in row] for row in found.completions.replies] == [[[3, 8], [4, 9]], [[3, 9], [4]]]


def test_nothing_left_is_no_error():
    found = encode_rows(["a"], [ids(1)], [(ids(),)], [(True,)], END, 4)
    assert len(found.completions) == 0
    assert found.kept.tolist() == []
