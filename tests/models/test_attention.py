"""Which mask each kernel of attention is given, what is kept of it, and which attention is refused."""

import contextlib
import logging

import numpy as np
import pytest
import torch
import transformers as T
from architectures import (
    BOTH,
    FAMILIES,
    IDS,
    MAX_LENGTH,
    VOCABULARY,
    WINDOW,
    Plain,
    rewards,
    spec,
)
from torch.utils._python_dispatch import TorchDispatchMode

from w2sg.config.machine import attention_problems
from w2sg.config.schema import TrainerConfig
from w2sg.data import blocks, masks
from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.models.activations import in_one_kernel
from w2sg.models.attention import attention_of, implementation, in_words, on_any_device
from w2sg.models.packing import keeps_replies_apart, said_apart, separates_texts
from w2sg.models.policy import load_policy
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find

WINDOWED = ["gemma3", "mistral", "olmo3", "phi3", "qwen2 (window)", "starcoder2", "llama4"]
FLEXIBLE = [*WINDOWED, "gemma2", "gpt2", "gpt_neox", "opt"]
ALWAYS = {"gemma3", "llama4", "gpt2"}  # a window in some layers, chunks, positions in a table
NARROW = {"gpt2": {"n_positions": 20}, "opt": {"max_position_embeddings": 20}}  # learned, and just as many as are read


def body(family, attention="sdpa", **changes):
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(T, kind)(**{**settings, **changes})
    return T.AutoModel.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def rows(*lengths, packed=False):
    """A batch of single texts, or of pairs that share their first 3 tokens."""
    texts = [np.random.default_rng(k).integers(3, VOCABULARY, length).tolist() for k, length in enumerate(lengths)]
    if packed:
        texts = [texts[0][:3] + text[3:] for text in texts]
    examples = [("a", "b")] * (len(texts) // 2) if packed else [("a",)] * len(texts)
    return texts, pack(examples, lambda _: texts, MAX_LENGTH).collate(range(len(examples)))


class Waits(TorchDispatchMode):
    """How often the host has to know a number that a device computes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def kernel(monkeypatch):
    """What each call of SDPA is given: (mask, is_causal)."""
    calls, usual = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **rest):
        calls.append((attn_mask, is_causal))
        return usual(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen2"])
def test_single_texts_take_the_causal_kernel_and_nobody_waits(family, kernel):
    model, (texts, batch) = body(family, **NARROW.get(family, {})), rows(20, 7, 13)
    with Waits() as waits:
        states = masks.run_backbone(model, batch).last_hidden_state
    assert waits.count == 0
    assert kernel == [(None, True)] * 2
    for row, text in enumerate(texts):
        alone = model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(text)], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_shorter_than_the_texts_is_one_mask_for_all_rows(kernel):
    model, (_, batch) = body("gemma3"), rows(20, 7, 13)
    masks.run_backbone(model, batch)
    (window, _), (full, causal) = kernel
    assert full is None
    assert causal
    assert window.shape == (3, 1, 20, 20)
    assert window.untyped_storage().nbytes() == 20 * 24 * 4
    seen = [(k <= q) and (k > q - WINDOW) for q in range(20) for k in range(20)]
    assert (window[1, 0] == 0).flatten().tolist() == seen
    kernel.clear()
    masks.run_backbone(model, rows(WINDOW - 1, 3)[1])
    assert [mask for mask, _ in kernel] == [None, None]


@contextlib.contextmanager
def kept(length):
    """Masks that a forward keeps for its backward pass."""
    found = []

    def keep(tensor):
        if tensor.ndim == 4 and tensor.shape[-2:] == (length, length):
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("autocast", [False, True])
def test_one_mask_is_kept_for_all_layers_of_a_kind(autocast, monkeypatch):
    """SDPA makes a float mask of a boolean one in each layer, and keeps each: 4 where this is 1."""
    model = body("llama", num_hidden_layers=4).train()
    _, batch = rows(19, 14, 17, 9, packed=True)
    length = batch["input_ids"].shape[1]
    sight, found, kept_masks = masks.sight(batch["segments"]), [], []
    for as_it_is in (False, True):
        if as_it_is:
            monkeypatch.setattr(masks, "additive", lambda mask, dtype: mask)
        with kept(length) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(masks.run_backbone(model, batch, sight).last_hidden_state)
        kept_masks.append(saved)
    ours, theirs = ({m.untyped_storage().data_ptr() for m in saved} for saved in kept_masks)
    assert len(ours) == 1
    assert len(theirs) == 4
    mask = kept_masks[0][0]
    assert mask.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert length % 8
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert torch.equal(*found)


def test_each_kind_of_layer_has_its_mask():
    model = body("gemma3", num_hidden_layers=4, layer_types=BOTH["layer_types"] * 2)
    _, batch = rows(19, 14, packed=True)
    with kept(batch["input_ids"].shape[1]) as saved:
        masks.run_backbone(model, batch, masks.sight(batch["segments"]))
    assert len({mask.untyped_storage().data_ptr() for mask in saved}) == 2


# -- FlexAttention ----------------------------------------------------------------------------------------------------


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention on a CPU, where it has no backward pass, without a compiler; its masks are noted."""
    from torch.nn.attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", _uncompiled)
    monkeypatch.setattr(blocks, "DEVICES", {"cpu"})
    monkeypatch.setattr(blocks, "LEAST", 0)
    monkeypatch.setattr(blocks, "_TRIED", {})
    made, usual = [], blocks.mask

    def noted(*args, **rest):
        made.append(usual(*args, **rest))
        return made[-1]

    monkeypatch.setattr(blocks, "mask", noted)
    return made


def _uncompiled(query, key, value, training=False, **rest):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, **rest)


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in ALWAYS else pytest.mark.slow) for family in FLEXIBLE]
)
@torch.no_grad()
def test_every_attention_reads_shared_rows_as_texts_alone(family, folder, flex):
    """Rewards of texts longer than the window, packed, are those of plain transformers, which reads each alone."""
    from torch.nn.attention.flex_attention import BlockMask

    plain = Plain(folder(family))
    for attention in ("sdpa", "eager", "flex_attention"):
        assert rewards(folder(family), plain, attention=attention).kind == "packed"
    assert any(isinstance(mask, BlockMask) for mask in flex)


@torch.no_grad()
def test_block_masks_are_for_shared_rows_alone(folder, flex, kernel, monkeypatch):
    source = find(spec(folder("llama"), attention="flex_attention"), "strong")
    scorer, policy = load_language_model(source, True, 2), load_policy(source, trainable=False)
    assert separates_texts(scorer, VOCABULARY, MAX_LENGTH)
    assert keeps_replies_apart(policy, MAX_LENGTH)
    assert "w2sg" not in scorer.model.config.to_json_string()  # a saved model is anybody's
    kernel.clear()
    flex.clear()
    scorer(rows(20, 7, 13)[1])
    assert flex == [None]
    assert kernel == [(None, True)] * 2
    for name, value in (("LEAST", 256), ("DEVICES", {"cuda"})):  # short rows; the same model on a CPU
        kernel.clear()
        with monkeypatch.context() as patch:
            patch.setattr(blocks, name, value)
            scorer(rows(12, 14, packed=True)[1])
        assert [mask.dtype for mask, _ in kernel] == [torch.float32] * 2


def test_a_kernel_that_does_not_work_here_is_said_and_not_used(folder, monkeypatch, caplog):
    for name, value in (("SAID", []), ("DEVICES", {"cpu"}), ("LEAST", 0)):
        monkeypatch.setattr(blocks, name, value)
    scorer = load_language_model(find(spec(folder("llama"), attention="flex_attention"), "strong"), True, 2)
    for outcome in (RuntimeError("no triton\nmore"), 0.5):

        def tried(*_, outcome=outcome):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(blocks, "_difference", tried)
        monkeypatch.setattr(blocks, "_TRIED", {})
        with caplog.at_level(logging.WARNING):
            assert separates_texts(scorer, VOCABULARY, MAX_LENGTH)
    assert [line.split("(")[1].split(")")[0] for line in blocks.SAID] == ["no triton", "its numbers are off by 50.0%"]
    assert caplog.text.count("read by SDPA with a mask") == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "llama4"])
def test_on_a_gpu_flex_attention_trains_as_sdpa_does(family, folder, monkeypatch):
    monkeypatch.setattr(blocks, "LEAST", 0)
    found = []
    for attention in ("flex_attention", "sdpa"):
        torch.manual_seed(0)
        scorer = load_language_model(find(spec(folder(family), attention=attention), "strong"), True, 2).cuda()
        for lengths in ((24, 30), (24, 30, 17, 9), (40, 33, 12, 50, 20, 20)):  # a kernel is compiled for several shapes
            batch = {name: value.cuda() for name, value in rows(*lengths, packed=True)[1].items()}
            scores = scorer(batch)
            scores.square().sum().backward()
        found.append((scores, torch.cat([w.grad.flatten() for w in scorer.parameters() if w.grad is not None])))
    assert not blocks.SAID
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


# -- the option -------------------------------------------------------------------------------------------------------


def test_auto_is_what_model_and_machine_have(folder, monkeypatch):
    def chosen(config, **changes):
        return attention_of(config, spec("x", **{"attention": "auto", **changes}), "strong")[0]

    names = ("llama", "gpt2", "stablelm", "gemma2")
    llama, _, stablelm, gemma2 = configs = [getattr(T, FAMILIES[name][0])(**FAMILIES[name][1]) for name in names]
    assert [chosen(config) for config in configs] == ["sdpa", "sdpa", "sdpa", "eager"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen(config) for config in configs] == ["flex_attention", "flex_attention", "sdpa", "eager"]
    assert [in_words("flex_attention", torch.device(kind)) for kind in ("cpu", "cuda")] == ["sdpa", "flex_attention"]
    assert chosen(llama, dropout=0.1) == "sdpa"
    assert chosen(llama, attention="sdpa") == "sdpa"
    assert implementation(llama, "flex_attention") == blocks.NAME
    assert implementation(gemma2, "flex_attention") == "flex_attention"  # with its softcap, which SDPA has not
    with pytest.raises(UserError, match="StableLmForCausalLM has no flex_attention; use strong"):
        chosen(stablelm, attention="flex_attention")
    llama4 = T.Llama4TextConfig(**FAMILIES["llama4"][1])
    with pytest.raises(UserError, match="has no flash attention; use strong"):
        chosen(llama4, attention="flash_attention_2")


def test_what_a_machine_cannot_do_is_refused_with_the_remedy(monkeypatch):
    kernel, cpu = "kernels-community/flash-attn3", TrainerConfig(accelerator="cpu")
    (line,) = attention_problems("strong", spec("x", attention="flex_attention"), TrainerConfig())
    assert "needs a CUDA GPU" in line
    assert "use strong.attention=auto" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_problems("strong", spec("x", attention="flex_attention"), TrainerConfig()) == []
    (line,) = attention_problems("strong", spec("x", attention=kernel), TrainerConfig(precision="32-true"))
    assert "trainer.precision=bf16-mixed or strong.dtype=bfloat16" in line
    assert attention_problems("strong", spec("x", attention=kernel, dtype="bfloat16"), TrainerConfig()) == []
    assert attention_problems("strong", spec("x", attention=kernel), cpu)
    assert attention_problems("strong", spec("x", attention="auto"), cpu) == []


def test_a_kernel_without_masks_reads_a_row_for_each_text(folder):
    name = "kernels-community/flash-attn3"
    source = find(spec(folder("llama"), attention=name), "strong")
    assert f"attention={name} takes no mask" in said_apart(source)
    policy = load_policy(find(spec(folder("llama")), "strong"), trainable=False)
    config = policy.plain.config
    config._attn_implementation = name  # on a GPU it would be loaded
    assert not keeps_replies_apart(policy, MAX_LENGTH)  # on the CPU where it lies
    with on_any_device(policy.plain):
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == name


# -- activations ------------------------------------------------------------------------------------------------------


def kept_bytes(model, tokens=16):
    """Bytes that a forward keeps for its backward pass, besides weights."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=torch.arange(tokens)[None], use_cache=False).last_hidden_state
    return sum(size for size, _ in sizes.values()), out


def test_the_activation_of_gpt2_keeps_two_fifths_less():
    model = T.GPT2Model(T.GPT2Config(**IDS, n_embd=256, n_layer=2, n_head=4, n_positions=32)).eval()
    before, expected = kept_bytes(model)
    in_one_kernel(model)
    after, states = kept_bytes(model)
    assert after <= 0.6 * before
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-6)
    assert model.config.activation_function == "gelu_new"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "codegen", "bloom", "phi"])
def test_no_model_keeps_more_than_one_tensor_of_an_activation(family, folder):
    model = load_language_model(find(spec(folder(family)), "strong"), True, 2)
    names = {type(module).__name__ for module in model.modules()}
    assert "GELU" in names
    assert not names & {"NewGELUActivation", "FastGELUActivation", "BloomGelu"}
