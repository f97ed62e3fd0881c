"""Divergences of whole replies: against every reply of small tables looked at one by one, and models read by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import compose
from runs import decode_arguments, run_all_decoders
from runs import run_decoder as run

from w2sg.compare.collect import collect
from w2sg.config.check import check
from w2sg.data.dialogue import Chat
from w2sg.data.replies import Replies, prompts_of
from w2sg.evaluation.divergence import divergence, next_token_kl
from w2sg.experiment.decode import Pair
from w2sg.experiment.run import Run
from w2sg.models.trained import Trained


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return decode_arguments(pairs_folder, models)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, arguments):
    return run_all_decoders(arguments, tmp_path_factory.mktemp("decode-runs"))


def tables(seed, vocabulary=3):
    """[3, 1 + V, V] log-probabilities of three models that know the last token alone."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 1 + vocabulary, vocabulary))).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sum_over_tokens_is_the_divergence_of_replies(temperature):
    """KL(q || p) by every reply of four tokens, ended by token 0, against the mean over q of the sums."""
    base, tuned, untuned = tables(0)
    tilted = base + 1.5 * (tuned - untuned)
    q, p = (((x / temperature).log_softmax(-1)).exp().numpy() for x in (tilted, base))
    each = next_token_kl(base, torch.stack([tuned, untuned]), None, 1.5, temperature).numpy()  # after each last token
    whole, sums, total = 0.0, 0.0, 0.0
    for reply in product(range(3), repeat=4):
        ends = reply.index(0) + 1 if 0 in reply else 4
        if any(reply[ends:]):  # one of the ways to write the same reply counts
            continue
        law_q = law_p = 1.0
        inside, last = 0.0, -1
        for token in reply[:ends]:
            law_q, law_p, inside = law_q * q[last + 1, token], law_p * p[last + 1, token], inside + each[last + 1]
            last = token
        whole += law_q * np.log(law_q / law_p)
        sums += law_q * inside
        total += law_q
    assert total == pytest.approx(1.0)
    assert sums == pytest.approx(whole)
    assert whole > 0.1


def test_a_model_by_itself_is_the_other_law():
    base, tuned, _ = tables(1)
    found = next_token_kl(base, None, tuned, 0.0, 1.0)
    assert torch.allclose(found, (tuned.exp() * (tuned - base)).sum(-1))
    assert torch.allclose(next_token_kl(base, None, base, 0.0, 0.7), torch.zeros(len(base), dtype=torch.float64))
    assert torch.allclose(
        next_token_kl(base, torch.stack([tuned, tuned]), None, 2.0, 1.0), torch.zeros(len(base)).double()
    )


def test_the_divergence_of_models_is_that_of_their_logits(arguments, models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = check(compose(*arguments(tmp_path, "eft"), name="decode"))
    work = Run(config, tmp_path / "run")
    text, strong = work, Trained("strong", work.strong)
    pair = Pair(Trained("weak", work.weak), Trained("untuned", work.untuned))
    chat = Chat(AutoTokenizer.from_pretrained(models["strong"]))
    prompts = prompts_of(work.data.test).first(3)
    tokens = [np.append(row, chat.end) for row in chat.replies(["good", "rude and cold", "x"])]
    tokens[2] = tokens[2][:0]  # what ended it was all of it
    zeros = np.zeros(3, np.int64)
    print_of = work.strong.chat.fingerprint
    replies = Replies(
        prompts.ids, prompts.texts, ["", "", ""], zeros == 0, zeros, zeros, {}, tokens=tokens, fingerprint=print_of
    )
    found = divergence(text, "eft-kl", strong, pair, 0.8, 0.7, replies)
    loaded = {name: AutoModelForCausalLM.from_pretrained(models[name]).eval() for name in models}
    for k in range(2):
        prompt = chat.prompts([prompts.texts[k]])[0]
        ids = torch.from_numpy(np.concatenate([prompt, tokens[k]]))[None]
        with torch.no_grad():
            logits = {name: model(ids).logits[0, len(prompt) - 1 : -1].double() for name, model in loaded.items()}
        q = ((logits["strong"] + 0.8 * (logits["weak"] - logits["untuned"])) / 0.7).log_softmax(-1)
        p = (logits["strong"] / 0.7).log_softmax(-1)
        assert found[k] == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-4)
    assert found[2] == 0
    alone = divergence(text, "guide-kl", strong, pair.tuned, 0.0, 0.7, replies)
    assert (alone[:2] > 0).all()


def test_a_run_says_what_has_a_divergence_and_what_has_none(runs):
    out, contents = runs
    eft = contents["eft"]["decoding"]["systems"]
    assert eft["plain"]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0, "how": "itself"}
    assert 0 < eft["eft"]["kl"]["low"] <= eft["eft"]["kl"]["value"] <= eft["eft"]["kl"]["high"]
    assert eft["guide"]["kl"]["how"] == "exact"  # one tokenizer
    best = contents["best_of_n"]["decoding"]["systems"]["best_of_n"]["kl"]
    assert (best["value"], best["how"]) == (pytest.approx(np.log(3) - 2 / 3), "at most")
    for kind in ("search", "wsd", "contrastive"):
        found = contents[kind]["decoding"]
        assert "kl" not in found["systems"][kind]
        assert kind in found["without_kl"]
    assert "number of candidates is no divergence" in (out / "search" / "report.html").read_text()
    assert "Reward and divergence" in (out / "eft" / "report.html").read_text()
    (group,) = collect(out).content["decoders"]
    assert sum("kl" in row for row in group["rows"]) >= 3


@pytest.mark.slow
def test_the_estimate_agrees_with_the_log_ratios_of_what_was_written(arguments, tmp_path):
    """At temperature 1 both laws' log-probabilities of the samples are in the store, and their ratios average alike."""
    from w2sg.training.stage_values import load_tensors

    typed = ["decoder.temperature=1.0", "decoder.max_new_tokens=3", "decoder.beta=2.0", "dataset.sizes.test=64"]
    content = run(arguments, tmp_path, "eft", *typed, "method.evaluation.prompts=64")
    sums = {}
    for name, column in (("eft", (slice(None), 1)), ("eft-by-strong", slice(None))):
        (stage,) = (f for f in (tmp_path / "store").glob(f"{name}-*") if f.name.rpartition("-")[0] == name)
        ids, found = load_tensors(stage)
        parts = found["values"][column].double().split(found["sizes"].tolist())
        sums[name] = {i: float(part.sum()) for i, part in zip(ids, parts, strict=True)}
    ratios = np.array([sums["eft"][i] - own for i, own in sums["eft-by-strong"].items()])
    assert len(ratios) > 55  # blank replies are not read by the strong model
    found = content["decoding"]["systems"]["eft"]["kl"]
    assert found["value"] > 0
    assert abs(ratios.mean() - found["value"]) < 4 * ratios.std() / np.sqrt(len(ratios))
    # each sum has less noise than the draw that it is the mean of
    assert found["high"] - found["low"] < 2 * 1.96 * ratios.std() / np.sqrt(len(ratios))


@pytest.mark.parametrize("typed", ["decoder.top_p=0.9", "decoder.top_k=5", "decoder.temperature=0.0"])
def test_what_cuts_off_tokens_has_no_finite_divergence(arguments, tmp_path, typed):
    found = run(arguments, tmp_path, "eft", typed, "method.evaluation.surprise=false")["decoding"]
    assert set(found["without_kl"]) == {"eft", "guide"}
    assert "kl" not in found["systems"]["eft"]
