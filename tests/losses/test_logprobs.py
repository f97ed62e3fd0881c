"""Chunked log-probabilities against log-softmax of whole logits, against finite differences, and against the memory and
the products that they must not use."""

import doctest
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from w2sg.errors import UserError
from w2sg.losses import logprobs
from w2sg.losses.logprobs import position_kl, token_logprobs, top_tokens

M, D, V = 11, 5, 23
CHUNKS = [1, 4, 11, 256]  # 4 does not divide 11

# Six positions of two rows over seven tokens, with what an independent implementation (plain Python) makes of them.
LOGITS = [
    [
        [1.2858065337, 0.1045404564, 0.9914326351, -1.2037129192, -1.1671500681, -1.0537747053, 0.9098097738],
        [-2.5914709108, -1.7174445045, 0.0078647672, 0.2101046074, -0.4693648040, -0.8564025193, -0.2171771597],
        [-0.6566263907, -2.4049228931, -0.5030933226, 0.0806368335, 2.0764111628, 0.6027996078, -0.1795344506],
        [-0.6778950595, 0.0312392731, -0.7687911191, 0.6774303619, -0.7396714326, 0.5713468233, 0.1782139985],
        [0.5963750861, 1.1437051458, -2.0906577740, 0.8819550626, -1.0543378592, -0.5794672713, 1.3796122692],
        [1.1686325538, 0.5237707675, 0.0798363691, 0.2995676332, -1.0834308346, -0.0559782087, 0.1347339107],
    ],
    [
        [0.0429201855, -1.0723813007, 0.4459038526, -1.0025014654, 0.5128644282, -1.8441144359, 0.3459937780],
        [1.6043334530, -0.2395297286, -0.4298375159, 0.6253514909, -0.7911953547, 1.2376624158, 2.5755464782],
        [0.3917733175, 0.7518482273, -0.4064743888, 1.1759194962, -0.8324789473, 0.3986613278, -0.1581596525],
        [-0.0495344521, -0.6312103509, 1.5610642111, -1.1184389123, -1.8109843476, 0.6892850638, -0.0903734995],
        [0.7767391323, -0.0448955060, -0.9214690907, 1.0709740965, 0.6367895099, 0.8294670789, 0.2955959011],
        [-0.7962761296, -1.3588065125, -1.4065447399, -0.6908398861, -0.1718275487, 0.3831965378, -0.9920037557],
    ],
]
LABELS = [[-100, -100, 3, 5, 1, -100], [-100, 2, 2, 6, 0, 4]]
PER_TOKEN = [
    [-1.2603036058713, -1.9572288082588916, -1.972239272617911],
    [-1.4345585905093197, -3.6614479493700487, -2.488957657538268, -2.3158363488051954, -1.8458686456948037],
]
SUMS = [-5.189771686748102, -11.746669191917636]


def case(dtype=torch.float64, trained=("hidden", "weight", "bias"), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(name, *shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(name in trained)

    parts = draw("hidden", M, D), draw("weight", V, D), draw("bias", V)
    return *parts, torch.randint(V, (M,), generator=generator)


def plain_logits(hidden, weight, bias, softcap=None):
    logits = (hidden @ weight.T).double()
    logits = logits if bias is None else logits + bias.double()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain(hidden, weight, bias, targets, softcap=None):
    whole = plain_logits(hidden, weight, bias, softcap).log_softmax(-1)
    return whole[torch.arange(len(targets)), targets]


# inference mode hands matmul on whole
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.matmul, torch.ops.aten.addmm, torch.ops.aten.addmm_}


class Watch(TorchDispatchMode):
    """The size of the largest tensor that any operation makes, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        self.products += function.overloadpacket in PRODUCTS
        return out


def test_the_examples_of_the_docstrings():
    result = doctest.testmod(logprobs, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1])
def test_numbers_of_an_independent_implementation(rows):
    """Position t predicts label t + 1; labels of -100 are left out before the output layer is applied."""
    weight = torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = torch.linalg.solve(weight, torch.tensor(LOGITS[rows], dtype=torch.float64).T).T  # states with these logits
    labels = torch.tensor(LABELS[rows])[1:]
    asked = labels != -100
    found = token_logprobs(hidden[:-1][asked], weight, labels[asked], chunk=2)
    torch.testing.assert_close(found, torch.tensor(PER_TOKEN[rows], dtype=torch.float64), rtol=0, atol=1e-8)
    assert float(found.sum()) == pytest.approx(SUMS[rows], abs=1e-8)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight", "bias")])
def test_values_and_gradients_of_whole_logits(chunk, softcap, with_bias, trained):
    hidden, weight, bias, targets = case(torch.float32, trained)
    bias = bias if with_bias else None
    upstream = torch.linspace(-2.0, 3.0, M)  # a different factor per position, 0 excluded
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]

    expected = plain(hidden, weight, bias, targets, softcap)
    slopes = torch.autograd.grad((expected * upstream).sum(), leaves)
    found = token_logprobs(hidden, weight, targets, bias, chunk, softcap)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)
    for leaf, mine, right in zip(leaves, torch.autograd.grad((found * upstream).sum(), leaves), slopes, strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")]
)
def test_finite_differences(trained):
    hidden, weight, bias, targets = case(trained=trained)

    def found(hidden, weight, bias):
        return token_logprobs(hidden, weight, targets, bias, chunk=4)

    assert torch.autograd.gradcheck(found, (hidden, weight, bias))


def test_a_parameter_gets_its_gradient():
    hidden, weight, _, targets = case(torch.float32)
    layer = nn.Linear(D, V, bias=False)
    layer.weight.data.copy_(weight.detach())
    token_logprobs(hidden, layer.weight, targets).sum().backward()
    expected = torch.autograd.grad(plain(hidden, weight, None, targets).sum(), weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-5)


# -- precision -------------------------------------------------------------------------------------------------------


def test_log_softmax_of_bf16_logits_is_in_fp32():
    """Through an identity the logits of bf16 states are exact, so that only log-softmax could round."""
    exact = torch.randn(M, V, generator=torch.Generator().manual_seed(2)).bfloat16()
    targets = torch.arange(M)
    hidden = exact.clone().requires_grad_()
    found = token_logprobs(hidden, torch.eye(V, dtype=torch.bfloat16), targets, chunk=4)
    right = exact.double().log_softmax(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right[targets, targets], rtol=0, atol=1e-6)
    found.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), torch.eye(V)[:M].double() - right.exp(), rtol=0, atol=2**-8)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
def test_bf16_gradients_are_near_those_of_the_same_numbers_in_fp64(trained):
    narrow = case(torch.bfloat16, trained)
    wide, targets = [x.detach().double().requires_grad_(x.requires_grad) for x in narrow[:3]], narrow[3]
    token_logprobs(narrow[0], narrow[1], targets, narrow[2], chunk=4).sum().backward()
    plain(*wide, targets).sum().backward()
    for mine, right in zip(narrow[:3], wide, strict=True):
        if right.requires_grad:
            assert mine.grad.dtype == torch.bfloat16
            error = (mine.grad.double() - right.grad).norm() / right.grad.norm()
            assert error < 0.02
        else:
            assert mine.grad is None


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize(
    ("softcap", "around_backward"),
    [(None, False), (None, True), (1.5, False)],  # the softcap leaves its backward pass to autograd, as any layer does
)
def test_autocast_changes_nothing(trained, softcap, around_backward):
    found = []
    for forward, backward in [(False, False), (True, around_backward)]:
        hidden, weight, bias, targets = case(torch.float32, trained)
        with torch.autocast("cpu", torch.bfloat16) if forward else nullcontext():
            values = token_logprobs(hidden, weight, targets, bias, 4, softcap)
        with torch.autocast("cpu", torch.bfloat16) if backward else nullcontext():
            values.sum().backward()
        found.append([values.detach(), *(x.grad for x in (hidden, weight, bias) if x.requires_grad)])
    assert all(torch.equal(mine, right) for mine, right in zip(*found, strict=True))


def test_autocast_changes_no_measure():
    hidden, weight, bias, _ = case(torch.float32, ())
    other = case(torch.float32, (), seed=1)[0]

    def measures():
        kl = position_kl(hidden, weight, other, weight, bias, bias, 4)
        return kl, top_tokens(hidden, weight, bias, 4)

    expected = measures()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(mine, right) for mine, right in zip(measures(), expected, strict=True))


class Gpu(TorchDispatchMode):
    """A device whose products of bf16 numbers are in fp32, which no CPU is; notes what it multiplies."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            self.products.append({x.dtype for x in args if isinstance(x, torch.Tensor)})  # fp32: what is added to
        if function is torch.ops.aten.mm.dtype:
            return args[0].float() @ args[1].float()
        if function is torch.ops.aten.addmm.dtype:
            return args[0] + args[1].float() @ args[2].float()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_under_autocast_a_gpu_multiplies_bf16_into_fp32(trained, softcap, monkeypatch):
    """All products of a forward and its backward have operands in bf16; values are near those of fp32 weights."""
    right = case(torch.float64, trained)
    plain(*right, softcap).sum().backward()
    mine = [x.detach().float().requires_grad_(x.requires_grad) for x in right[:3]]
    monkeypatch.setattr(logprobs, "WIDE_RESULTS", {"cpu"})
    with Gpu() as gpu:
        with torch.autocast("cpu", torch.bfloat16):
            found = token_logprobs(mine[0], mine[1], right[3], mine[2], 4, softcap)
        found.sum().backward()
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())  # as it would be of logits that were rounded
    torch.testing.assert_close(found.double(), plain(*right, softcap), rtol=0, atol=0.03)
    for ours, exact in zip(mine, right, strict=False):
        if exact.requires_grad:
            assert ours.grad.dtype == torch.float32
            assert (ours.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()
    # of each chunk: logits, logits again, and both gradients; where the layer is frozen its one is made at once
    assert len(gpu.products) == 3 * ((2 if softcap is None else 3) if len(trained) == 1 else 4)
    assert all(torch.bfloat16 in product for product in gpu.products)


def test_logits_of_bf16_weights_that_are_written_by_are_not_rounded_on_a_gpu(monkeypatch):
    import transformers

    from w2sg.models.policy import Policy

    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    torch.manual_seed(0)
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    states = 20 * torch.randn(2, 3, 16).bfloat16()
    rounded = policy.logits(states)
    monkeypatch.setattr(logprobs, "WIDE_RESULTS", {"cpu"})
    with torch.no_grad(), Gpu():
        exact = policy.logits(states)
    assert exact.shape == rounded.shape == (2, 3, 40)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16().float(), rounded)
    assert not torch.equal(exact, rounded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_gpu_does_what_was_played_here(trained, softcap):
    right = case(torch.float64, trained)
    plain(*right, softcap).sum().backward()
    mine = [x.detach().float().cuda().requires_grad_(x.requires_grad) for x in right[:3]]
    with torch.autocast("cuda", torch.bfloat16):
        found = token_logprobs(mine[0], mine[1], right[3].cuda(), mine[2], 4, softcap)
    found.sum().backward()
    torch.testing.assert_close(found.double().cpu(), plain(*right, softcap), rtol=0, atol=0.03)
    for ours, exact in zip(mine, right, strict=False):
        if exact.requires_grad:
            assert (ours.grad.double().cpu() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_far_apart_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    found = token_logprobs(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([1, 1]))
    assert found.tolist() == [-1e4, 0.0]
    found.sum().backward()
    assert hidden.grad.tolist() == [[-1.0], [0.0]]


# -- what is not done ------------------------------------------------------------------------------------------------

LONG, WIDE, NARROW, CHUNK = 60, 400, 8, 4  # positions, vocabulary, width: whole logits would be 24,000 numbers
BOUND = WIDE * NARROW  # the output layer itself: 3,200; a chunk of logits has 1,600


def long_case(weight_trained):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(LONG, NARROW, generator=generator, requires_grad=True)
    weight = torch.randn(WIDE, NARROW, generator=generator, requires_grad=weight_trained)
    return hidden, weight, torch.randint(WIDE, (LONG,), generator=generator)


@pytest.mark.parametrize("weight_trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_whole_logits_are_never_made(weight_trained, softcap):
    hidden, weight, targets = long_case(weight_trained)
    with Watch() as watch:
        token_logprobs(hidden, weight, targets, chunk=CHUNK, softcap=softcap).sum().backward()
    assert CHUNK * WIDE <= watch.largest <= BOUND


def test_whole_logits_would_have_been_seen():
    hidden, weight, targets = long_case(False)
    with Watch() as watch:
        plain(hidden, weight, None, targets).sum().backward()
    assert watch.largest == LONG * WIDE


def test_measures_never_make_whole_logits():
    hidden, weight, _ = long_case(True)
    with Watch() as watch:
        found = [
            position_kl(hidden, weight, hidden, weight, chunk=CHUNK),
            top_tokens(hidden, weight, chunk=CHUNK),
        ]
    assert watch.largest <= BOUND
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("weight_trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_logits_are_kept_for_the_backward_pass(weight_trained, softcap):
    hidden, weight, targets = long_case(weight_trained)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(hidden, weight, targets, chunk=CHUNK, softcap=softcap)
    # by chunk, none may hold logits of its own: states, targets and the layer, all counted once
    assert sum(kept.values()) <= 2 * LONG * NARROW + 4 * LONG + BOUND


def test_a_frozen_output_layer_is_not_applied_again():
    hidden, weight, targets = long_case(False)
    with Watch() as forward:
        found = token_logprobs(hidden, weight, targets, chunk=CHUNK)
    assert forward.products == 2 * LONG / CHUNK  # logits, and p W
    with Watch() as backward:
        found.sum().backward()
    assert backward.products == 0
    assert backward.largest == LONG * NARROW


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_logits_are_made(mode):
    hidden, weight, targets = long_case(False)
    with mode(), Watch() as watch:
        found = token_logprobs(hidden, weight, targets, chunk=CHUNK)
    assert watch.products == LONG / CHUNK
    assert not found.requires_grad


def test_only_the_gradients_asked_for_are_made():
    hidden, weight, targets = long_case(True)
    with Watch() as watch:
        token_logprobs(hidden.detach(), weight, targets, chunk=CHUNK).sum().backward()
    assert watch.products == 3 * LONG / CHUNK  # logits, logits again, and the gradient to the weight
    assert hidden.grad is None


# -- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
def test_no_positions(softcap, trained):
    """A rank whose share of a batch is empty still takes part in the backward pass."""
    _, weight, bias, _ = case(torch.float32, trained)
    hidden = torch.zeros(0, D, requires_grad=True)
    found = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), bias, 4, softcap)
    assert found.shape == (0,)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert hidden.grad.shape == (0, D)
    if "weight" in trained:
        assert not weight.grad.any()
        assert not bias.grad.any()


def test_no_positions_to_measure():
    _, weight, bias, _ = case(torch.float32, ())
    nothing = torch.zeros(0, D)
    found = position_kl(nothing, weight, nothing, weight, bias, bias)
    assert found.shape == (0,)
    assert found.dtype == torch.float32
    assert top_tokens(nothing, weight, bias).dtype == torch.long


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_positions(chunk):
    hidden, weight, bias, targets = case()
    with pytest.raises(UserError, match="chunk"):
        token_logprobs(hidden, weight, targets, bias, chunk)
    with pytest.raises(UserError, match="chunk"):
        top_tokens(hidden, weight, bias, chunk)


# -- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_divergence_of_two_models_of_different_width(chunk, softcap):
    hidden, weight, bias, _ = case(torch.float32, ())
    generator = torch.Generator().manual_seed(4)
    wider, its_weight = torch.randn(M, 9, generator=generator), torch.randn(V, 9, generator=generator)
    p = Categorical(logits=plain_logits(hidden, weight, bias, softcap))
    q = Categorical(logits=plain_logits(wider, its_weight, None, softcap))
    found = position_kl(hidden, weight, wider, its_weight, bias, None, chunk, softcap)
    torch.testing.assert_close(found, kl_divergence(p, q).float(), rtol=1e-5, atol=1e-5)
    back = position_kl(wider, its_weight, hidden, weight, None, bias, chunk, softcap)
    torch.testing.assert_close(back, kl_divergence(q, p).float(), rtol=1e-5, atol=1e-5)


def test_no_divergence_from_itself():
    hidden, weight, bias, _ = case(torch.float32)
    assert not position_kl(hidden, weight, hidden, weight, bias, bias, 4).any()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_likeliest_tokens(chunk):
    hidden, weight, _, _ = case(torch.float32)
    bias = torch.zeros(V)
    expected = plain_logits(hidden, weight, None).argmax(-1)
    assert torch.equal(top_tokens(hidden, weight, bias, chunk), expected)
    assert len(expected.unique()) > 3
    bias[17] = 100.0
    assert top_tokens(hidden, weight, bias, chunk).tolist() == [17] * M
