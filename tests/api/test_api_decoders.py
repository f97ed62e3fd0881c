"""Decoders over models in memory: the replies of measured runs, models left as they were, wrong use named."""

import numpy as np
import pytest
import torch
from runs import DECODE_SMALL, decode_arguments

import w2sg
from w2sg.decoding.decoders.base import KINDS

OPTIONS = {
    "search": {"beams": 2, "children": 2, "chunk": 4},
    "best_of_n": {"samples": 3},
    "wsd": {"draft": 6, "check": 2, "window": 2, "threshold": 0.02},
}
PROMPTS = ["Is it kind?", "Is it warm?", "What is wise and calm and fair?"]
PAIR = {"eft", "search", "best_of_n", "contrastive"}
MOST = 8


@pytest.fixture(scope="module")
def loaded(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = AutoModelForCausalLM.from_pretrained
    return {name: load(folder) for name, folder in models.items()} | {
        "tokenizer": AutoTokenizer.from_pretrained(models["strong"])
    }


def parts(kind, models):
    """The models of a kind."""
    strong = {} if kind == "contrastive" else {"strong": models["strong"]}
    weak = (models["weak"], models["untuned"]) if kind in PAIR else models["weak"]
    return strong | ({} if kind == "sampling" else {"weak": weak})


def writer(kind, loaded, **options):
    return w2sg.decoder(
        kind,
        **parts(kind, loaded),
        tokenizer=loaded["tokenizer"],
        **{**OPTIONS.get(kind, {}), "max_new_tokens": MOST, **options},
    )


def of_few_words():
    """A model with fewer tokens than the tokenizer of the others."""
    from model_folders import llama
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(llama())


def test_every_kind_of_decoder_is_tried_here():
    assert {kind for kind, one in KINDS.items() if one.__module__.startswith("w2sg.")} == {
        *PAIR,
        "sampling",
        "wsd",
        "nudging",
    }


@pytest.mark.parametrize("kind", [*sorted(PAIR), "sampling", "wsd", "nudging"])
def test_objects_and_names_give_the_same_replies_whatever_is_written_with_them(kind, loaded, models):
    replies = writer(kind, loaded).write(PROMPTS)
    named = w2sg.decoder(kind, **parts(kind, models), **OPTIONS.get(kind, {})).write(PROMPTS[::-1], max_new_tokens=MOST)
    assert [one.text for one in replies] == [one.text for one in named[::-1]]
    assert [len(one.tokens) <= MOST for one in replies] == [True] * 3
    alone = writer(kind, loaded, batch_size=1).write([PROMPTS[1], PROMPTS[1]])
    assert [one.tokens.tolist() for one in alone] == [replies[1].tokens.tolist()] * 2
    if kind in ("sampling", "eft", "best_of_n"):
        others = writer(kind, loaded, seed=1).write(PROMPTS)
        assert [one.text for one in others] != [one.text for one in replies]


def test_eft_of_beta_0_is_the_strong_model_and_of_1_the_tilted_one(loaded):
    greedy = {"temperature": 0.0, "max_new_tokens": MOST}
    base = writer("sampling", loaded, **greedy).write(PROMPTS)
    still = writer("eft", loaded, beta=0.0, **greedy).write(PROMPTS)
    assert [one.tokens.tolist() for one in still] == [one.tokens.tolist() for one in base]
    (tilted,) = writer("eft", loaded, beta=3.0, **greedy).write(PROMPTS[:1])
    ids = loaded["tokenizer"](PROMPTS[0])["input_ids"]
    for token in tilted.tokens.tolist():
        with torch.no_grad():
            strong, tuned, untuned = (
                loaded[name](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                for name in ("strong", "weak", "untuned")
            )
        assert int((strong + 3.0 * (tuned - untuned)).argmax()) == token
        ids.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampling", "contrastive", "eft", "search"])
def test_replies_are_those_that_a_run_measures(kind, loaded, pairs_folder, models, tmp_path):
    report = w2sg.decode(
        decode_arguments(pairs_folder, models)(tmp_path, kind, "logger=none", "method.evaluation.traces=0")
    )
    rows = report.samples[report.samples["system"] == ("plain" if kind == "sampling" else kind)]
    options = dict(word.removeprefix("decoder.").split("=") for word in DECODE_SMALL.get(kind, ()))
    options = {name: int(value) for name, value in options.items()}
    replies = writer(kind, loaded, **options, max_new_tokens=10).write(rows["prompt"].tolist())
    assert [one.text for one in replies] == rows["reply"].tolist()


def test_a_function_of_rewards_guides(loaded):
    asked = []

    def short(prompts, replies):
        asked.append((prompts, replies))
        return [-float(len(reply)) for reply in replies]

    made = w2sg.decoder("best_of_n", strong=loaded["strong"], tokenizer=loaded["tokenizer"], reward=short, samples=4)
    (best,) = made.write(PROMPTS[:1], max_new_tokens=6)
    assert asked[-1][0] == PROMPTS[:1] * 4
    assert len(best.candidates) == 3
    assert all(len(best.text) <= len(one.text) for one in best.candidates)
    assert best.value == -len(asked[-1][1][int(np.argmin([len(reply) for reply in asked[-1][1]]))])
    with pytest.raises(w2sg.UserError, match=r"reward: it gave \[1\] for 4 replies"):
        w2sg.decoder(
            "best_of_n", strong=loaded["strong"], tokenizer=loaded["tokenizer"], reward=lambda p, r: [1.0], samples=4
        ).write(PROMPTS[:1])


def test_a_peft_model_brings_the_one_before_it(loaded, models):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=True
    )
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(models["untuned"]), config)
    common = {"strong": loaded["strong"], "tokenizer": loaded["tokenizer"], "max_new_tokens": MOST}
    once = w2sg.decoder("eft", weak=tuned, **common).write(PROMPTS)
    twice = w2sg.decoder("eft", weak=(tuned, loaded["untuned"]), **common).write(PROMPTS)
    assert [one.text for one in once] == [one.text for one in twice]


def test_models_are_left_as_they_were(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    strong = AutoModelForCausalLM.from_pretrained(models["strong"]).train()
    strong.model.layers[0].eval()
    before = {name: module.training for name, module in strong.named_modules()}
    tokenizer = AutoTokenizer.from_pretrained(models["strong"])
    made = w2sg.decoder("sampling", strong=strong, tokenizer=tokenizer, temperature=0.0, max_new_tokens=MOST)
    made.write(PROMPTS)
    assert {name: module.training for name, module in strong.named_modules()} == before
    assert all(parameter.requires_grad for parameter in strong.parameters())
    assert not [name for name, module in strong.named_modules() if "forward" in vars(module)]
    with torch.no_grad():  # what is trained in between counts, in its own forwards and in replies
        for parameter in strong.parameters():
            parameter.normal_(std=0.3)
        expected = strong(torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])).logits[0, -1].argmax()
    assert made.write(PROMPTS[:1])[0].tokens[0] == expected


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m: w2sg.decoder("eftt", strong=m["strong"]),
            "decoder: kind: there is no 'eftt'; choose among best_of_n",
        ),
        (lambda m: writer("eft", m, betta=2.0), "betta: no such option; did you mean beta?"),
        (lambda m: writer("eft", m, beta="2"), "beta: input should be a valid number"),
        (lambda m: writer("eft", m).write(PROMPTS, max_new_tokens=0), "max_new_tokens: input should be greater than 0"),
        (
            lambda m: w2sg.decoder("eft", strong=m["strong"], tokenizer=m["tokenizer"]),
            r"weak is missing; give \(aligned",
        ),
        (
            lambda m: w2sg.decoder("eft", strong=m["strong"], weak=m["weak"], tokenizer=m["tokenizer"]),
            r"one model without adapters; give \(aligned, base\)",
        ),
        (
            lambda m: w2sg.decoder("wsd", strong=m["strong"], weak=(m["weak"], m["untuned"]), tokenizer=m["tokenizer"]),
            "weak is 2 models; give the aligned one",
        ),
        (lambda m: w2sg.decoder("sampling", weak=m["weak"], tokenizer=m["tokenizer"]), "strong is missing"),
        (lambda m: writer("sampling", m | {"strong": None}), "strong is missing"),
        (
            lambda m: w2sg.decoder("sampling", strong=m["strong"], weak=m["weak"], tokenizer=m["tokenizer"]),
            "no weak model takes part in it",
        ),
        (
            lambda m: w2sg.decoder("contrastive", strong=m["strong"], weak=(m["weak"], m["untuned"])),
            "leave strong out",
        ),
        (lambda m: w2sg.decoder("sampling", strong=m["strong"]), "the tokenizer of .* is missing"),
        (
            lambda m: w2sg.decoder("sampling", strong=torch.nn.Linear(2, 2), tokenizer=m["tokenizer"]),
            "Linear is no language",
        ),
        (
            lambda m: w2sg.decoder("sampling", strong=m["strong"], tokenizer="a/name"),
            "str is no tokenizer; give one of",
        ),
        (
            lambda m: w2sg.decoder("nudging", strong=m["strong"], weak=of_few_words(), tokenizer=m["tokenizer"]),
            "the model rows for 64 of them.*take the model's own tokenizer",
        ),
        (
            lambda m: writer("sampling", m, style="chatml"),
            "style: there is no 'chatml'; choose among chat, roles, urial",
        ),
        (lambda m: writer("best_of_n", m, reward=3), "reward: 3 is no function"),
        (lambda m: w2sg.decoder("sampling", strong="./nowhere"), "no model folder or .gguf file at nowhere"),
        (lambda m: writer("eft", m, reward=len), "no reward guides it"),
        (lambda m: writer("search", m, guide={"reward": 1.0, "model": "x"}), "give the reward function as reward="),
        (lambda m: writer("search", m, server={"url": "http://x/v1", "model": "x"}), "server: a server writes where"),
        (lambda m: writer("sampling", m, engine="vllm"), "engine: vllm samples where"),
        (lambda m: writer("sampling", m).write("one text"), "prompts: str was given; give a list"),
        (lambda m: writer("sampling", m).write([]), "prompts: none were given; give a list of texts"),
        (lambda m: writer("sampling", m).write([" "]), "prompts: one of them is empty; leave it out"),
        (
            lambda m: writer("sampling", m).write([[{"role": "assistant", "content": "x"}]]),
            "ends with a message of the user",
        ),
        (lambda m: writer("sampling", m).write([{"role": "user"}]), "is no prompt; give a text, or messages"),
        (lambda m: writer("sampling", m).write(["word " * 500]), "longer than the 128 positions of the model"),
    ],
)
def test_wrong_use_is_one_clear_error(call, said, loaded):
    with pytest.raises(w2sg.UserError, match=said):
        call(loaded)
