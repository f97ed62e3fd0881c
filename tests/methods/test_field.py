"""Chains, ensembles and filters: their rules worked out by hand, and each method on tiny models."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import compose, save_tiny_model
from runs import QUICK, label_arguments, run_typed

from w2sg.config.check import check
from w2sg.data.labels import Labels
from w2sg.data.table import Table
from w2sg.errors import ConfigError
from w2sg.methods.filtered import best, relabelled
from w2sg.methods.votes import boosted, combine, member_rows, weighted_rows
from w2sg.models.policy import load_policy
from w2sg.models.quantise import rounded_to
from w2sg.models.source import find

IDS = [f"id{k:03d}" for k in range(200)]


# -- committees -------------------------------------------------------------------------------------------------------


def test_committees_combine_as_written_down():
    p = [torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.3, 0.7], [0.2, 0.8]]), torch.tensor([[0.6, 0.4]] * 2)]
    members = [x.log() + 3 for x in p]  # logits need not be normalised
    mean = combine(members, "mean").softmax(-1)
    assert torch.allclose(mean, torch.stack(p).mean(0), atol=1e-6)
    product = combine(members, "logits").softmax(-1)
    expected = torch.stack(p).prod(0) ** (1 / 3)
    assert torch.allclose(product, expected / expected.sum(-1, keepdim=True), atol=1e-6)
    votes = combine(members, "vote").softmax(-1)
    assert torch.allclose(votes, torch.tensor([[2.5, 1.5], [1.5, 2.5]]) / 4, atol=1e-6)
    weighted = combine(members, "boost", [0.2, 1.0, 0.5])
    assert torch.allclose(weighted, torch.tensor([[0.7, 1.0], [0.5, 1.2]]), atol=1e-6)
    three = [torch.eye(3)[[k]] for k in (0, 0, 2)]
    assert torch.allclose(combine(three, "boost", [1.0, 1.0, 1.0]), torch.tensor([[1.0, 0.0, 0.5]]))
    certain = [torch.tensor([[0.0, -torch.inf]])] * 2
    assert all(torch.isfinite(combine(certain, how, [1, 1])).all() for how in ("vote", "boost"))


def test_rows_of_members_hang_on_ids_and_not_on_their_order():
    mixed = [IDS[k] for k in np.random.default_rng(0).permutation(200)]
    for how, part in (("bootstrap", 1.0), ("subset", 0.3)):
        one, other = member_rows(IDS, 2, how, part, 5), member_rows(mixed, 2, how, part, 5)
        assert sorted(IDS[k] for k in one) == sorted(mixed[k] for k in other)
        assert not np.array_equal(one, member_rows(IDS, 3, how, part, 5))
        assert not np.array_equal(one, member_rows(IDS, 2, how, part, 6))
    assert len(member_rows(IDS, 0, "bootstrap", 1.0, 0)) == 200
    assert 0.5 < len(set(member_rows(IDS, 0, "bootstrap", 1.0, 0).tolist())) / 200 < 0.75  # 1 - 1/e
    assert len(set(member_rows(IDS, 0, "subset", 0.3, 0).tolist())) == 60
    assert member_rows(IDS, 0, "none", 1.0, 0) is None


def test_a_round_of_boosting():
    right = np.array([True, True, True, False])
    weight, after = boosted(np.full(4, 0.25), right, 2)
    assert weight == pytest.approx(np.log(3))
    assert after == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])  # what it got wrong weighs half afterwards
    weight, after = boosted(np.full(4, 0.25), ~right, 3)
    assert weight == 0  # worse than chance, 2/3 wrong
    assert after == pytest.approx(np.full(4, 0.25))
    assert boosted(np.full(4, 0.25), np.ones(4, bool), 2)[0] == pytest.approx(np.log(7))  # half a row wrong
    assert boosted(np.full(4, 0.25), np.zeros(4, bool), 2)[0] == 0
    weights = np.where(np.arange(200) < 20, 0.9 / 20, 0.1 / 180)
    share = np.mean(weighted_rows(IDS, weights, 0, 0) < 20)
    assert abs(share - 0.9) < 4 * np.sqrt(0.09 / 200)


# -- filters ----------------------------------------------------------------------------------------------------------


def test_the_best_part_is_the_same_of_each_label_if_asked_for():
    scores, labels = np.array([0.9, 0.8, 0.7, 0.95, 0.99, 0.6]), np.array([0, 0, 0, 1, 1, 0])
    assert best(scores, labels, list("abcdef"), 0.5, False).tolist() == [0, 3, 4]
    assert best(scores, labels, list("abcdef"), 0.5, True).tolist() == [0, 1, 4]
    assert best(np.ones(4), np.zeros(4), list("dcba"), 0.5, False).tolist() == [2, 3]  # ties by id
    assert len(best(scores, labels, list("abcdef"), 0.01, True)) == 2  # no label is lost


def test_dropped_rows_get_the_labels_of_the_student():
    zeros = np.zeros(len(IDS), np.int64)
    table = Table("transfer", "pairs", 2, IDS, IDS, [(i, i) for i in IDS], zeros, zeros)
    weak = Labels(table, torch.randn(len(table), 2, generator=torch.Generator().manual_seed(0)), {"weak": 1})
    student = Labels(table, torch.randn(len(table), 2, generator=torch.Generator().manual_seed(1)), {"student": 1})
    kept = np.arange(0, len(table), 2)
    labels, rows = relabelled(weak, student, kept, 0.5)
    assert torch.equal(labels.logits[kept], weak.logits[kept])
    assert torch.equal(labels.logits[1::2], student.logits[1::2])
    taken = np.setdiff1d(rows, kept)
    assert len(taken) == round(0.5 * (len(table) - len(kept)))
    sure = student.logits.softmax(-1).amax(-1).numpy()
    assert sure[taken].min() >= np.delete(sure, rows).max()


# -- whole runs -------------------------------------------------------------------------------------------------------


arguments = partial(label_arguments, **QUICK)


def run(pairs_folder, model, out, *more):
    return run_typed(arguments(pairs_folder, model, out, *more), out / "-".join(more)[:60], [])


METHODS = {
    "chain": (["method=chain", "method.links=[{keep_layers: 1}]"], {"link1", "direct"}, {"chained", "link1"}),
    "bagging": (["method=ensemble", "method.members=3"], {"ensemble", "direct"}, {"taught-by-all", "member2"}),
    "boosting": (
        ["method=ensemble", "method.members=3", "method.combine=boost", "method.resample=none"],
        {"ensemble", "direct"},
        {"taught-by-all", "member2"},
    ),
    "filter": (["method=filter"], {"direct", "random_rows"}, {"kept-rows", "random-rows"}),
    "two_stage": (
        ["method=two_stage", "method.recycled=0.8"],
        {"direct", "random_rows", "kept_rows"},
        {"recycled"},  # the student of the kept rows is that of the filter
    ),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory, pairs_folder, tiny_gpt2):
    """A folder in which method=finetune was run."""
    out = tmp_path_factory.mktemp("field")
    return out, run(pairs_folder, tiny_gpt2, out, "method=finetune")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_method_trains_what_it_says_and_shares_the_rest(name, store, pairs_folder, tiny_gpt2):
    out, plain = store
    typed, systems, fits = METHODS[name]
    content = run(pairs_folder, tiny_gpt2, out, *typed)
    assert set(content["metrics"]) >= {"weak", "student", "ceiling"} | systems
    assert content["metrics"]["direct"] == plain["metrics"]["student"]  # the student of method=finetune itself
    made = {stage["name"] for stage in content["stages"] if not stage["cached"]}
    cached = {stage["name"] for stage in content["stages"] if stage["cached"]}
    assert fits <= made
    assert {"weak", "student", "ceiling"} <= cached
    assert "pgr" in content
    again = run(pairs_folder, tiny_gpt2, out, *typed)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["metrics"] == content["metrics"]
    if name in ("filter", "two_stage"):
        facts = content["training"]["filter"]
        assert facts["kept"] == pytest.approx(facts["rows"] / 2, abs=1)
    if name == "boosting":
        assert len(content["training"]["weights_of_members"]) == 3


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["weak.round_weights=4"], "weak.round_weights: there are no pretrained weights"),
        (["strong.round_weights=1"], "strong.round_weights"),
        (["method=filter", "strong.micro_batch_size=9999"], "strong.micro_batch_size: 9999 is more than the batch"),
        (["method=chain"], "method.links: a chain needs"),
        (["method=chain", "method.links=[{keep_layers: 0}]"], r"method.links\[0\].keep_layers"),
        (["method=chain", "method.links=[{depth: 3}]"], r"method.links\[0\].depth"),
        (["method=ensemble", "method.members=1"], "method.members"),
        (["method=ensemble", "method.combine=boost"], "method.resample: boosting"),
        (["method=ensemble", "method.part=0.5"], "method.part: read only"),
        (["method=filter", "method.keep=1.0"], "method.keep"),
        (["method=filter", "method.recycled=0.5"], "method.recycled: read only"),
        (["method=filter", "method.score=zero_shot", "dataset.zero_shot=null"], "method.score: zero_shot asks"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(typed, said):
    with pytest.raises(ConfigError, match=said):
        check(compose(*typed))


def test_a_subset_is_another_stage_and_its_order_none(store, pairs_folder, tiny_gpt2, tmp_path):
    from w2sg.experiment.run import Run

    run_ = Run(check(compose(*arguments(pairs_folder, tiny_gpt2, tmp_path))), tmp_path / "run")
    table, gold = run_.data.ground_truth, run_.gold(run_.data.ground_truth)
    whole = run_.fit("weak", run_.weak, table, gold)
    half = run_.fit("weak", run_.weak, table, gold, rows=np.arange(0, len(table), 2))
    paired = run_.fit("other", run_.weak, table, gold, rows=np.arange(0, len(table), 2), like="weak")
    assert len({whole.folder, half.folder, paired.folder}) == 3
    curves = [json.loads((model.folder / "curve.json").read_text()) for model in (half, paired)]
    assert curves[0] == curves[1]  # seeded alike


def test_a_mixture_that_is_paired_has_the_same_experts(store, pairs_folder, tiny_gpt2, tmp_path):
    from w2sg.experiment.run import Run

    heads = ["strong.tune=head", "strong.head=mixture", "strong.experts=2"]
    typed = arguments(pairs_folder, tiny_gpt2, tmp_path, *heads)
    run_ = Run(check(compose(*typed)), tmp_path / "run")
    table = run_.data.transfer
    labels = run_.predict(run_.fit("weak", run_.weak, run_.data.ground_truth, run_.gold(run_.data.ground_truth)), table)
    direct = run_.fit("student", run_.strong, table, labels, loss=run_.loss)
    paired = run_.fit("chained", run_.strong, table, labels, loss=run_.loss, like="student")
    first, second = (run_.predict(model, run_.data.test).logits for model in (direct, paired))
    assert direct.folder != paired.folder
    assert np.array_equal(first.numpy(), second.numpy())


# -- one model, weaker ------------------------------------------------------------------------------------------------


def test_rounded_weights_are_multiples_of_a_step_of_their_output():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        for dim in (0, 1):
            found = rounded_to(weight, bits, dim)
            step = weight.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
            assert torch.allclose((found / step).round(), found / step, atol=1e-4)
            assert ((found - weight).abs() <= step / 2 + 1e-6).all()
            assert torch.allclose(found.abs().amax(dim), weight.abs().amax(dim))
    assert torch.equal(rounded_to(torch.zeros(3, 3), 4, 1), torch.zeros(3, 3))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_rounded_model_is_another_and_its_output_layer_is_not_rounded(kind, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    specs = [
        check(compose("strong=hf", f"strong.name={folder}", f"strong.round_weights={b}")).strong for b in ("null", 4)
    ]
    plain, rounded = (find(spec, "strong") for spec in specs)
    assert plain.identity != rounded.identity
    one, other = (load_policy(source, trainable=False).plain for source in (plain, rounded))
    changed = {name for name, w in one.state_dict().items() if not torch.equal(w, other.state_dict()[name])}
    assert len(changed) == {"gpt2": 4, "llama": 7}[kind] * 2  # the linear layers of two blocks
    assert not any("emb" in name or "lm_head" in name or "wte" in name for name in changed)
    trained = tmp_path / "trained"
    load_policy(rounded).save(trained)
    again = load_policy(rounded, trained, trainable=False).plain  # what was trained is not rounded once more
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in other.state_dict().items())
