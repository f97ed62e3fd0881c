"""The untrained model's answers are those of the language model itself, and who has none says why."""

import numpy as np
import pytest
import torch
from conftest import compose
from runs import run_labels as run
from runs import stages_of

from w2sg.config.check import check
from w2sg.config.data_schema import ZeroShotConfig
from w2sg.data.rows import pack
from w2sg.data.table import Table
from w2sg.errors import UserError
from w2sg.models import zero_shot
from w2sg.models.source import find

ASKED = ZeroShotConfig(question="\nIs it good or bad?", answers=["bad", "good"])
ASK = 'dataset.zero_shot={question: "\\nIs it good or bad?", answers: [bad, good]}'


def source(folder, *more):
    return find(check(compose("strong=hf", f"strong.name={folder}", "strong.max_length=64", *more)).strong, "strong")


def table(kind="pairs", classes=2):
    texts = [("warm and fair", "rude and cold"), ("calm", "vague silly mean")]
    texts = texts if kind == "pairs" else [t[:1] for t in texts]
    n = len(texts)
    zeros = np.zeros(n, np.int64)
    return Table("test", kind, classes, [str(i) for i in range(n)], [""] * n, texts, zeros, zeros)


@pytest.mark.parametrize("kind", ["pairs", "classes"])
@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
def test_scores_are_the_language_models_own_logits(model, kind, request):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(model)
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    first = [tokenizer(a, add_special_tokens=False)["input_ids"][0] for a in ASKED.answers]
    asking = zero_shot.questioned(table(kind), ASKED.question)
    scorer = zero_shot.load_zero_shot(source(folder), kind == "pairs", ASKED.answers)
    rows = pack(asking.texts, source(folder).encode, 64)
    with torch.no_grad():
        scores = scorer(rows.collate([0, 1]))
        for i, texts in enumerate(asking.texts):
            expected = [plain(**tokenizer(text, return_tensors="pt")).logits[0, -1, first] for text in texts]
            wanted = torch.stack([e[1] - e[0] for e in expected]) if kind == "pairs" else expected[0]
            assert torch.allclose(scores[i], wanted, atol=1e-5)


def test_who_has_no_score_says_why(tiny_gpt2):
    def why(*more, asked=ASKED, on=None):
        return zero_shot.why_not(source(tiny_gpt2, *more), on or table(), asked)

    assert why() is None
    assert "asks nothing" in why(asked=None)
    assert "drawn at random" in why("strong.random_init=true")
    assert "1 of its blocks" in why("strong.keep_layers=1")
    assert "2 answers for 3 classes" in why(on=table("classes", 3))
    bow = find(check(compose("strong=bow")).strong, "strong")
    assert "never pretrained" in zero_shot.why_not(bow, table(), ASKED)


def test_a_key_names_what_was_read_otherwise_once(tiny_gpt2, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = source(tiny_gpt2)
    assert zero_shot.answers_key(found, ASKED.answers) == {}
    pieces = {piece: i for i, piece in enumerate(["<unk>", "x", ":", "▁x", "▁g", "g", "▁b", "b", "o", "d", "a", "▁"])}
    merges = [("▁", "x"), ("▁", "g"), ("▁", "b")]
    sentence_pieces = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>"))
    sentence_pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    found.__dict__["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=sentence_pieces, unk_token="<unk>")
    assert zero_shot.answers_key(found, ["good", "bad"]) == {"answer_tokens": [pieces["g"], pieces["b"]]}
    found.config.logits_scaling = 4.0
    assert zero_shot.answers_key(found, ["good", "bad"])["logit_scales"] == [4.0]


def test_answers_that_begin_alike_are_refused(tiny_gpt2):
    with pytest.raises(UserError, match="begin with the same token"):
        zero_shot.load_zero_shot(source(tiny_gpt2), True, ["good", "good"])


def test_a_classifier_has_no_answers_and_is_not_given_random_ones(tiny_llama, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    with pytest.raises(UserError, match=r"no weights for lm_head.*dataset\.zero_shot=null"):
        zero_shot.load_zero_shot(source(folder), True, ASKED.answers)


@pytest.mark.slow
def test_a_run_has_the_row_once_per_model_and_question(pairs_folder, tiny_gpt2, tmp_path):
    first = run(pairs_folder, tiny_gpt2, tmp_path, ASK)
    assert set(first["metrics"]) == {"weak", "student", "ceiling", "zero_shot"}
    assert "student - zero_shot" in first["tests"]
    again = run(pairs_folder, tiny_gpt2, tmp_path, ASK, "loss=rkl", "seed=1", "strong.tune=head")
    assert stages_of(again)["zero-shot-on-test"]["cached"]
    # other coin flips, the same choices
    assert again["metrics"]["zero_shot"]["accuracy"] == first["metrics"]["zero_shot"]["accuracy"]
    other = run(pairs_folder, tiny_gpt2, tmp_path, ASK.replace("good or bad?", "kind or rude?"))
    assert not stages_of(other)["zero-shot-on-test"]["cached"]
    without = run(pairs_folder, tiny_gpt2, tmp_path)
    assert "asks nothing" in without["training"]["zero_shot"]


SHARED = {  # question -> whether the features and the answers come out of one forward
    "after a whole word": (ASK, True),
    "nothing": (ASK.replace("\\nIs it good or bad?", ""), True),
    "texts that lose their start": (ASK.replace("?", "? " + "really " * 60), False),
}


@pytest.mark.parametrize("case", SHARED)
def test_features_and_answers_share_their_forward_where_one_text_begins_the_other(
    case, pairs_folder, tiny_llama, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    from w2sg.models.scorer import LanguageScorer
    from w2sg.training.reading_module import ReadingModule

    asked, shared = SHARED[case]
    read = []
    step = ReadingModule.predict_step

    def counted(self, batch, index):
        if isinstance(self.model, LanguageScorer):
            read.append(batch.useful)
        return step(self, batch, index)

    monkeypatch.setattr(ReadingModule, "predict_step", counted)

    def values(out, name):
        (folder,) = (out / "store").glob(f"{name}-on-test-*")
        return folder.name, load_file(folder / "values.safetensors")["values"]

    head = ["strong.tune=head", "strong.feature_layer=2", "optim.head.epochs=1"]
    apart, together = tmp_path / "apart", tmp_path / "together"
    run(pairs_folder, tiny_llama, apart, *head)  # asks nothing, so that the features are read alone
    read.clear()
    run(pairs_folder, tiny_llama, apart, *head, asked)
    alone = sum(read)
    read.clear()
    found = run(pairs_folder, tiny_llama, together, *head, asked)
    stages = stages_of(found)
    on_test = sum(read) - stages["features-on-transfer"]["tokens"]
    if shared:
        assert stages["zero-shot-on-test"]["tokens"] == 0
        assert on_test == alone == stages["features-on-test"]["tokens"]
    else:
        assert on_test == alone + stages["features-on-test"]["tokens"]
    for name in ("features", "zero-shot"):
        (one, expected), (other, given) = values(apart, name), values(together, name)
        assert one == other
        assert torch.allclose(given, expected, atol=1e-5)
    assert run(pairs_folder, tiny_llama, together, *head, asked)["metrics"] == found["metrics"]
