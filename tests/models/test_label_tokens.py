"""Language models that label by a token: what they are asked, what they learn, and what they say of both orders."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BETTER, WORDS, compose, write_jsonl
from runs import assert_planned, label_arguments, planned, run_labels

from w2sg import losses
from w2sg.config.check import check
from w2sg.data.messages import Dialogue
from w2sg.data.rows import pack
from w2sg.data.table import Table
from w2sg.errors import UserError
from w2sg.models.finished import find_finished
from w2sg.models.label_questions import Questions, likeliest
from w2sg.models.label_tokens import Answered, load_label_tokens
from w2sg.models.policy import load_policy
from w2sg.models.source import find
from w2sg.training.stage_values import values_of

HEAD = "strong.head=label_tokens"
LOGITS = torch.tensor([[0.0, 2, 1, -1], [0, 0, 1, 0], [1, 3, 0, 0], [0, 1, 1.5, 0]])
SOFT = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])


def questions(folder, pairs=True, classes=2, *more):
    typed = ["strong=hf", f"strong.name={folder}", "strong.max_length=64", HEAD, *more]
    return Questions(find(check(compose(*typed)).strong, "strong"), pairs, classes)


def pairs_table(first=(0, 1)):
    prompts = [Dialogue.of_messages([("user", "which is warm?")]), Dialogue.of_text("")]
    texts = [tuple(prompts[0].text + reply for reply in (" warm", " cold")), ("calm and fair", "vague")]
    first = np.array(first, np.int64)
    return Table("test", "pairs", 2, ["a", "b"], prompts, texts, first, np.zeros(2, np.int64))


def texts_table(classes=2):
    prompts = [Dialogue.of_text("")] * 2
    zeros = np.zeros(2, np.int64)
    return Table("test", "classes", classes, ["a", "b"], prompts, [("so warm",), ("so cold",)], zeros, zeros)


@pytest.mark.parametrize(
    ("part", "whole", "two"), [(0.0, 1.341014, 1.099797), (0.25, 1.137889, 0.896672), (0.5, 0.934764, 0.693547)]
)
def test_the_losses_of_the_protocol_differ_by_the_mass_of_the_labels(part, whole, two):
    targets = (1 - part) * SOFT + part * torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    labels = LOGITS[:, 1:3]
    found = losses.cross_entropy(labels, targets.log(), 1.0).mean()
    assert found == pytest.approx(two, abs=2e-6)
    mass = (LOGITS.logsumexp(1) - labels.logsumexp(1)).mean()
    assert found + mass == pytest.approx(whole, abs=2e-6)


def test_a_question_shows_both_replies_in_the_order_of_the_row(tiny_llama):
    asked = questions(tiny_llama)
    one, two = (text for (text,) in asked.table(pairs_table()).texts)
    assert one == "Question: which is warm?\n\nAnswer A: warm\n\nAnswer B: cold\n\nLabel:"
    assert two == "Answer A: vague\n\nAnswer B: calm and fair\n\nLabel:"
    swapped = asked.table(pairs_table(), swapped=True)
    assert swapped.texts[1][0] == "Answer A: calm and fair\n\nAnswer B: vague\n\nLabel:"
    assert (swapped.kind, swapped.classes, swapped.first.tolist()) == ("classes", 2, [0, 0])


def test_labels_are_tokens_as_they_follow_the_question(tiny_llama):
    asked = questions(tiny_llama)
    (ids,) = asked.source.encode(["x\n\nLabel:A"])
    assert asked.tokens[0] == ids[-1]
    assert questions(tiny_llama, False, 3).answers == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"strong\.label_tokens\.labels: 'False' is not one token"):
        _ = questions(tiny_llama, False).tokens
    with pytest.raises(UserError, match="2 labels are named for 3 classes"):
        _ = questions(tiny_llama, False, 3, "strong.label_tokens.labels=[A,B]").answers
    with pytest.raises(UserError, match="has no chat template"):
        _ = questions(tiny_llama, True, 2, "strong.label_tokens.chat=always").chat


def test_a_template_of_ones_own_must_show_what_is_asked_about(tiny_llama, tmp_path):
    file = tmp_path / "asked.jinja"
    option = f"strong.label_tokens.question={file}"
    file.write_text("{{ first }} or {{ second }}, which?", encoding="utf-8")
    assert questions(tiny_llama, True, 2, option).table(pairs_table()).texts[0] == ("warm or cold, which?",)
    file.write_text("{{ first }}?", encoding="utf-8")
    with pytest.raises(UserError, match="does not show second"):
        _ = questions(tiny_llama, True, 2, option).template
    file.write_text("{{ first", encoding="utf-8")
    with pytest.raises(UserError, match="is no jinja template"):
        _ = questions(tiny_llama, True, 2, option).template


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
def test_logits_and_losses_are_those_of_plain_transformers(model, request):
    from transformers import AutoModelForCausalLM

    asked = questions(request.getfixturevalue(model))
    plain = AutoModelForCausalLM.from_pretrained(asked.source.folder).eval()
    scorer, source, table = load_label_tokens(asked), asked.source, asked.table(pairs_table())
    ids = [list(row) for row in source.encode([text for (text,) in table.texts])]
    read = pack(table.texts, lambda _: ids, 64).collate([0, 1])
    answers = [asked.tokens[1], asked.tokens[0]]
    whole = [[*row, answer] for row, answer in zip(ids, answers, strict=True)]
    taught = Answered(pack(table.texts, lambda _: whole, 64, False), np.full((2, 1), asked.end[0])).collate([1, 0])
    with torch.no_grad():
        logits, more = scorer(read), scorer(taught)
        for k, row in enumerate(ids):
            expected = plain(input_ids=torch.tensor([[*row, answers[k], asked.end[0]]])).logits[0].log_softmax(-1)
            assert torch.allclose(
                logits[k].log_softmax(-1), expected[len(row) - 1, asked.tokens].log_softmax(-1), atol=1e-5
            )
            nll = -expected[len(row) - 1, answers[k]] - expected[len(row), asked.end[0]]
            hard = torch.full((1, 2), -torch.inf)
            hard[0, asked.tokens.index(answers[k])] = 0.0
            found = losses.cross_entropy(more[1 - k : 2 - k, :2], hard, 1.0)[0] + more[1 - k, 2]
            assert float(found) == pytest.approx(float(nll), abs=1e-4)


def test_a_frozen_body_is_a_logistic_head_of_the_difference_of_two_rows(tiny_llama):
    scorer = load_label_tokens(asked := questions(tiny_llama))
    states = torch.randn(5, 32, requires_grad=True)
    weight = scorer.policy.head()[0]
    one = losses.cross_entropy(scorer._labels(states), SOFT[[0, 1, 2, 3, 0]].log(), 1.0).mean()
    margin = states @ (weight[asked.tokens[0]] - weight[asked.tokens[1]])
    two = torch.nn.functional.binary_cross_entropy_with_logits(margin, SOFT[[0, 1, 2, 3, 0], 0])
    assert one.item() == pytest.approx(two.item(), abs=1e-6)
    gradients = [torch.autograd.grad(loss, states, retain_graph=True)[0] for loss in (one, two)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_answers_of_ties_have_no_place_they_prefer():
    rows = np.zeros((200, 2))
    chosen = likeliest(rows, [str(k) for k in range(200)])
    assert 70 < chosen.sum() < 130
    assert likeliest(np.array([[0.0, -np.inf], [1.0, 2.0]]), ["a", "b"]).tolist() == [0, 1]


def test_rank_stabilised_adapters_are_scaled_by_the_root(tiny_llama):
    def states(*more):
        asked = questions(tiny_llama, True, 2, "strong.tune=lora", "strong.lora.r=4", *more)
        torch.manual_seed(3)
        scorer = load_label_tokens(asked)
        for name, weight in scorer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(weight)
        rows = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            return scorer.policy.model(input_ids=rows).logits

    one = states("strong.lora.alpha=8", "strong.lora.rslora=true")
    assert torch.allclose(one, states("strong.lora.alpha=16"), atol=1e-6)
    assert not torch.allclose(one, states("strong.lora.alpha=8"), atol=1e-3)


def test_reading_both_orders_cancels_a_preference_for_a_place(pairs_folder, tiny_llama, tmp_path):
    common = [HEAD, "strong.epochs=1", "strong.max_length=100", f"store={tmp_path / 'store'}"]
    one = run_labels(pairs_folder, tiny_llama, tmp_path / "one", *common)
    two = run_labels(pairs_folder, tiny_llama, tmp_path / "two", *common, "strong.label_tokens.both_orders=true")
    folders = {s["name"]: tmp_path / "store" / s["key"] for s in two["stages"]}
    assert folders["student"].name == {s["name"]: s["key"] for s in one["stages"]}["student"]
    rows = pq.read_table(tmp_path / "two" / "run" / "predictions.parquet").to_pydict()
    read = [values_of(folders[f"student-on-test{order}"], rows["id"]).double() for order in ("", "-swapped")]
    margins = (read[0][:, 0] - read[0][:, 1] + read[1][:, 1] - read[1][:, 0]) / 2
    assert torch.allclose(torch.tensor(rows["student"]).double(), margins, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["strong.label_tokens.loss=labels"], ["loss=rkl", "strong.micro_batch_size=4"]])
def test_texts_with_classes_are_learned(more, tiny_llama, tmp_path):
    draw = np.random.default_rng(0)
    for name in ("weak_train", "transfer", "test"):
        rows = []
        for k in range(64):
            label = int(draw.integers(2))
            words = draw.choice(sorted(BETTER) if label else sorted(set(WORDS) - BETTER), 4)
            rows.append({"text": f"{' '.join(words)} {name} {k}", "label": label})
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    options = [HEAD, "strong.label_tokens.labels=[A,B]", "strong.epochs=8", f"store={tmp_path / 'store'}", *more]
    report = run_labels(tmp_path / "data", tiny_llama, tmp_path, *options)
    assert report["metrics"]["ceiling"]["auroc"] > 0.9


@pytest.mark.slow
def test_a_student_is_exported_as_a_language_model_and_a_plan_has_its_stages(pairs_folder, tiny_llama, tmp_path):
    more = [HEAD, "strong.tune=lora", "strong.epochs=1", "strong.max_length=100", f"store={tmp_path / 'store'}"]
    arguments = label_arguments(pairs_folder, tiny_llama, tmp_path, *more)
    plan = planned(arguments)
    assert_planned(plan, run_labels(pairs_folder, tiny_llama, tmp_path, *more))
    found = find_finished(tmp_path / "run", "student", tmp_path, tmp_path / "store")
    assert found.scoring is None
    assert found.before.name == "base"
    policy = load_policy(find(found.spec, "strong"), found.folder / "model", trainable=False)
    assert policy.adapted


def test_labels_that_cannot_be_are_refused_before_any_work(pairs_folder, tiny_llama, tmp_path):
    with pytest.raises(UserError, match=r"strong\.label_tokens\.labels: 'very bad' is not one token"):
        run_labels(pairs_folder, tiny_llama, tmp_path, HEAD, "strong.label_tokens.labels=[good,very bad]")
    assert not list(tmp_path.rglob("weak-*"))


def test_rows_are_put_into_words_once(tiny_llama):
    asked = questions(tiny_llama)
    one, two = (asked.table(pairs_table()) for _ in range(2))
    assert one.texts is two.texts
    assert asked.table(pairs_table((1, 1))).texts[0] != one.texts[0]
    assert asked.reader is asked.reader
