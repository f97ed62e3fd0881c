"""Losses against numbers of an independent implementation (plain Python, checked to 50 digits), against identities, and
against the faults of the published code.

Binary numbers are written in z, the student's logit difference, and w = P(first) or v = log(w / (1 - w)) of the label.
"""

import doctest
import inspect
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from w2sg import losses
from w2sg.losses import (
    cace,
    clamp_hard,
    confidence,
    cross_entropy,
    forward_kl,
    hard_logits,
    jeffreys,
    needs_soft_labels,
    needs_whole_batch,
    product,
    reverse_confidence,
    reverse_cross_entropy,
    reverse_kl,
    smooth,
    symmetric,
    takes_hard_labels,
    whole_batch,
)

CONF = Path(__file__).parents[2] / "conf" / "loss"
FORWARD = [cross_entropy, forward_kl]
REVERSE = [reverse_cross_entropy, reverse_kl]
FOUR = FORWARD + REVERSE
ALL = [
    *FOUR,
    confidence,
    reverse_confidence,
    partial(reverse_confidence, form="B"),
    product,
    cace,
    partial(cace, quantile=0.5),
    symmetric,
    jeffreys,
]
NEEDS_FINITE = [*REVERSE, reverse_confidence, partial(reverse_confidence, form="B"), symmetric, jeffreys]


def name(loss):
    options = "".join(f",{k}={v}" for k, v in loss.keywords.items()) if isinstance(loss, partial) else ""
    return getattr(loss, "func", loss).__name__ + options


def each(functions):
    return pytest.mark.parametrize("loss", functions, ids=name)


def pair(difference, dtype=torch.float64):
    """Logits [B, 2] with the given differences."""
    z = torch.as_tensor(difference, dtype=dtype)
    return torch.stack([z, torch.zeros_like(z)], -1)


def label(w):
    return pair(torch.logit(torch.tensor(w, dtype=torch.float64)))


def gradient(loss, logits, weak_logits, **options):
    """d loss_i / d logits_i, [B, C]; in the first column d/dz for pairs."""
    logits = logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits, weak_logits, **options).sum(), logits)
    return grad


def close(actual, expected, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol, check_device=False
    )


def sample(seed=0, batch=16, classes=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)).to(dtype).unbind()


# -- the four losses of arXiv 2502.11107 ------------------------------------------------------------------------------

# z, w, (ce, kl, rce, rkl), (gradients)
BINARY = [
    (
        -3.0,
        0.9,
        (2.7485873515737422, 2.423504378182294, 2.198379798846666, 2.0075148277402235),
        (-0.8525741268224333, -0.8525741268224333, -0.09926326708271564, -0.2347932462754521),
    ),
    (
        0.5,
        0.35,
        (0.7990769841801066, 0.15163034514547413, 0.8161096477447176, 0.15326232916553817),
        (0.2724593312018546, 0.2724593312018546, 0.14547651197379907, 0.26297836807459635),
    ),
    (
        4.0,
        0.01,
        (3.9781499279178094, 3.922148393562962, 4.522521395562595, 4.43242662779642),
        (0.9720137900379084, 0.9720137900379084, 0.08116225192778956, 0.15181307678095401),
    ),
]


@pytest.mark.parametrize(("z", "w", "values", "grads"), BINARY)
def test_four_losses_of_a_pair(z, w, values, grads):
    for loss, value, grad in zip(FOUR, values, grads, strict=True):
        close(loss(pair([z]), label([w])), [value])
        close(gradient(loss, pair([z]), label([w])), [[grad, -grad]])


def test_four_losses_by_hand():
    """Logits [log 3, 0] and [0, log 3] are s = 3/4 and w = 1/4: here is the arithmetic."""
    logits, weak_logits = pair([math.log(3)]), pair([-math.log(3)])
    close(cross_entropy(logits, weak_logits), [-(0.25 * math.log(0.75) + 0.75 * math.log(0.25))])
    close(reverse_cross_entropy(logits, weak_logits), [-(0.75 * math.log(0.25) + 0.25 * math.log(0.75))])
    close(forward_kl(logits, weak_logits), [0.25 * math.log(1 / 3) + 0.75 * math.log(3)])
    close(reverse_kl(logits, weak_logits), [0.75 * math.log(3) + 0.25 * math.log(1 / 3)])


def test_first_reply_is_class_zero():
    """A label for the first reply must pull the first reward up."""
    for loss in FOUR:
        grad = gradient(loss, pair([0.0]), label([0.9]))
        assert grad[0, 0] < 0 < grad[0, 1]


THREE_LOGITS = [[2.0, 0.5, -1.0], [-1.5, 3.0, 1.0]]
THREE_WEAK = [[0.6, 0.3, 0.1], [0.7, 0.2, 0.1]]
THREE = [
    (
        cross_entropy,
        [0.9913112966571571, 3.486665221851192],
        [
            [0.1855970345892759, -0.1247096078599633, -0.06088742672931255],
            [-0.6903100423333055, 0.6722621915793285, 0.018047850753976954],
        ],
    ),
    (
        forward_kl,
        [0.09336557180037741, 2.6848466693078548],
        [
            [0.1855970345892759, -0.1247096078599633, -0.06088742672931255],
            [-0.6903100423333055, 0.6722621915793285, 0.018047850753976954],
        ],
    ),
    (
        reverse_cross_entropy,
        [0.7024079883807348, 1.679123227224258],
        [
            [-0.15050653752094437, 0.08791949327067966, 0.06258704425026462],
            [-0.012814467881429438, -0.06078386539975837, 0.07359833328118788],
        ],
    ),
    (
        reverse_kl,
        [0.08082338370146036, 1.2627574943649869],
        [
            [0.14823504559468542, -0.10835783765578945, -0.03987720793889598],
            [-0.05370899127053321, 0.1831883153180064, -0.1294793240474733],
        ],
    ),
]


@pytest.mark.parametrize(("loss", "values", "grads"), THREE, ids=[name(row[0]) for row in THREE])
def test_four_losses_of_three_classes(loss, values, grads):
    logits = torch.tensor(THREE_LOGITS, dtype=torch.float64)
    weak_logits = torch.tensor(THREE_WEAK, dtype=torch.float64).log()
    close(loss(logits, weak_logits), values)
    close(gradient(loss, logits, weak_logits), grads)


def test_two_logits_are_the_sigmoid_of_their_difference():
    logits = torch.tensor([[0.3, 1.1], [2.0, -2.5]], dtype=torch.float64)
    weak_logits = torch.tensor([[0.3, 0.7], [0.45, 0.55]], dtype=torch.float64).log()
    close(cross_entropy(logits, weak_logits), [0.6111006659477777, 2.4860477448485945])
    close(forward_kl(logits, weak_logits), [0.0002363638928841727, 1.797908931135006], atol=1e-12)
    close(reverse_cross_entropy(logits, weak_logits), [0.619358902744739, 0.7963029387990876])
    close(reverse_kl(logits, weak_logits), [0.00023782169905128825, 0.7358139521128245], atol=1e-12)


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_kl_is_cross_entropy_less_entropy(classes):
    logits, weak_logits = sample(classes=classes)
    entropy_of_weak = torch.distributions.Categorical(logits=weak_logits).entropy()
    entropy_of_student = torch.distributions.Categorical(logits=logits).entropy()
    close(forward_kl(logits, weak_logits), cross_entropy(logits, weak_logits) - entropy_of_weak)
    close(reverse_kl(logits, weak_logits), reverse_cross_entropy(logits, weak_logits) - entropy_of_student)
    # the forward pair trains identically; the reverse pair does not
    close(gradient(forward_kl, logits, weak_logits), gradient(cross_entropy, logits, weak_logits))
    s = logits.softmax(-1)
    expected = s * (logits.log_softmax(-1) + entropy_of_student[:, None])
    close(gradient(reverse_kl, logits, weak_logits) - gradient(reverse_cross_entropy, logits, weak_logits), expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_arguments_exchanged(classes):
    """Reverse is forward with student and label exchanged: one argument order cannot be wrong alone."""
    a, b = sample(classes=classes)
    close(reverse_cross_entropy(a, b), cross_entropy(b, a))
    close(reverse_kl(a, b), forward_kl(b, a))
    close(jeffreys(a, b), forward_kl(a, b) + reverse_kl(a, b))
    close(jeffreys(a, b), jeffreys(b, a))


@each(ALL)
def test_swapped_replies(loss):
    """L(z, w) = L(-z, 1 - w), also for thresholds and their ties."""
    logits, weak_logits = sample(batch=9)
    close(loss(logits.flip(1), weak_logits.flip(1)), loss(logits, weak_logits))
    close(loss(torch.zeros(9, 2), weak_logits.flip(1)), loss(torch.zeros(9, 2), weak_logits))


@each(ALL)
@pytest.mark.parametrize("classes", [2, 4])
def test_order_of_examples_and_of_classes_does_not_matter(loss, classes):
    logits, weak_logits = sample(batch=9, classes=classes)
    values = loss(logits, weak_logits)
    assert values.shape == (9,)
    rows, columns = torch.randperm(9), torch.randperm(classes)
    close(loss(logits[rows], weak_logits[rows]), values[rows])
    close(loss(logits[:, columns], weak_logits[:, columns]), values)
    close(loss(logits + 3.0, weak_logits - 7.0), values)  # only differences of logits count


@each([loss for loss in ALL if loss is not product])  # its target moves with the student, but not for autograd
@pytest.mark.parametrize("classes", [2, 3])
def test_gradients_are_the_numerical_ones(loss, classes):
    logits, weak_logits = sample(batch=6, classes=classes)
    assert torch.autograd.gradcheck(lambda x: loss(x, weak_logits), logits.requires_grad_())


def test_zero_head():
    """s = 1/2: the gradients are -v/4 in reverse and 1/2 - w forward."""
    w = [0.9, 0.35, 0.6]
    zero = pair([0.0, 0.0, 0.0])
    for loss in REVERSE:
        close(gradient(loss, zero, label(w))[:, 0], [-0.5493061443340549, 0.1547598021015559, -0.10136627702704107])
    for loss in FORWARD:
        close(gradient(loss, zero, label(w))[:, 0], [-0.4, 0.15, -0.1])


def test_uninformative_label():
    """w = 1/2: reverse cross entropy is constant, reverse KL still pulls z to 0 by s (1 - s) z."""
    logits, half = pair([-2.0, 0.3, 5.0]), label([0.5, 0.5, 0.5])
    close(reverse_cross_entropy(logits, half), [math.log(2)] * 3)
    close(gradient(reverse_cross_entropy, logits, half), torch.zeros(3, 2), atol=1e-15)
    expected = [-0.20998717080701298, 0.07333749350722377, 0.03324028335395078]
    close(gradient(reverse_kl, logits, half)[:, 0], expected)


def test_wrong_side_trap():
    """A student ever surer of the wrong reply is corrected by the forward losses, hardly at all by the reverse ones."""
    logits, weak_logits = pair([2.0, 4.0, 6.0, 8.0, 10.0]), label([0.2] * 5)
    trap = {
        cross_entropy: [0.6807970779778822, 0.7820137900379085, 0.7975273768433653, 0.7996646498695337, 0.79995460213],
        reverse_cross_entropy: [0.1455520153986407, 0.024485710025602726, 0.0034193079222622526, 0.0004647380926046667,
                                6.293195228283252e-05],
        reverse_kl: [0.3555391862056537, 0.09513653487876719, 0.018218363670422545, 0.003146639458656461,
                     0.0005168900296423492],
    }  # fmt: skip
    for loss, expected in trap.items():
        close(gradient(loss, logits, weak_logits)[:, 0], expected, rtol=1e-10)


def test_reverse_kl_is_not_convex():
    z = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(reverse_kl(pair_of(z), label([0.2] * 4)).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    close(second, [0.2317097688315957, 0.25, -0.020201397694528823, -0.13418582362169734])


def pair_of(z):
    return torch.stack([z, torch.zeros_like(z)], -1)


# -- extreme logits and precision -------------------------------------------------------------------------------------

# (z, v): values of ce, kl, rce, rkl, then the gradients of ce, rce, rkl
EXTREME = {
    (100.0, -100.0): (100.0, 100.0, 100.0, 100.0, 1.0, 100 * math.exp(-100), 200 * math.exp(-100)),
    (-100.0, 3.0): (95.25741268224333, 95.06654771113688, 3.048587351573742, 3.048587351573742, -0.9525741268224333,
                    -1.1160227928062509e-43, -3.831678255301461e-42),
    (1000.0, -1000.0): (1000.0, 1000.0, 1000.0, 1000.0, 1.0, 0.0, 0.0),
    (0.0, 1000.0): (0.6931471805599453, 0.6931471805599453, 500.0, 499.30685281944005, -0.5, -250.0, -250.0),
    (50.0, 50.0): (9.83662422461598e-21, 0.0, 9.83662422461598e-21, 0.0, 0.0, -9.643749239819589e-21, 0.0),
    (20.0, -20.0): (19.999999960838082, 19.999999917553854, 19.999999960838082, 19.999999917553854, 0.9999999958776927,
                    4.122307227883699e-08, 8.244614455767397e-08),
    (-745.0, 2.0): (656.1938230935224, 655.8284892384352, 2.1269280110429727, 2.1269280110429727, -0.8807970779778824,
                    -5e-324, -2.11e-321),
    (37.5, -0.5): (23.342224920069548, 22.679377601490366, 0.9740769841801067, 0.9740769841801047, 0.6224593312018545,
                   2.587777502900934e-17, 1.96671090220471e-15),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("z", "v"), EXTREME)
def test_large_logits(z, v, dtype):
    """In relative terms, so that fp32 gradients of 1e-15 are right too; below 1e-37 fp32 has no digits to compare."""
    expected = EXTREME[z, v]
    rtol, atol = (1e-12, 1e-300) if dtype == torch.float64 else (2e-6, 1e-37)
    for logits in (pair([z], dtype), torch.tensor([[z / 2, -z / 2]], dtype=dtype)):
        weak_logits = pair([v], dtype)
        for loss, value in zip(FOUR, expected[:4], strict=True):
            close(loss(logits, weak_logits), [value], rtol=rtol, atol=atol)
        for loss, grad in zip([cross_entropy, *REVERSE], expected[4:], strict=True):
            close(gradient(loss, logits, weak_logits), [[grad, -grad]], rtol=rtol, atol=atol)


@each(ALL)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_logits_stay_finite(loss, classes, scale):
    logits, weak_logits = (scale * x for x in sample(classes=classes, dtype=torch.float32))
    assert loss(logits, weak_logits).isfinite().all()
    assert gradient(loss, logits, weak_logits).isfinite().all()
    if not (isinstance(loss, partial) and "quantile" in loss.keywords):  # labels beyond fp32 are equally sure: ties
        close(loss(logits, weak_logits), loss(logits.double(), weak_logits.double()).float(), rtol=1e-5, atol=1e-5)


def test_sure_and_wrong_student_is_corrected():
    """`F.binary_cross_entropy` of a probability has gradient exactly 0 here: sigmoid(20) is 1 in fp32."""
    close(gradient(cross_entropy, pair([20.0], torch.float32), hard_logits(torch.tensor([1]), 2)), [[1.0, -1.0]])


@each(ALL)
def test_precision(loss):
    for dtype in (torch.bfloat16, torch.float16):
        logits, weak_logits = sample(dtype=dtype)
        half = loss(logits, weak_logits)
        assert half.dtype == torch.float32
        close(half, loss(logits.float(), weak_logits.float()))
        # a student in low precision, labels stored in fp32
        assert loss(logits, weak_logits.float()).dtype == torch.float32
        assert gradient(loss, logits, weak_logits.float()).dtype == dtype
    logits, weak_logits = sample()
    assert loss(logits, weak_logits).dtype == torch.float64
    close(loss(logits.float(), weak_logits.float()).double(), loss(logits, weak_logits), rtol=1e-5, atol=1e-6)


# -- what carries gradient --------------------------------------------------------------------------------------------


@each(ALL)
def test_weak_labels_carry_no_gradient(loss):
    logits, weak_logits = (x.requires_grad_() for x in sample())
    loss(logits, weak_logits).sum().backward()
    assert weak_logits.grad is None
    assert logits.grad.abs().max() > 0


@each(REVERSE)
def test_student_is_not_detached_in_reverse(loss):
    """A ``.detach()`` copied from the forward loss would leave no gradient, or only half of the formula."""
    logits, weak_logits = sample(classes=3)
    s = logits.softmax(-1)
    r = -weak_logits.log_softmax(-1) + (logits.log_softmax(-1) if loss is reverse_kl else 0.0)
    close(gradient(loss, logits, weak_logits), s * (r - (s * r).sum(-1, keepdim=True)))


def test_own_predictions_are_detached_as_targets():
    logits, weak_logits = sample()
    s, w = logits.softmax(-1), weak_logits.softmax(-1)
    target = s * w / (s * w).sum(-1, keepdim=True)
    close(gradient(product, logits, weak_logits), s - target)
    hardened = (gradient(confidence, logits, weak_logits, alpha=1.0) - s).neg()
    close(hardened, hardened.round(), atol=1e-12)  # gradient is s - hard(s)


# -- against torch, and against faults of the published code ----------------------------------------------------------


def test_kl_is_not_halved():
    """`F.kl_div` with its default reduction divides by the classes too, and takes the reference second."""
    logits, weak_logits = sample()
    log_s, log_w = logits.log_softmax(-1), weak_logits.log_softmax(-1)
    forward = F.kl_div(log_s, log_w.exp(), reduction="batchmean")
    reverse = F.kl_div(log_w, log_s.exp(), reduction="batchmean")
    close(forward_kl(logits, weak_logits).mean(), forward)
    close(reverse_kl(logits, weak_logits).mean(), reverse)
    assert abs(forward - reverse) > 0.01


def test_cross_entropy_is_torchs():
    logits, weak_logits = sample(classes=5)
    close(cross_entropy(logits, weak_logits), F.cross_entropy(logits, weak_logits.softmax(-1), reduction="none"))
    labels = torch.arange(16) % 5
    close(cross_entropy(logits, hard_logits(labels, 5)), F.cross_entropy(logits, labels, reduction="none"))


def test_reverse_cross_entropy_takes_logits_in_both_places():
    """One published version passes label probabilities as logits and raw logits as the target."""
    logits, weak_logits = pair([0.7]), label([0.8])
    wrong = F.cross_entropy(weak_logits.softmax(-1), logits, reduction="none")
    assert not torch.isclose(reverse_cross_entropy(logits, weak_logits), wrong)
    s = 1 / (1 + math.exp(-0.7))
    close(reverse_cross_entropy(logits, weak_logits), [-s * math.log(0.8) - (1 - s) * math.log(0.2)])


# -- confidence -------------------------------------------------------------------------------------------------------

Z = [2.0, -0.5, 0.1, -1.7, 0.8, -0.9, 3.0, 0.4, -2.2, 1.1]
W = [0.8, 0.3, 0.55, 0.1, 0.45, 0.6, 0.9, 0.2, 0.05, 0.75]
HARD = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]  # s > t, t = 0.5817347: the .53 quantile of s
# alpha: batch means of confidence, reverse_confidence A, B
MEANS = {
    0.0: (0.5829463474220602, 0.5907977485775799, 0.5907977485775799),
    0.25: (0.5166963474220604, 0.5225848982887001, 0.5458479962106901),
    0.5: (0.45044634742206024, 0.45437204799982006, 0.5619734728156931),
    0.75: (0.3841963474220603, 0.38615919771094026, 0.6680766486277309),
}
# first three gradients of the batch means at alpha = 0.5
GRADIENTS = (
    [-0.0019202922022117709, 0.022754066879814547, 0.024997918747893998],
    [-0.01323774687103792, 0.028832940566480336, 0.02374683620309175],
    [-0.023069448631123382, 0.040763768720500866, 0.024174527231235234],
)
CONFIDENCE = [confidence, reverse_confidence, partial(reverse_confidence, form="B")]


def hardened(logits, weak_logits, threshold="prior"):
    """The hard target, read off the gradient s - hard(s) of the confidence term alone."""
    s = logits.softmax(-1)
    return s - gradient(confidence, logits, weak_logits, alpha=1.0, warmup=0.0, threshold=threshold)


@pytest.mark.parametrize("alpha", MEANS)
def test_confidence_losses(alpha):
    for loss, mean in zip(CONFIDENCE, MEANS[alpha], strict=True):
        close(loss(pair(Z), label(W), alpha=alpha).mean(), mean)
        close(loss(pair(Z), label(W), alpha=alpha, threshold="half").mean(), mean)  # both harden alike here


def test_confidence_gradients():
    for loss, expected in zip(CONFIDENCE, GRADIENTS, strict=True):
        close(gradient(loss, pair(Z), label(W))[:3, 0] / len(Z), expected)


def test_hardening():
    for threshold in ("prior", "half"):
        close(hardened(pair(Z), label(W), threshold)[:, 0], HARD)
    # labels that are mostly "first" move the threshold down, unless it is the median
    mostly_first = label([0.9] * 10)
    assert hardened(pair(Z), mostly_first)[:, 0].sum() > 8.5
    close(hardened(pair(Z), mostly_first, "half")[:, 0], HARD)


@pytest.mark.parametrize("threshold", ["prior", "half"])
def test_zero_head_does_not_harden_all_to_one_class(threshold):
    """Published code turns a batch of ties into one class; here every example gets the prior."""
    prior = sum(W) / 10 if threshold == "prior" else 0.5
    for value in (0.0, 1.3):
        close(hardened(pair([value] * 10), label(W), threshold)[:, 0], [prior] * 10)
    zero = torch.zeros(10, 3, dtype=torch.float64)
    weak_logits = sample(batch=10, classes=3)[1]
    expected = weak_logits.softmax(-1).mean(0) if threshold == "prior" else torch.full((3,), 1 / 3)
    close(hardened(zero, weak_logits, threshold), expected.double().expand(10, 3), rtol=1e-7)


def test_example_on_the_threshold_takes_neither_side():
    """With an odd batch the median is an example: 'first where s >= t' and 's > t' would each favour one reply."""
    close(hardened(pair([-1.0, 0.3, 2.0]), label([0.5] * 3), "half")[:, 0], [0.0, 0.5, 1.0])


def test_batch_of_one_keeps_its_label():
    close(hardened(pair([0.4]), label([0.7]))[:, 0], [0.7])
    close(confidence(pair([0.4]), label([0.7])), cross_entropy(pair([0.4]), label([0.7])))


def test_hardening_survives_saturation():
    """Probabilities above logit 17 are all 1 in fp32; their order still decides."""
    logits = pair([18.0, 19.0, 20.0, 21.0], torch.float32)
    close(hardened(logits, label([0.5] * 4).float())[:, 0], [0.0, 0.0, 1.0, 1.0], atol=1e-6)


def test_hardening_more_classes():
    # with the same spread in every class the thresholds are equal, and the largest probability wins
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).double()
    close(hardened(logits, torch.zeros(6, 3)), F.one_hot(logits.argmax(-1), 3).double(), atol=1e-7)
    # a student that always says class 0 is corrected for that, as the binary threshold corrects it
    biased = logits + torch.tensor([9.0, 0.0, 0.0])
    assert (hardened(biased, torch.zeros(6, 3)).argmax(-1) == logits.argmax(-1)).all()
    # thresholds .6, .6 and .35: no class claims the last example, which goes to its most probable one
    s = torch.tensor([[0.6, 0.05, 0.35]] * 3 + [[0.05, 0.6, 0.35]] * 3 + [[0.4, 0.35, 0.25]])
    close(hardened(s.log().double(), torch.zeros(7, 3))[-1], [1.0, 0.0, 0.0], atol=1e-7)
    # a class that no label holds is given to no example
    logits, _ = sample(batch=12, classes=3)
    target = hardened(logits, hard_logits(torch.arange(12) % 2, 3))
    close(target[:, 2], torch.zeros(12), atol=1e-12)
    close(target.sum(-1), torch.ones(12))


@each(CONFIDENCE)
def test_warm_up_has_no_jump(loss):
    logits, weak_logits = pair(Z), label(W)

    def at(progress, warmup):
        return loss(logits, weak_logits, progress, alpha=0.5, warmup=warmup)

    coefficients = {(0.0, 0.1): 0.0, (0.05, 0.1): 0.25, (0.1, 0.1): 0.5, (0.15, 0.2): 0.375, (0.2, 0.2): 0.5,
                    (1.0, 0.2): 0.5, (0.0, 0.0): 0.5}  # fmt: skip
    for (progress, warmup), coefficient in coefficients.items():
        close(at(progress, warmup), loss(logits, weak_logits, alpha=coefficient, warmup=0.0))
    step = 1e-4
    for progress in torch.linspace(0.15, 0.25, 11).tolist():
        assert (at(progress + step, 0.2) - at(progress, 0.2)).abs().max() < 20 * step


def test_reverse_confidence_forms_reduce_to_reverse_cross_entropy():
    logits, weak_logits = sample()
    for form in ("A", "B"):
        close(
            reverse_confidence(logits, weak_logits, 0.0, form=form),
            reverse_cross_entropy(logits, weak_logits),
        )


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_product():
    logits, weak_logits = sample(classes=3)
    target = (0.5 * logits + 2.0 * weak_logits).softmax(-1)
    expected = F.cross_entropy(logits, target, reduction="none")
    close(product(logits, weak_logits, alpha=2.0, beta=0.5), expected)


def test_product_of_opposite_certainties():
    """The product of probabilities is 0/0 here, and NaN in the published code."""
    logits = pair([200.0], torch.float32)
    hard = hard_logits(torch.tensor([1]), 2)
    close(product(logits, hard), [200.0])
    close(gradient(product, logits, hard), [[1.0, -1.0]])


def test_cace():
    logits, weak_logits = pair(Z), label(W)
    forward, reverse = cross_entropy(logits, weak_logits), reverse_cross_entropy(logits, weak_logits)
    distance = (torch.tensor(W) - 0.5).abs()
    close(cace(logits, weak_logits, threshold=0.22), torch.where(distance >= 0.22, forward, reverse))
    # distances .3 .2 .05 .4 .05 .1 .4 .3 .45 .25, median .275: five labels at or above it
    close(cace(logits, weak_logits, quantile=0.5), torch.where(distance > 0.275, forward, reverse))
    close(cace(logits, weak_logits, threshold=0.0), forward)
    close(cace(logits, weak_logits, threshold=0.5), reverse)
    same = label([0.6] * 10)  # labels that are all equally sure are all sure, at any quantile
    close(cace(logits, same, quantile=0.9), cross_entropy(logits, same))
    hard = hard_logits(torch.arange(10) % 2, 2)
    close(cace(logits, hard, threshold=0.5), cross_entropy(logits, hard))


def test_cace_more_classes():
    """(max w - 1/3) / (4/3): 0.05 for the first label, 0.35 for the second."""
    logits = torch.tensor(THREE_LOGITS, dtype=torch.float64)
    weak_logits = torch.tensor([[0.4, 0.3, 0.3], [0.8, 0.1, 0.1]], dtype=torch.float64).log()
    forward, reverse = cross_entropy(logits, weak_logits), reverse_cross_entropy(logits, weak_logits)
    close(cace(logits, weak_logits, threshold=0.04), forward)
    close(cace(logits, weak_logits, threshold=0.06), [reverse[0], forward[1]])
    close(cace(logits, weak_logits, threshold=0.34), [reverse[0], forward[1]])
    close(cace(logits, weak_logits, threshold=0.36), reverse)


def test_symmetric():
    logits, weak_logits = sample(classes=3)
    expected = 2 * cross_entropy(logits, weak_logits) + 0.3 * reverse_cross_entropy(logits, weak_logits)
    close(symmetric(logits, weak_logits, a=2.0, b=0.3), expected)


# -- hard labels ------------------------------------------------------------------------------------------------------


def test_hard_logits():
    logits = hard_logits(torch.tensor([2, 0]), 3)
    assert logits.tolist() == [[-math.inf, -math.inf, 0.0], [0.0, -math.inf, -math.inf]]


@each([*FORWARD, product, confidence, cace])
def test_forward_losses_are_exact_on_hard_labels(loss):
    logits = sample(dtype=torch.float32, classes=3)[0]
    labels = torch.arange(16) % 3
    for weak_logits in (hard_logits(labels, 3), torch.where(F.one_hot(labels, 3) > 0, torch.inf, 0.0)):
        values = loss(logits, weak_logits)
        assert values.isfinite().all()
        assert gradient(loss, logits, weak_logits).isfinite().all()
        if loss is not confidence:
            close(values, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-6)


@each(NEEDS_FINITE)
def test_reverse_losses_refuse_hard_labels(loss):
    with pytest.raises(ValueError, match=r"optim\.hard_label_clamp"):
        loss(pair([0.7, 0.1]), torch.tensor([[0.5, 0.0], [0.0, -torch.inf]]))


def test_the_marks_of_losses():
    assert [name(loss) for loss in ALL if not takes_hard_labels(loss)] == [name(loss) for loss in NEEDS_FINITE]
    for both in (whole_batch(needs_soft_labels(lambda x, y, _: x)), needs_soft_labels(whole_batch(lambda x, y, _: x))):
        assert needs_whole_batch(partial(both, k=1))
        assert not takes_hard_labels(partial(both, k=1))
    assert inspect.signature(reverse_confidence).parameters["form"].default == "A"


def test_cace_refuses_only_what_it_would_reverse():
    half_hard = torch.tensor([[0.0, 0.0, -torch.inf]])  # [1/2, 1/2, 0]: sureness 1/8
    with pytest.raises(ValueError, match=r"optim\.hard_label_clamp"):
        cace(torch.zeros(1, 3), half_hard, threshold=0.2)
    close(cace(torch.zeros(1, 3), half_hard, threshold=0.1), [math.log(3)], rtol=1e-6)


def test_clamp_hard():
    weak_logits = torch.cat([hard_logits(torch.tensor([0, 1]), 2).double(), pair([9.0])])
    clamped, hard = clamp_hard(weak_logits, 1e-3)
    assert hard.tolist() == [True, True, False]
    assert clamped[2].equal(weak_logits[2])  # soft labels stay, even beyond the clamp
    close(clamped[:2, 0] - clamped[:2, 1], [6.906754778648554, -6.906754778648554])
    logits = pair([0.7, 0.7])
    close(reverse_cross_entropy(logits, clamped[:2]), [2.2927461905251243, 4.616009588790596])
    close(reverse_kl(logits, clamped[:2]), [1.6572915821573826, 3.980554980422854])
    close(gradient(reverse_cross_entropy, logits, clamped[:2])[:, 0], [-1.5313164471050822, 1.5313164471050824])
    close(gradient(reverse_kl, logits, clamped[:2])[:, 0], [-1.3761174357999058, 1.6865154584102588])


def test_clamp_hard_more_classes():
    rows = torch.tensor([[-torch.inf, 0.0, -torch.inf], [torch.inf, 0.0, 1.0], [0.0, -torch.inf, 0.0]])
    clamped, hard = clamp_hard(rows.double(), 0.02)
    assert hard.all()
    expected = [[0.01, 0.98, 0.01], [0.98, 0.01, 0.01], [0.5 / 1.01, 0.01 / 1.01, 0.5 / 1.01]]
    close(clamped.softmax(-1), expected)


def test_a_broken_label_is_not_taken_for_a_hard_one():
    clamped, hard = clamp_hard(torch.tensor([[torch.nan, 0.0]]), 1e-3)
    assert clamped.isnan().any()
    assert not hard.any()
    assert reverse_kl(pair([0.0]), clamped).isnan().all()  # the trainer stops on it and names the example


def test_smooth():
    weak_logits = torch.cat([hard_logits(torch.tensor([1]), 2).double(), label([0.2]), -pair([-math.inf])])
    smoothed = smooth(weak_logits, 0.1)
    close(smoothed.softmax(-1)[:, 0], [0.05, 0.23, 0.95])
    expected = [2.018731416161884, 1.0687435369069522, 1.028294151779658]
    close(reverse_cross_entropy(pair([0.7] * 3), smoothed), expected)
    assert smooth(weak_logits, 0.0) is weak_logits
    close(smooth(hard_logits(torch.tensor([2]), 4).double(), 0.2).exp(), [[0.05, 0.05, 0.85, 0.05]])
    assert smooth(weak_logits.bfloat16(), 0.1).dtype == torch.float32


# -- the interface ----------------------------------------------------------------------------------------------------


def test_whole_batch_marks():
    assert [name(loss) for loss in ALL if needs_whole_batch(loss)] == [
        "confidence",
        "reverse_confidence",
        "reverse_confidence,form=B",
        "cace",
        "cace,quantile=0.5",
    ]
    assert needs_whole_batch(partial(partial(confidence, alpha=0.1), warmup=0.0))
    assert not needs_whole_batch(lambda logits, weak_logits, progress: logits.sum(-1))


@each([loss for loss in ALL if not needs_whole_batch(loss)])
def test_unmarked_losses_look_at_one_example_at_a_time(loss):
    logits, weak_logits = sample(batch=6)
    parts = [loss(logits[i : i + 2], weak_logits[i : i + 2]) for i in (0, 2, 4)]
    close(torch.cat(parts), loss(logits, weak_logits))


def test_marked_losses_do_depend_on_the_batch():
    logits, weak_logits = pair(Z), label(W)
    for loss in (*CONFIDENCE, partial(cace, quantile=0.5)):
        assert not torch.allclose(loss(logits[2:6], weak_logits[2:6]), loss(logits, weak_logits)[2:6])


@each(ALL)
def test_shapes_must_match(loss):
    for shapes in (((4, 2), (4, 3)), ((4, 2), (3, 2)), ((4,), (4,)), ((4, 2), (4, 1))):
        with pytest.raises(ValueError, match="same shape"):
            loss(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(confidence, threshold="prio"), r"loss\.threshold: 'prio'"),
        (partial(confidence, alpha=1.5), r"loss\.alpha"),
        (partial(reverse_confidence, form="C"), r"loss\.form: 'C'"),
        (partial(reverse_confidence, form="B", alpha=1.0), r"loss\.alpha: form B"),
        (partial(product, alpha=0.0), r"loss\.alpha"),
        (lambda _, weak_logits: clamp_hard(weak_logits, 0.0), r"optim\.hard_label_clamp"),
        (lambda _, weak_logits: clamp_hard(weak_logits, 0.7), r"optim\.hard_label_clamp"),
        (lambda _, weak_logits: smooth(weak_logits, 1.0), r"optim\.label_smoothing"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(pair(Z), label(W))


def test_examples_in_the_docstrings():
    modules = losses, losses.adaptive, losses.divergences, losses.labels, losses.marks
    results = [doctest.testmod(module, extraglobs={"torch": torch}) for module in modules]
    assert [result.failed for result in results] == [0] * 5
    assert sum(result.attempted for result in results) >= 23


# -- conf/loss --------------------------------------------------------------------------------------------------------


def test_every_loss_has_a_file():
    files = {path.stem for path in CONF.glob("*.yaml")}
    assert files == {"ce", "kl", "rce", "rkl", "conf_ce", "conf_rce", "product", "cace", "symmetric", "jeffreys"}
    targets = {OmegaConf.load(path)["_target_"].rsplit(".", 1)[1] for path in CONF.glob("*.yaml")}
    assert targets == {name(loss) for loss in ALL if not isinstance(loss, partial)}


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_config_runs_and_states_the_defaults(path):
    node = OmegaConf.to_container(OmegaConf.load(path))
    loss = instantiate(OmegaConf.load(path))
    assert isinstance(loss, partial)
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(loss.func).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {k: v for k, v in node.items() if not k.startswith("_")} == defaults
    logits, weak_logits = sample()
    close(loss(logits, weak_logits, 0.5), loss.func(logits, weak_logits, 0.5))
    lines = path.read_text().splitlines()
    for above, line in pairwise(lines):
        assert line.startswith("#") or above.startswith("#"), f"no comment over {line}"
