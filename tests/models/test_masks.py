"""Windows and chunks in rows that several texts share, and rotary frequencies that hang on the length of a text."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from architectures import BOTH, FAMILIES, GROUPED, HEADED, MAX_LENGTH, VOCABULARY, WINDOW, Plain, draw, spec

from w2sg.data import masks
from w2sg.data.completions import Completions
from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.models import packing, rope
from w2sg.models.packing import keeps_replies_apart, rules_key, separates_texts
from w2sg.models.policy import load_policy
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find


def config(family):
    kind, settings = FAMILIES[family]
    return getattr(transformers, kind)(**settings)


def test_a_window_counts_the_tokens_of_a_text_and_not_what_stands_between():
    from transformers.masking_utils import create_sliding_window_causal_mask

    rows = Completions([np.array([5, 6, 7])], [(np.array([8, 9, 1]), np.array([8, 9, 1]))]).collate([0])
    seen = masks.sight(rows["part"], rows["example"])
    mistral = transformers.MistralConfig(**{**HEADED, "sliding_window": 3}, attn_implementation="sdpa")
    ids, states = rows["input_ids"], torch.zeros(1, 7, 4)
    with masks.making_masks(mistral, seen, rows["position_ids"]):
        found = create_sliding_window_causal_mask(mistral, states, torch.ones_like(ids), None, rows["position_ids"])
    assert (found[0, 0] == 0).int().tolist() == [  # what is added where a token is seen
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],  # the first token of the other reply sees two of the prompt, three columns back
        [0, 0, 1, 0, 0, 1, 1],
    ]
    usual = create_sliding_window_causal_mask(mistral, states, torch.ones_like(ids), None, rows["position_ids"])
    assert usual[0, 0, 6].int().tolist() == [0, 0, 0, 0, 1, 1, 1]  # afterwards all is as before


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", []),
        ("mistral", [WINDOW]),
        ("mistral (no window)", []),
        ("qwen2", []),
        ("qwen2 (window)", [WINDOW]),
        ("gemma3", [WINDOW]),
        ("llama4", [WINDOW]),
        ("gpt_neo", [WINDOW]),
        ("phi3", [WINDOW]),
        ("recurrent_gemma", [WINDOW]),
    ],
)
def test_windows_of_a_configuration(family, expected):
    assert masks.windows(config(family)) == expected


def test_keys_name_windows_within_the_texts_and_nothing_else():
    assert rules_key(None, 64, True) == {}
    assert rules_key(config("llama"), 64, True) == {}
    assert rules_key(config("gemma3"), 64, True) == {"windows": [WINDOW]}
    assert rules_key(config("gemma3"), WINDOW, True) == {}
    assert rules_key(config("gemma3"), 64, False) == {}
    assert rules_key(config("phi3 (longrope)"), 64, False) == {"rope": [16]}
    assert rules_key(config("phi3 (longrope)"), 16, False) == {}


@pytest.mark.parametrize("family", ["mistral", "gemma3", "llama4"])
def test_rows_that_count_in_columns_are_found_out(family, folder, monkeypatch):
    source = find(spec(folder(family)), "strong")
    scorer, policy = load_language_model(source, True, 2), load_policy(source, trainable=False)
    assert separates_texts(scorer, VOCABULARY, MAX_LENGTH)
    assert keeps_replies_apart(policy, MAX_LENGTH)
    usual = masks.making_masks

    def in_columns(config, seen, positions):
        return usual(config, seen, torch.arange(positions.shape[1]).expand_as(positions))

    monkeypatch.setattr(masks, "making_masks", in_columns)
    assert not separates_texts(scorer, VOCABULARY, MAX_LENGTH)
    assert not keeps_replies_apart(policy, MAX_LENGTH)


def test_a_model_that_reads_no_row_as_transformers_does_is_refused(folder, monkeypatch):
    scorer = load_language_model(find(spec(folder("mistral")), "strong"), True, 2)

    def shifted(backbone, batch, seen=None):
        return SimpleNamespace(last_hidden_state=usual(backbone, batch, seen).last_hidden_state + 1)

    usual = masks.run_backbone
    monkeypatch.setattr("w2sg.models.scorer.run_backbone", shifted)
    with pytest.raises(UserError, match="other numbers than transformers gives each alone"):
        separates_texts(scorer, VOCABULARY, MAX_LENGTH)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_are_shared_with_either_attention(folder, attention):
    source = find(spec(folder("gemma3"), attention=attention), "strong")
    assert separates_texts(load_language_model(source, True, 2), VOCABULARY, MAX_LENGTH)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "olmo3"])
def test_gradients_are_those_of_texts_read_one_by_one(family, folder):
    """So that sharing rows or not trains the same model."""
    source = find(spec(folder(family)), "strong")
    start, *ends = draw(11, 14, 17)
    texts = [start + end for end in ends]
    found = []
    for way in ("packed", "apart", "plain"):
        torch.manual_seed(0)
        scorer = load_language_model(source, True, 2)
        if way == "plain":
            body, head = scorer._plain.base_model, scorer._plain.score
            scores = torch.stack([head(body(torch.tensor([t]), use_cache=False)[0][0, -1])[0] for t in texts])
        else:
            scores = scorer(pack([("a", "b")], lambda _: texts, MAX_LENGTH, way == "packed").collate([0]))[0]
        (scores[0] - 2 * scores[1]).backward()
        found.append(torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None]))
    size = found[2].abs().max()
    for gradient in found[:2]:
        torch.testing.assert_close(gradient / size, found[2] / size, atol=1e-5, rtol=0)


@torch.no_grad()
def test_texts_on_both_sides_of_the_border_of_longrope_are_read_as_alone(folder):
    path = folder("phi3 (longrope)")
    policy, plain = load_policy(find(spec(path), "strong"), trainable=False), Plain(path)
    prompts = [np.array(ids) for ids in draw(5, 5, 5, 5)]
    replies = [(np.array(ids),) for ids in draw(30, 3, 11, 12)]  # two of them end at the border of 16, and one over it
    found = policy(Completions(prompts, replies, packed=False).collate(range(4)))
    expected = []
    for prompt, (reply,) in zip(prompts, replies, strict=True):
        logits = plain.logits([*prompt, *reply]).log_softmax(-1)
        expected.append(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(reply)[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert not keeps_replies_apart(policy, MAX_LENGTH)
    assert keeps_replies_apart(policy, 16)  # texts that stay below may share rows


@torch.no_grad()
def test_what_was_read_before_changes_nothing(folder):
    """transformers' dynamic NTK remembers the longest text so far."""
    scorer = load_language_model(find(spec(folder("llama (dynamic)")), "strong"), False, 3)
    short, long = (pack([("a",)], lambda _, t=text: [t], MAX_LENGTH).collate([0]) for text in draw(20, 40))
    first = scorer(short)
    scorer(long)
    assert torch.equal(scorer(short), first)


def test_why_texts_cannot_share_a_row():
    assert "state" in packing.why_apart(config("lfm2"), 64)
    assert "rotary" in packing.why_apart(config("phi3 (longrope)"), 64)
    assert packing.why_apart(config("phi3 (longrope)"), 16) is None
    assert packing.why_apart(transformers.Olmo3Config(**GROUPED, **BOTH), 64) is None
    assert "columns" in packing.why_apart(config("llama4"), 8192)  # its scale of attention counts them
    assert rope.borders(config("llama (dynamic)")) == [16]
