"""Decoders as a whole on tiny models: what each writes and costs, sharing, devices, refusals, the page over many."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import compose, run_script, save_tiny_model, stand_in_for_vllm, start_ranks
from pydantic import TypeAdapter
from runs import KINDS, assert_planned, decode_arguments, planned, run_all_decoders
from runs import replies_of as said
from runs import run_decoder as run

from w2sg import console
from w2sg.cli.export import print_export
from w2sg.compare.collect import collect
from w2sg.config.check import check
from w2sg.data.replies import Prompts
from w2sg.data.thoughts import Said
from w2sg.decoding.decoders import AnyDecoder, Plain
from w2sg.decoding.decoders.best_of_n import BestOfN
from w2sg.decoding.decoders.written import Written, pack, pack_text, unpack, unpack_text
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import ConfigError, UserError
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.experiment.run import Run
from w2sg.experiment.steered import steered
from w2sg.judges.reward import RewardJudge, RewardModel
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.models.export import export_model
from w2sg.models.finished import find_finished
from w2sg.models.student import load_student

BARE = ["method.judge.model=null", "method.evaluation.surprise=false"]  # what is written, and no more


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return decode_arguments(pairs_folder, models)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, arguments):
    return run_all_decoders(arguments, tmp_path_factory.mktemp("decode-runs"))


@pytest.mark.slow
def test_a_plan_has_the_stages_of_each_decoder(runs, arguments, tmp_path):
    for kind, content in runs[1].items():
        assert_planned(planned(arguments(tmp_path, kind), "decode"), content)


@pytest.fixture(scope="module")
def padded(models, tmp_path_factory) -> dict[str, Path]:
    """The models with rows that no token has, each with its own number of them, which they like best."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("padded-models")
    for k, (role, path) in enumerate(models.items()):
        model = AutoModelForCausalLM.from_pretrained(path)
        tokens = model.config.vocab_size
        model.resize_token_embeddings(tokens + 30 + 10 * k, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[:tokens] *= 0.5
            model.get_output_embeddings().weight[tokens:] *= 40
        model.save_pretrained(folder / role)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder / role)
    return {role: folder / role for role in models}


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("search", ["strong"]),
        ("contrastive", ["weak", "untuned"]),
        ("nudging", ["weak", "strong"]),
    ],
)
def test_ids_past_the_tokenizer_are_never_written(arguments, padded, tmp_path, kind, roles):
    """The model that reads them has no row for them, and no text stands behind them."""
    names = {"weak": "weak.name", "untuned": "weak.before_alignment", "strong": "strong.name"}
    swapped = [f"{names[role]}={padded[role]}" for role in roles]
    run(arguments, tmp_path, kind, *swapped, "decoder.temperature=1.0", *BARE)
    assert sum(len(reply) > 0 for reply in said(tmp_path, kind, kind).values()) >= 6
    assert any("unwritable" in file.read_text() for file in (tmp_path / "store").glob("*/key.json"))


def test_models_without_such_ids_keep_their_keys(runs):
    out, _ = runs
    files = list((out / "store").glob("*/key.json"))
    assert any('"stop"' in file.read_text() for file in files)
    assert not any("unwritable" in file.read_text() for file in files)


def test_batch_size_is_of_plain_samples_too(arguments, runs, tmp_path, monkeypatch):
    rows, start, (out, _) = [], TransformersEngine.start, runs
    monkeypatch.setattr(TransformersEngine, "start", lambda self, p: (rows.append(len(p)), start(self, p))[1])
    run(arguments, tmp_path, "sampling", "decoder.batch_size=1", *BARE)
    assert max(rows) <= 3  # of the texts by which models are tried
    assert rows.count(1) >= 8
    assert said(tmp_path, "sampling", "plain") == said(out, "sampling", "plain")


@pytest.mark.parametrize("kind", [*KINDS, "nudging"])
def test_a_decoder_gives_its_plain_samples_all_that_both_have(kind):
    options = {"kind": kind, "batch_size": 7, "temperature": 0.3}
    decoder = TypeAdapter(AnyDecoder).validate_python(options)
    plain = Plain.like(decoder)
    shared = set(type(plain).model_fields) & set(type(decoder).model_fields) - {"kind"}
    assert {"batch_size", "temperature", "top_p", "max_new_tokens"} <= shared
    assert all(getattr(plain, name) == getattr(decoder, name) for name in shared)


# -- one run each -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_answers_every_prompt_and_is_measured(runs, kind):
    out, contents = runs
    found = contents[kind]["decoding"]
    assert found["prompts"] == 8
    system = found["systems"]["plain" if kind == "sampling" else kind]
    assert system["replies"] == 8
    assert system["reward"]["low"] <= system["reward"]["value"] <= system["reward"]["high"]
    assert "against" in system
    assert set(system["against"]) == set() if kind == "sampling" else "plain" in system["against"]
    page = (out / kind / "report.html").read_text()
    assert "Systems" in page
    assert len(said(out, kind, "plain" if kind == "sampling" else kind)) == 8
    rows = pq.read_table(out / kind / "predictions.parquet").to_pydict()
    rewards = np.array(rows["reward_plain" if kind == "sampling" else f"reward_{kind}"])
    assert np.isclose(rewards.mean(), system["reward"]["value"])


def test_replies_can_be_taken_to_alpaca_eval_and_back(runs, tmp_path):
    """An annotator that prefers the longer reply gives the win rates of lengths."""
    out, _ = runs
    folder = out / "eft" / "alpaca_eval"
    assert sorted(file.stem for file in folder.iterdir()) == ["eft", "guide", "plain"]
    ours, base = (json.loads((folder / f"{name}.json").read_text()) for name in ("eft", "plain"))
    assert {row["output"] for row in ours} == set(said(out, "eft", "eft").values())
    assert all(row["instruction"].startswith("question") for row in ours)
    rows = []
    for a, b in zip(base, ours, strict=True):
        assert a["instruction"] == b["instruction"]
        longer = np.sign(len(b["output"]) - len(a["output"]))
        sides = {f"{k}_{n}": row[k] for n, row in ((1, a), (2, b)) for k in ("output", "generator")}
        rows.append({"instruction": a["instruction"], **sides, "preference": 1.5 + longer / 2})
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows))
    found = alpaca.win_rates(alpaca.read_annotations(file), alpaca.replies_of(out / "eft"))
    (pair,) = found["pairs"]
    assert (pair["system"], pair["over"], pair["prompts"]) == ("eft:eft", "eft:plain", 8)
    assert pair["win_rate"]["value"] == pytest.approx(np.mean([row["preference"] - 1 for row in rows]))


def test_what_a_decoder_costs_is_counted(runs):
    """Of greedy drafts and plain samples it can be said beforehand."""
    _, contents = runs
    systems = contents["search"]["decoding"]["systems"]
    assert systems["plain"]["cost"]["guide"] == 0
    assert systems["guide"]["cost"]["strong"] == 0
    # two beams with two children each write four times as much as is kept, and the guide reads all of it
    assert 2 < systems["search"]["cost"]["strong"] < systems["plain"]["cost"]["strong"] * 4
    assert systems["search"]["cost"]["guide"] > 2
    drafts = contents["wsd"]["decoding"]["switch"]
    assert sum(drafts["fates"].values()) == 8
    assert max(drafts["kept"]) <= 6


def test_stages_are_shared_and_a_second_run_writes_nothing(runs, arguments):
    out, contents = runs
    again = run(arguments, out, "search")
    assert all(stage["cached"] for stage in again["stages"])
    keys = [{s["name"]: s["key"] for s in contents[kind]["stages"]} for kind in ("search", "best_of_n", "eft")]
    for name in ("plain", "guide-alone", "judge"):  # the same sampling, guide and judge for all
        assert len({key[name] for key in keys}) == 1


@pytest.mark.parametrize("kind", ["search", "best_of_n", "eft", "wsd"])
def test_replies_do_not_depend_on_how_many_prompts_are_in_flight(runs, arguments, tmp_path, kind):
    out, _ = runs
    run(arguments, tmp_path, kind, "decoder.batch_size=3", *BARE)
    assert said(tmp_path, kind, kind) == said(out, kind, kind)


@pytest.mark.slow
def test_a_hypothesis_that_is_alone_is_the_plain_sample(runs, arguments, models, tmp_path):
    """One beam with one child, one sample, the first of several samples, and a tilt of strength 0."""
    out, _ = runs
    plain, weak = said(out, "sampling", "plain"), models["weak"]
    alone = ["decoder.beams=1", "decoder.children=1", "decoder.chunk=3"]
    run(arguments, tmp_path, "search", *alone, *BARE, name="one")
    run(arguments, tmp_path, "best_of_n", "decoder.samples=1", *BARE, name="first")
    run(arguments, tmp_path, "eft", "decoder.beta=0", f"strong.name={weak}", *BARE, name="eft")
    assert said(tmp_path, "one", "search") == said(tmp_path, "first", "best_of_n") == plain
    assert said(tmp_path, "eft", "eft") == said(tmp_path, "eft", "plain")


def test_the_trace_is_that_of_the_search(runs):
    out, contents = runs
    traces = contents["search"]["decoding"]["traces"]
    replies = {
        row["prompt"]: row
        for row in pq.read_table(out / "search" / "samples.parquet").to_pylist()
        if row["system"] == "search"
    }
    assert len(traces) == 4
    for trace in traces:
        row = replies[trace["prompt"]]
        assert trace["best"] == row["reply"]
        assert trace["value"] == pytest.approx(row["value"], abs=1e-4)
        first, last = trace["rounds"][0], trace["rounds"][-1]
        assert len(first) <= 4
        assert sum(h["kept"] for h in first) <= 2
        assert trace["rule"] != "beam" or trace["value"] == pytest.approx(max(h["value"] for h in last), abs=1e-6)


@pytest.mark.slow
def test_a_tilted_search_and_a_reward_guide_run(runs, arguments, tmp_path):
    tilted = run(arguments, tmp_path, "search", "decoder.tilt=1.0", *BARE, name="tilted")
    assert (
        tilted["decoding"]["systems"]["search"]["cost"]["guide"]
        > runs[1]["search"]["decoding"]["systems"]["search"]["cost"]["guide"]
    )
    by_reward = ["decoder.guide.reward=1.0", "decoder.guide.model=weak"]
    rewarded = run(arguments, tmp_path, "best_of_n", "decoder.guide.implicit=0.0", *by_reward, name="rewarded")
    names = [stage["name"] for stage in rewarded["stages"]]
    assert "guide" in names
    assert "untuned" not in names
    assert "guide-alone" not in names
    mixed = run(arguments, tmp_path, "search", *by_reward, *BARE, name="mixed")
    assert mixed["decoding"]["systems"]["search"]["replies"] == 8


def test_a_guide_is_aligned_where_none_is_given(arguments, tmp_path):
    content = run(arguments, tmp_path, "eft", "weak.before_alignment=null", "method.alignment.lr.full=0.002", *BARE)
    assert "weak" in {stage["name"] for stage in content["stages"]}
    assert content["decoding"]["training"]["weak"]["steps"] > 0
    trained = find_finished(tmp_path / "eft", "weak", tmp_path, tmp_path / "store")  # experiment=wsd_pilot's drafter
    assert (trained.role, trained.folder.name.rpartition("-")[0]) == ("weak", "weak")
    files = export_model(trained, tmp_path / "drafter")
    assert "model.safetensors" in {file.name for file in files}
    with pytest.raises(UserError, match="this run has no student: untuned, weak, base"):
        find_finished(tmp_path / "eft", "student", tmp_path, tmp_path / "store")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "typed", "said"),
    [
        ("eft", "decoder.beta=-1.0", "decoder.negative=true"),
        ("search", "decoder.temperature=0.0", "all candidates are the same"),
        ("search", "decoder.guide.implicit=0.0", "nothing is left to choose by"),
        ("search", "decoder.guide.model=weak", "go together"),
        ("best_of_n", "decoder.guide.feature_layer=3", "read only where model=weak is trained"),
        ("search", "decoder.guide.length_alpha=0.5", "read only by normalise=length_alpha"),
        ("best_of_n", "decoder.samples=0", "decoder.samples"),
        ("wsd", "decoder.draft=99", "cannot be longer than a reply"),
        ("search", "decoder.width=3", "width"),
        ("search", "weak=bow", "cannot write"),
        ("search", "weak.lr=0.1", "weak.lr: not read where a decoder is measured; set method.alignment.lr"),
        ("search", "strong.epochs=2", "strong.epochs: not read where a decoder is measured"),
        ("search", "strong.before_alignment=x", "strong.before_alignment: only the weak model"),
        ("search", "dataset.noise={kind: flip, rate: 0.1, shrink: -1.0, rates: null}", "dataset.noise.kind"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, tmp_path, kind, typed, said):
    with pytest.raises(ConfigError, match=said):
        check(compose(*arguments(tmp_path, kind, *([f"+{typed}"] if "width" in typed else [typed])), name="decode"))


def test_the_judge_is_never_the_guide(arguments, tmp_path):
    more = ["decoder.guide.reward=1.0", "decoder.guide.model=weak", "method.judge.model=weak"]
    config = compose(*arguments(tmp_path, "search", *more), name="decode")
    with pytest.raises(ConfigError, match="guide and judge at once"):
        check(config)


@pytest.mark.slow
def test_logits_of_different_vocabularies_are_not_added(arguments, tmp_path):
    """Equal numbers of tokens are not equal tokens."""
    other = save_tiny_model(tmp_path / "other", "llama", seed=3)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="different vocabularies"):
        run(arguments, tmp_path, "eft", f"strong.name={other}")
    searched = run(arguments, tmp_path, "search", f"strong.name={other}", *BARE)  # goes by text
    assert searched["decoding"]["systems"]["search"]["replies"] == 8


def with_positions(model: Path, folder: Path, positions: int, swapped: bool = False) -> Path:
    """A copy of a model with fewer positions, and another vocabulary if that is asked for."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    if swapped:
        content = json.loads((folder / "tokenizer.json").read_text())
        words = content["model"]["vocab"]
        first, second = sorted(words, key=words.get)[40:42]
        words[first], words[second] = words[second], words[first]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "swapped", "what"),
    [
        ("search", True, "go on there without its guidance"),
        ("search", False, "end there, unfinished"),
        ("wsd", False, "have no more of its words from there on"),
        ("eft", False, "end there, unfinished"),
    ],
)
def test_a_small_model_with_few_positions_ends_no_run(kind, swapped, what, arguments, pairs_folder, models, tmp_path):
    """Prompts that it cannot read are left out and counted; replies that it cannot follow are counted."""
    more = [f"strong.name={models['strong']}", *BARE, "weak.max_length=90", "decoder.max_new_tokens=20"]
    text = Run(check(compose(*arguments(tmp_path, kind, *more), name="decode")), tmp_path / "run")
    lengths = sorted(len(row) for row in text.strong.chat.prompts(text.prompts("test").texts))
    llama = save_tiny_model(tmp_path / "llama", "llama", width=16, seed=3)
    limit = lengths[-2] + 2
    assert lengths[-1] <= limit + 12  # so that some fit and their replies do not
    for name in ("tuned", "untuned"):
        with_positions(llama, tmp_path / name, limit, swapped)
    more += [f"weak.name={tmp_path / 'tuned'}", f"weak.before_alignment={tmp_path / 'untuned'}"]
    for _ in range(2):  # from the store as well
        report = run(arguments, tmp_path, kind, *more)
        lines = [line for line in report["warnings"] if f"of the {limit} positions of weak (tuned)" in line]
        said = [line for line in lines if not line.startswith("guide-alone: ")]
        assert len(said) == 1, report["warnings"]
        assert what in said[0]
        assert "choose a model with more positions for weak" in said[0]
    short = with_positions(llama, tmp_path / "short", lengths[0], swapped)
    names = [f"weak.name={short}", f"weak.before_alignment={short}"]
    report = run(arguments, tmp_path, kind, *more, *names)
    assert any(f"longer than the {lengths[0]} positions of weak (short)" in line for line in report["warnings"])


class Words:
    """A chat whose tokens are words, and ``*`` begins a turn of somebody else."""

    fingerprint = "words"

    @staticmethod
    def text(tokens):
        return " ".join(map(str, tokens))

    @staticmethod
    def said(tokens):
        return Said("", Words.text(tokens))

    @staticmethod
    def thought(tokens):
        return 0

    @staticmethod
    def heard(text):
        return Said("", text)

    @staticmethod
    def replies(texts, finished):
        return [np.array(list(map(int, text.split())), np.int64) for text in texts]

    end = 9

    @staticmethod
    def cut(tokens, given=0):
        return tokens, False


def test_a_reply_without_tokens_keeps_its_place_its_value_and_its_cost():
    """Of best-of-n, whose best sample ended at once."""
    said = Written(np.array([7, 8]), np.array([-1.0, -2.0]), value=-1.0, finished=True)
    nothing = Written(np.zeros(0, np.int64), np.zeros(0), value=5.0, finished=True, strong_read=12, candidates=(said,))
    run = SimpleNamespace(reading=SimpleNamespace(thoughts=lambda *_: None))
    strong = SimpleNamespace(source=SimpleNamespace(chat=Words))
    replies = [unpack(pack(nothing))]
    found = steered(run, BestOfN(samples=2), strong, Prompts("test", ["p"], ["?"]), replies, "stage")
    assert (found.replies.texts, found.candidates.texts) == ([""], ["", "7 8"])
    assert found.values.tolist() == [5.0, -1.0]
    assert found.facts[0]["strong_read"] == 12
    assert [row.tolist() for row in found.candidates.tokens] == [[], [7, 8]]


def test_a_reply_is_read_back_as_it_was_stored():
    reply = Written(
        tokens=np.array([3, 1, 4]),
        log_probabilities=np.array([-0.5, -0.25, -2.0]),
        finished=True,
        value=1.5,
        strong_read=20,
        guide_read=7,
        drafted=np.array([True, True, False]),
        fate="reached",
        rounds=3,
        rule="finished pool",
    )
    table = pack(reply)
    # what stands in the stores of earlier versions: a row a token
    assert table.tolist() == [
        [3, -0.5, 1, 0, 1.5, 1, 1, 20, 7, 3, 1],
        [1, -0.25, 1, 0, 1.5, 1, 1, 20, 7, 3, 1],
        [4, -2.0, 0, 0, 1.5, 1, 1, 20, 7, 3, 1],
    ]
    again = unpack(table)
    for name, value in vars(reply).items():
        assert np.array_equal(getattr(again, name), value), name
    heard = Written(
        text="3 1", finished=True, value=0.5, strong_read=4, counted_by="server", candidates=(Written(text=""),)
    )
    answer = json.loads(json.dumps(pack_text(heard, len, 0.25)))
    assert (answer["seconds"], [c["tokens"] for c in answer["candidates"]]) == (0.25, [3, 0])
    again = unpack_text(answer)
    assert (again.text, again.value, again.counted_by, again.candidates[0].text) == ("3 1", 0.5, "server", "")
    assert again.as_heard(Words)[0].tokens.tolist() == [3, 1, 9]


@pytest.mark.slow
def test_the_judge_of_a_run_is_exported_and_rewards_as_it_did(runs, tmp_path):
    out, _ = runs
    place = out / "search"
    print_export(place, tmp_path / "judge", "judge", out, out / "store", console.Plain(quiet=True))
    rows = pq.read_table(place / "samples.parquet").to_pylist()
    found = load_student(tmp_path / "judge").score([f"{row['prompt']} {row['reply']}" for row in rows])[:, 0]
    wanted = torch.tensor([row["reward"] for row in rows])
    assert torch.allclose(found - found[0], wanted - wanted[0], atol=1e-4)


def test_a_judge_reads_no_more_than_it_has_positions_for(arguments, tmp_path):
    text = Run(check(compose(*arguments(tmp_path, "sampling"), name="decode")), tmp_path / "run")
    judge = RewardJudge(max_length=10**6)
    source = RewardModel(text, judge).source
    assert source.spec.max_length == source.config.max_position_embeddings < 10**6


# -- many runs --------------------------------------------------------------------------------------------------------


def test_decoders_are_gathered_on_the_prompts_that_all_answered(runs, tmp_path):
    out, contents = runs
    summary = collect(out)
    assert summary.cells == []  # none of them is a label run
    (group,) = summary.content["decoders"]
    names = [row["name"] for row in group["rows"]]
    assert group["prompts"] == 8
    assert any("search" in name for name in names)
    own = next(row["name"] for row in group["rows"] if row["kind"] == "search")
    plain = next(row["name"] for row in group["rows"] if row["kind"] == "plain" and "0.7" in row["name"])
    rate = group["wins"]["value"][names.index(own)][names.index(plain)]
    assert rate == pytest.approx(
        contents["search"]["decoding"]["systems"]["search"]["against"]["plain"]["win_rate"]["value"]
    )
    # runs on other prompts, or with another judge, are another group
    for name, section, key in (("a", "dataset", "split_seed"), ("b", "optim", "label_smoothing")):
        content = json.loads((out / "search" / "report.json").read_text())
        content["config"][section][key] = 0.125 if section == "optim" else 3
        shutil.copytree(out / "search", tmp_path / "other" / name)
        (tmp_path / "other" / name / "report.json").write_text(json.dumps(content))
    shutil.copytree(out / "search", tmp_path / "other" / "c")
    assert len(collect(tmp_path / "other").content["decoders"]) == 3
    files = summary.write(tmp_path)
    assert all(file.stat().st_size for file in files)
    assert files[0].read_text().count("<svg") == 2  # over cost and surprise, and over the divergence


@pytest.mark.slow
def test_from_the_command_line_as_a_sweep_and_on_two_processes(runs, arguments, tmp_path):
    out, _ = runs
    typed = [a for a in arguments(tmp_path / "m", "search") if not a.startswith("decoder")]
    run_script("evaluate.py", "-m", "decoder=search,eft", "decoder.max_new_tokens=10", *typed)
    assert len(list((tmp_path / "m").glob("*/report.html"))) == 2
    result = run_script("evaluate.py", f"runs={tmp_path / 'm'}")
    assert "summary.html" in result.stdout
    two = arguments(tmp_path / "two", "search", "trainer.devices=2", "trainer.strategy=ddp")
    start_ranks("evaluate.py", *two, folder=tmp_path)()
    (folder,) = [f.parent for f in (tmp_path / "two").glob("*/report.json")]
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert {r["prompt_id"]: r["reply"] for r in rows if r["system"] == "search"} == said(out, "search", "search")


# -- the best of n ----------------------------------------------------------------------------------------------------


def test_the_curve_of_best_of_n_is_the_mean_over_all_draws():
    """Against every subset, looked at one by one; equal proxies share."""
    from itertools import combinations

    proxy = np.array([[0.3, 1.2, -0.5, 0.7], [0.0, 0.0, 1.0, -1.0], [2.0, 1.0, 3.0, 0.5]])
    gold = np.array([[1.0, 0.2, 0.4, 0.9], [0.3, 0.7, 0.1, 0.5], [0.0, 1.0, 0.5, 0.25]])
    curve = comparisons.best_of_n(proxy, gold, Bootstrap(3), [1, 2, 3, 4])
    for point in curve:
        worth = []
        for p, g in zip(proxy, gold, strict=True):
            draws = []
            for chosen in combinations(range(4), point["n"]):
                best = max(p[k] for k in chosen)
                draws.append(np.mean([g[k] for k in range(4) if p[k] == best and k in chosen]))
            worth.append(np.mean(draws))
        assert point["gold"]["value"] == pytest.approx(np.mean(worth))
    assert curve[0]["kl"] == 0
    assert curve[1]["kl"] == pytest.approx(np.log(2) - 0.5)


def test_distinctness_counts_different_words():
    found = comparisons.distinctness(["a b a", "a b"])
    assert found == {"distinct_1": 2 / 5, "distinct_2": 2 / 3}


@pytest.mark.slow
def test_plain_samples_by_vllm_are_those_of_our_own_engine(runs, arguments, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"decoder\.engine: vLLM cannot sample here: the package vllm is not"):
        check(compose(*arguments(tmp_path, "sampling", "decoder.engine=vllm"), name="decode"))
    fake, made = stand_in_for_vllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    run(arguments, tmp_path, "sampling", "decoder.engine=vllm", "decoder.temperature=0.0", name="vllm")
    run(arguments, tmp_path, "sampling", "decoder.temperature=0.0", name="ours")
    assert len(made) == 1
    assert said(tmp_path, "vllm", "plain") == said(tmp_path, "ours", "plain")


@pytest.mark.slow
def test_a_model_that_ends_each_reply_at_once_is_measured_as_far_as_it_goes(arguments, models, tmp_path):
    """Greedy, it writes its end alone, as some models that are small, or trained badly, do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(models["strong"]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.eos_token_id == 0
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all logits tie, and the lowest id is taken
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "silent")
    content = run(arguments, tmp_path, "nudging", f"strong.name={tmp_path / 'silent'}", "decoder.temperature=0.0")
    systems = content["decoding"]["systems"]
    assert "surprise" not in systems["plain"]
    assert systems["guide"]["surprise"]["value"] > 0
    assert any(line.startswith("plain: all ") and "are empty" in line for line in content["warnings"])
