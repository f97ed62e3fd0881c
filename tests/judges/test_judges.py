"""Judges that compare, and pairs as judges: their numbers against the models asked by hand, and who may not judge."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import compose, save_tiny_model
from runs import decode_arguments
from runs import run_decoder as run

from w2sg.compare.collect import collect
from w2sg.config.check import check
from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Replies, prompts_of
from w2sg.errors import ConfigError, UserError
from w2sg.experiment.run import Run
from w2sg.judges import ImplicitJudge, LanguageModelJudge, judge_of
from w2sg.judges.language_model import LabelVerdicts

LABELS = ["A", "B"]
QUESTION = "{conversation}|{first}|{second}|A or B?"
NO_SURPRISE = ["method.evaluation.surprise=false"]


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return decode_arguments(pairs_folder, models)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A judge, and a pair that takes no part otherwise."""
    folder = tmp_path_factory.mktemp("judges")
    return {
        "judge": save_tiny_model(folder / "judge", "llama", seed=11),
        "tuned": save_tiny_model(folder / "tuned", seed=12),
        "untuned": save_tiny_model(folder / "untuned", seed=13),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory, arguments):
    out = tmp_path_factory.mktemp("bench")
    config = check(compose(*arguments(out, "eft"), name="decode"))
    return Run(config, out / "run")


def llm(model, **more):
    options = {"kind": "llm", "model": str(model), "question": QUESTION, "labels": LABELS, "max_length": 128}
    return LanguageModelJudge(**options | more)


def replies(text, texts):
    prompts = prompts_of(text.data.test).first(len(texts))
    zeros = np.zeros(len(texts), np.int64)
    return Replies(prompts.ids, prompts.texts, list(texts), np.ones(len(texts), bool), zeros, zeros, {})


def by_hand(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), Chat(AutoTokenizer.from_pretrained(folder))


# -- a language model that compares -----------------------------------------------------------------------------------


def test_the_verdict_is_that_of_the_next_token_in_both_orders(text, others):
    judge = judge_of(text, llm(others["judge"]))
    a, b = replies(text, ["good fine", "rude", "warm"]), replies(text, ["bad", "kind and wise", "warm"])
    found = judge.compare("by-hand", a, b)
    model, chat = by_hand(others["judge"])
    space, labels = chat.replies(LABELS)[0][:1], [int(row[1]) for row in chat.replies(LABELS)]
    for k in range(3):
        first = []
        for one, two in ((a, b), (b, a)):
            asked = a.prompts[k].text.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
            question = Dialogue.of_text(f"\n\nHuman: {asked}|{one.texts[k]}|{two.texts[k]}|A or B?\n\nAssistant:")
            with torch.no_grad():
                logits = model(torch.from_numpy(np.append(chat.prompts([question])[0], space))[None]).logits[0, -1]
            first.append(float(logits[labels].softmax(-1)[0]))
        assert found.first[k] == pytest.approx(first, abs=1e-5)
        assert found.preferred[k] == pytest.approx((first[0] + 1 - first[1]) / 2, abs=1e-5)
    assert found.preferred[2] == pytest.approx(0.5, abs=1e-6)  # equal replies, whatever its bias for a position


def test_a_judge_that_goes_by_position_alone_prefers_nobody_and_is_found_out():
    found = LabelVerdicts.of_labels(np.array([[0.9, 0.9], [0.8, 0.8], [0.7, 0.7]]), np.full(3, 0.6))
    assert found.preferred == pytest.approx(0.5)
    about = found.of_judge()
    assert about["position_bias"]["value"] == pytest.approx(0.3)
    assert about["position_bias"]["low"] > 0
    assert about["flips"] == 1.0
    assert about["label_mass"] == pytest.approx(0.6)
    steady = LabelVerdicts.of_labels(np.array([[0.9, 0.1]]), np.ones(1))
    assert steady.preferred == pytest.approx(0.9)
    assert steady.of_judge()["flips"] == 0


def test_what_does_not_fit_has_no_verdict(text, others):
    judge = judge_of(text, llm(others["judge"], max_length=60))
    a, b = replies(text, ["good", "bad"]), replies(text, ["good " * 40, "fine"])
    found = judge.compare("too-long", a, b)
    assert found.known.tolist() == [False, True]
    assert np.isnan(found.preferred[0])
    with pytest.raises(UserError, match=r"method.judge.max_length: no comparison of far-too-long fits into 60 tokens"):
        judge.compare("far-too-long", *(replies(text, ["good " * 40, "bad " * 40]) for _ in range(2)))


def test_a_judge_without_room_for_prompts_is_told_of_before_any_training(text, others, caplog):
    prompts = prompts_of(text.data.test).texts
    judge = judge_of(text, llm(others["judge"]))
    lengths = [
        len(ids) + judge.label_tokens for ids in judge.source.chat.prompts([judge.question(p, "", "") for p in prompts])
    ]
    said = "method.judge.max_length: .* reads 4 tokens as a judge, and the shortest test prompt takes"
    with pytest.raises(UserError, match=said):
        judge_of(text, llm(others["judge"], max_length=4))
    with pytest.raises(UserError, match=said):
        judge_of(text, ImplicitJudge(tuned=str(others["tuned"]), untuned=str(others["untuned"]), max_length=4))
    assert min(lengths) < max(lengths)
    assert "test prompts take more than" not in caplog.text
    judge_of(text, llm(others["judge"], max_length=max(lengths)))
    assert "test prompts take more than" not in caplog.text
    judge_of(text, llm(others["judge"], max_length=min(lengths)))
    lost = sum(length > min(lengths) for length in lengths)
    assert f"{lost} of {len(prompts)} test prompts take more than the {min(lengths)} tokens" in caplog.text


def test_speakers_and_places_inside_replies_are_text(text, others):
    judge = judge_of(text, llm(others["judge"]))
    asked = judge.question(Dialogue.of_text("\n\nHuman: Hi\n\nAssistant:"), "{second}\n\n\nHuman: and {first}", "B")
    assert asked.messages == (("user", "Hi|{second}\nHuman: and {first}|B|A or B?"),)
    assert asked.plain


def test_labels_are_one_token_each(text, others):
    with pytest.raises(UserError, match="do not differ in one token alone"):
        judge_of(text, llm(others["judge"], labels=["question", "Zeppelin"]))


def test_a_run_with_a_judge_that_compares(arguments, others, tmp_path):
    judged = ["judge=llm", f"method.judge.model={others['judge']}", "method.judge.max_length=128"]
    judged += [f"method.judge.question={json.dumps(QUESTION)}", *NO_SURPRISE]
    content = run(arguments, tmp_path, "best_of_n", *judged)
    found = content["decoding"]
    own = found["systems"]["best_of_n"]
    assert set(own["against"]) == {"plain", "guide"}
    assert "reward" not in own
    assert "best_of_n" not in found  # a curve needs rewards
    assert any("no curve of the best of n" in line for line in content["warnings"])
    wins = own["against"]["plain"]
    rows = pq.read_table(tmp_path / "best_of_n" / "predictions.parquet").to_pydict()
    assert np.mean(rows["preferred_best_of_n_over_plain"]) == pytest.approx(wins["win_rate"]["value"], abs=1e-6)
    assert wins["win_rate"]["low"] <= wins["win_rate"]["value"] <= wins["win_rate"]["high"]
    assert {"position_bias", "flips", "label_mass", "p", "length_controlled"} <= set(wins)
    assert found["judge"]["kind"] == "llm"
    assert found["judge"]["notes"] == []  # it wrote nothing
    page = (tmp_path / "best_of_n" / "report.html").read_text()
    assert "verdicts that change with the order" in page
    assert "preferred to plain" in page
    summary = collect(tmp_path)
    (group,) = summary.content["decoders"]
    assert group["over_plain"][next(r["name"] for r in group["rows"] if r["kind"] == "best_of_n")]["p_holm"] <= 1
    assert summary.write(tmp_path)[0].stat().st_size


def test_a_judge_that_writes_is_said_to(arguments, models, tmp_path):
    judged = ["judge=llm", "method.judge.model=strong", "method.judge.max_length=128", "method.evaluation.prompts=4"]
    judged += [f"method.judge.question={json.dumps(QUESTION)}", *NO_SURPRISE]
    content = run(arguments, tmp_path, "sampling", *judged)
    assert any("the judge is the strong model" in line and "self-preference" in line for line in content["warnings"])


# -- a pair -----------------------------------------------------------------------------------------------------------


def test_the_implicit_reward_is_the_log_ratio_of_the_whole_reply(text, others):
    options = ImplicitJudge(kind="implicit", tuned=str(others["tuned"]), untuned=str(others["untuned"]), max_length=96)
    judge = judge_of(text, options)
    asked = replies(text, ["good fine", "rude", "   "])
    found = judge.rewards("by-hand", asked)
    for k in range(2):
        sums = []
        for name in ("tuned", "untuned"):
            model, chat = by_hand(others[name])
            prompt = chat.prompts([asked.prompts[k]])[0]
            reply = np.append(chat.replies([asked.texts[k]])[0], chat.end)
            with torch.no_grad():
                logits = model(torch.from_numpy(np.concatenate([prompt, reply]))[None]).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(prompt) - 1 + j, token]) for j, token in enumerate(reply)))
        assert found[k] == pytest.approx(sums[0] - sums[1], abs=1e-3)
    assert found[2] == 0  # nothing was said


def test_a_run_with_a_pair_as_judge_has_all_that_rewards_give(arguments, others, tmp_path):
    judged = ["judge=implicit", "method.judge.max_length=96", *NO_SURPRISE]
    judged += [f"method.judge.{key}={others[key]}" for key in ("tuned", "untuned")]
    content = run(arguments, tmp_path, "best_of_n", *judged)
    found = content["decoding"]
    assert found["judge"]["kind"] == "implicit"
    assert [point["n"] for point in found["best_of_n"]] == [1, 2, 3]
    # the best of all samples is the reply that was chosen, whichever of the two was read
    chosen = found["systems"]["best_of_n"]["reward"]["value"]
    assert found["best_of_n"][-1]["gold"]["value"] == pytest.approx(chosen, abs=1e-4)
    assert found["systems"]["best_of_n"]["against"]["plain"]["gap"]["low"] is not None
    rows = pq.read_table(tmp_path / "best_of_n" / "samples.parquet").to_pylist()
    assert all(row["reward"] is not None for row in rows)


# -- who may not judge ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_guide_is_refused_by_name_before_any_work(arguments, models, tmp_path):
    for judged in (
        ["judge=llm", f"method.judge.model={models['weak']}"],
        ["judge=llm", "method.judge.model=weak"],
        ["judge=implicit", f"method.judge.tuned={models['weak']}", f"method.judge.untuned={models['untuned']}"],
    ):
        with pytest.raises(ConfigError, match="guide and judge at once"):
            check(compose(*arguments(tmp_path, "search", *judged), name="decode"))
        check(compose(*arguments(tmp_path, "sampling", *judged), name="decode"))  # nothing guides there


def test_the_guide_is_refused_by_its_weights(arguments, models, tmp_path):
    import shutil

    copy = shutil.copytree(models["weak"], tmp_path / "another-name")
    for judged in (
        ["judge=llm", f"method.judge.model={copy}", f"method.judge.question='{QUESTION}'"],
        ["judge=implicit", f"method.judge.tuned={copy}", f"method.judge.untuned={models['untuned']}"],
        ["judge=implicit", f"method.judge.tuned={models['untuned']}", f"method.judge.untuned={copy}"],
    ):
        with pytest.raises(UserError, match="guide and judge at once"):
            run(arguments, tmp_path, "search", *judged)
    copy = shutil.copytree(models["untuned"], tmp_path / "yet-another-name")
    rewards = ["decoder.guide.reward=1.0", f"decoder.guide.model={models['untuned']}", f"method.judge.model={copy}"]
    with pytest.raises(UserError, match="the reward model that guides would be guide and judge at once"):
        run(arguments, tmp_path, "search", *rewards)
    assert not list((tmp_path / "store").glob("plain-*"))  # nothing was written


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["judge=implicit"], "method.judge.tuned: needs a value"),
        (["judge=implicit", "method.judge.tuned=a/b", "method.judge.untuned=a/b"], "rewards nothing"),
        (["judge=llm", "method.judge.question=Which?"], "must stand in it"),
        (["judge=llm", "method.judge.labels=[A,A]"], "two different words"),
        (["judge=llm", "method.judge.labels=[A]"], "method.judge.labels"),
    ],
)
def test_what_no_judge_can_be_is_refused(arguments, tmp_path, typed, said):
    with pytest.raises(ConfigError, match=said):
        check(compose(*arguments(tmp_path, "search", *typed), name="decode"))


def test_a_preset_names_a_judge(arguments, tmp_path):
    from w2sg.config.options import model_name

    config = check(compose(*arguments(tmp_path, "search", "judge=llm"), name="decode"))
    assert model_name(config.method["judge"]["model"], config) == "Qwen/Qwen2.5-7B-Instruct"
    assert model_name("hf", config) == "hf"
