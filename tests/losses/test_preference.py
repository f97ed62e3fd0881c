"""The DPO family against numbers of an independent implementation (plain Python), against identities of the papers, and
at the margins where trainers have failed."""

import doctest
import inspect
import math

import pytest
import torch
from torch import tensor

from w2sg.errors import UserError
from w2sg.losses import preferences as preference
from w2sg.losses.preferences import (
    LOSSES,
    REFERENCE_FREE,
    auxiliary_confidence,
    displaced,
    hinge,
    ipo,
    ipo_mean,
    options_of,
    reference_free,
    reward_metrics,
    rewards,
    robust,
    sigmoid,
    sigmoid_norm,
    simpo,
    supervised,
    wspo,
)

POLICY = tensor([[-12.3, -15.1], [-40.5, -39.0], [-7.7, -20.2], [-101.2, -99.9]], dtype=torch.float64)
REFERENCE = tensor([[-13.0, -14.0], [-41.5, -41.0], [-7.7, -19.2], [-100.0, -104.0]], dtype=torch.float64)
LENGTHS = tensor([[10, 12], [25, 20], [6, 15], [64, 60]])
PER_TOKEN = {"ipo_mean", "sigmoid_norm", "simpo"}

# dmean: gradient of the mean loss to the log-probability of the chosen reply; minus that to the rejected one's
SIGMOID = {
    0.1: {
        "losses": [0.607191724840782, 0.7443966600735709, 0.6443966600735709, 0.9928562535503842],
        "dmean": [-0.0113780276906605, -0.0131244796869735, -0.011875520313026501, -0.01573707779918487],
        "chosen": [0.07, 0.1, 0.0, -0.12],
        "rejected": [-0.11, 0.2, -0.1, 0.41],
        "margins": [0.18, -0.1, 0.1, -0.53],
    },
    0.5: {
        "losses": [0.34115387473208797, 0.9740769841801067, 0.4740769841801067, 2.7182670736825028],
        "dmean": [-0.03613131217187452, -0.07780741640023182, -0.04719258359976818, -0.11675137381359764],
        "chosen": [0.35, 0.5, 0.0, -0.6],
        "rejected": [-0.55, 1.0, -0.5, 2.05],
        "margins": [0.9, -0.5, 0.5, -2.65],
    },
}
OTHERS = {
    "cdpo": (
        sigmoid,
        {"beta": 0.1, "label_smoothing": 0.1},
        [0.625191724840782, 0.7343966600735709, 0.6543966600735709, 0.9398562535503843],
    ),
    "robust": (
        robust,
        {"beta": 0.1, "label_smoothing": 0.1},
        [0.5846917248407819, 0.7568966600735708, 0.6318966600735709, 1.0591062535503841],
    ),
    "hinge": (hinge, {"beta": 0.1}, [0.82, 1.1, 0.9, 1.53]),
    "ipo": (ipo, {"beta": 0.1}, [10.24, 36.0, 16.0, 106.09]),
    "ipo_mean": (ipo_mean, {"beta": 0.1}, [23.40946944444445, 25.6036, 24.33777777777778, 25.878416840277776]),
    "sigmoid_norm": (
        sigmoid_norm,
        {"beta": 5.0},
        [0.3685245395260501, 0.8543552444685272, 0.5403055746894084, 0.9343691000343728],
    ),
    "reference_free": (
        reference_free,
        {"beta": 0.1},
        [0.5629153335603465, 0.7709570477895321, 0.2519290813453729, 0.7602581946816904],
    ),
    "simpo": (
        simpo,
        {"beta": 2.0, "target_margin": 0.5},
        [1.2721534457876724, 0.877528111454829, 1.2222685610975361, 1.1936373398610216],
    ),
}


def approx(values):
    return pytest.approx(values, rel=1e-9, abs=1e-9)


def at_margin(z, beta, dtype=torch.float64):
    """Pairs whose z = beta D has these values: policy (that wants a gradient), reference, lengths."""
    policy = tensor([[v / beta - 3.0, -5.0] for v in z], dtype=dtype).requires_grad_()
    return policy, tensor([[-3.0, -5.0]], dtype=dtype).expand(len(z), 2), torch.ones(len(z), 2, dtype=torch.long)


def slopes(loss, policy, *rest, **options):
    """Gradient of each pair's loss to the policy's two log-probabilities."""
    leaf = policy.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **options).sum(), leaf)[0]


def test_the_examples_of_the_docstrings():
    result = doctest.testmod(preference, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", SIGMOID)
def test_dpo(beta):
    expected = SIGMOID[beta]
    policy = POLICY.clone().requires_grad_()
    found = sigmoid(policy, REFERENCE, LENGTHS, beta=beta)
    assert found.tolist() == approx(expected["losses"])
    found.mean().backward()
    assert policy.grad[:, 0].tolist() == approx(expected["dmean"])
    assert policy.grad[:, 1].tolist() == approx([-x for x in expected["dmean"]])


@pytest.mark.parametrize("name", OTHERS)
def test_the_family(name):
    loss, options, expected = OTHERS[name]
    assert loss(POLICY, REFERENCE, LENGTHS, **options).tolist() == approx(expected)


def test_gradients_of_cdpo():
    found = slopes(sigmoid, POLICY, REFERENCE, LENGTHS, beta=0.1, label_smoothing=0.1)
    to_z = [-0.35512110762641996, -0.42497918747894003, -0.37502081252106, -0.5294831119673947]
    assert (found[:, 0] / 0.1).tolist() == approx(to_z)
    assert (found[:, 1] / 0.1).tolist() == approx([-x for x in to_z])


@pytest.mark.parametrize("beta", SIGMOID)
def test_rewards_and_metrics(beta):
    expected = SIGMOID[beta]
    both = rewards(POLICY, REFERENCE, beta)
    assert both[:, 0].tolist() == approx(expected["chosen"])
    assert both[:, 1].tolist() == approx(expected["rejected"])
    found = reward_metrics(POLICY, REFERENCE, LENGTHS, beta)
    assert {name: values.tolist() for name, values in found.items()} == {
        "rewards/chosen": approx(expected["chosen"]),
        "rewards/rejected": approx(expected["rejected"]),
        "rewards/margins": approx(expected["margins"]),
        "rewards/accuracies": [1.0, 0.0, 1.0, 0.0],
        "logps/chosen": [-12.3, -40.5, -7.7, -101.2],
        "logps/rejected": [-15.1, -39.0, -20.2, -99.9],
        "lengths/chosen": [10, 25, 6, 64],
        "lengths/rejected": [12, 20, 15, 60],
        # the mean over 4 pairs of -log s(z) has the slope -beta s(-z) / 4
        "gradient_weight": approx([-4 * x / beta for x in expected["dmean"]]),
    }


def test_rewards_of_simpo_are_of_means_over_tokens():
    found = rewards(POLICY / LENGTHS, torch.zeros(4, 2), 2.0)
    assert found[:, 0].tolist() == approx([-2.46, -3.24, -2.566666666666667, -3.1625])
    assert found[:, 1].tolist() == approx([-2.5166666666666666, -3.9, -2.6933333333333334, -3.33])


def test_supervised_term_of_rpo():
    term = supervised(POLICY[:, 0], LENGTHS[:, 0])
    found = sigmoid(POLICY, REFERENCE, LENGTHS, beta=0.1) + term
    assert found.tolist() == approx([1.8371917248407819, 2.364396660073571, 1.9277299934069043, 2.5741062535503842])
    by_token = (term * LENGTHS[:, 0]).sum() / LENGTHS[:, 0].sum()
    assert float(by_token) == approx(1.54)
    assert abs(float(term.mean() - by_token)) > 0.1


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_before_the_first_step(beta):
    """Policy and reference are one: ln 2, a slope of -1/2 to z, rewards 0, and no win."""
    found = sigmoid(REFERENCE, REFERENCE, LENGTHS, beta=beta)
    assert found.tolist() == approx([0.6931471805599453] * 4)
    slope = slopes(sigmoid, REFERENCE, REFERENCE, LENGTHS, beta=beta) / beta
    assert slope.tolist() == [[approx(-0.5), approx(0.5)]] * 4
    seen = reward_metrics(REFERENCE, REFERENCE, LENGTHS, beta)
    assert not seen["rewards/chosen"].any()
    assert not seen["rewards/accuracies"].any()
    assert seen["gradient_weight"].tolist() == [0.5] * 4


def test_fp32_before_the_first_step():
    policy = REFERENCE.float()
    assert sigmoid(policy, policy, LENGTHS, beta=0.1).mean().item() == pytest.approx(0.6931471824645996, abs=1e-9)


def test_cdpo_settles_where_it_believes_the_labels():
    best = 2.1972245773362196  # log(0.9 / 0.1)
    policy, reference, lengths = at_margin([best - 0.5, best, best + 0.5], 0.1)
    slope = slopes(sigmoid, policy, reference, lengths, beta=0.1, label_smoothing=0.1)[:, 0]
    assert slope[0] < -1e-4
    assert abs(float(slope[1])) < 1e-12
    assert slope[2] > 1e-4


def test_robust_is_unbiased_under_turned_pairs():
    e, turned = 0.1, (POLICY.flip(1), REFERENCE.flip(1), LENGTHS.flip(1))
    kept = robust(POLICY, REFERENCE, LENGTHS, beta=0.5, label_smoothing=e)
    found = (1 - e) * kept + e * robust(*turned, beta=0.5, label_smoothing=e)
    assert found.tolist() == approx(SIGMOID[0.5]["losses"])


@pytest.mark.parametrize("loss", [sigmoid, robust])
def test_without_smoothing_it_is_dpo(loss):
    assert loss(POLICY, REFERENCE, LENGTHS, beta=0.5, label_smoothing=0.0).tolist() == approx(SIGMOID[0.5]["losses"])
    assert loss(POLICY, REFERENCE, LENGTHS, beta=0.5).tolist() == approx(SIGMOID[0.5]["losses"])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_is_content_at_its_own_margin(beta):
    """D = 1 / (2 beta), so z = 1/2; beyond it, unlike DPO, it pulls back."""
    policy, reference, lengths = at_margin([0.4, 0.5, 0.6], beta)
    assert ipo(policy, reference, lengths, beta=beta).tolist() == approx([(0.1 / beta) ** 2, 0.0, (0.1 / beta) ** 2])
    found = slopes(ipo, policy, reference, lengths, beta=beta)[:, 0]
    assert found.tolist() == approx([-0.2 / beta, 0.0, 0.2 / beta])


def test_hinge_is_flat_beyond_one():
    policy, reference, lengths = at_margin([-1.0, 0.5, 1.5], 0.1)
    assert hinge(policy, reference, lengths, beta=0.1).tolist() == approx([2.0, 0.5, 0.0])
    assert slopes(hinge, policy, reference, lengths, beta=0.1)[:, 0].tolist() == approx([-0.1, -0.1, 0.0])


def test_simpo_asks_for_a_margin_per_token():
    """Means of -1.0 and -1.5 are 0.5 apart: exactly the margin, hence ln 2 at any beta."""
    found = simpo(tensor([[-4.0, -3.0]]), torch.zeros(1, 2), tensor([[4, 2]]), beta=7.0, target_margin=0.5)
    assert found.tolist() == pytest.approx([math.log(2)], rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_reads(name):
    """Which losses depend on the reference and which on lengths is what the tables say, and no pair sees another."""
    loss = LOSSES[name]
    found = loss(POLICY, REFERENCE, LENGTHS, beta=0.3)
    assert found.shape == (4,)
    other = loss(POLICY, REFERENCE + tensor([0.7, -0.4]), LENGTHS, beta=0.3)
    assert torch.equal(found, other) == (name in REFERENCE_FREE)
    longer = loss(POLICY, REFERENCE, LENGTHS * tensor([2, 3]), beta=0.3)
    assert torch.equal(found, longer) == (name not in PER_TOKEN)
    assert torch.equal(loss(POLICY[2:3], REFERENCE[2:3], LENGTHS[2:3], beta=0.3), found[2:3])


def test_options():
    assert {name: options_of(name) for name in LOSSES} == {
        "sigmoid": {"label_smoothing"},
        "robust": {"label_smoothing"},
        "hinge": set(),
        "ipo": set(),
        "ipo_mean": set(),
        "sigmoid_norm": set(),
        "simpo": {"target_margin"},
        "reference_free": set(),
    }
    for loss in LOSSES.values():
        parameters = inspect.signature(loss).parameters
        assert list(parameters)[:4] == ["policy", "reference", "lengths", "beta"]
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
        assert loss.__doc__


# -- where trainers have failed --------------------------------------------------------------------------------------


def test_far_margins_of_dpo():
    policy, reference, lengths = at_margin([0.0, 50.0, -50.0, 1e4, -1e4], 1.0, torch.float32)
    found = sigmoid(policy, reference, lengths, beta=1.0)
    assert found.tolist() == pytest.approx([0.6931471805599453, 1.9287498479639178e-22, 50.0, 0.0, 1e4], rel=1e-6)
    assert slopes(sigmoid, policy, reference, lengths, beta=1.0)[:, 0].tolist() == pytest.approx(
        [-0.5, 0.0, -1.0, 0.0, -1.0], abs=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_far_margins_stay_finite(name, smoothing):
    options = {"label_smoothing": smoothing} if "label_smoothing" in options_of(name) else {}
    policy, reference, lengths = at_margin([1e4, -1e4], 1.0, torch.float32)
    assert LOSSES[name](policy, reference, lengths, beta=1.0, **options).isfinite().all()
    assert slopes(LOSSES[name], policy, reference, lengths, beta=1.0, **options).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_reply_without_tokens_is_no_nan(name):
    policy, reference = tensor([[0.0, -3.0]]), tensor([[0.0, -2.0]])
    lengths = tensor([[0, 2]])
    assert LOSSES[name](policy, reference, lengths, beta=0.5).isfinite().all()
    assert slopes(LOSSES[name], policy, reference, lengths, beta=0.5).isfinite().all()
    assert supervised(policy[:, 0], lengths[:, 0]).tolist() == [0.0]


def test_likelihood_displacement():
    """The second step wins by a larger margin, and both replies are less likely than at step 0."""
    first, then = tensor([[-10.0, -10.0]]), tensor([[-12.0, -15.0]])
    reference = first
    assert sigmoid(then, reference, LENGTHS[:1], beta=0.1) < sigmoid(first, reference, LENGTHS[:1], beta=0.1)
    seen = [reward_metrics(x, reference, LENGTHS[:1], 0.1)["logps/chosen"].mean().item() for x in (first, then)]
    assert displaced(*seen)
    assert not displaced(*reversed(seen))
    assert not displaced(-10.0, -10.0)


# -- token by token --------------------------------------------------------------------------------------------------


def test_wspo_by_hand():
    """Three replies of 2, 2 and 3 tokens.

    gamma = 1/2. Changes of the strong model 2, -4, 1, 0, 3, -1, -2, halved; of the weak model 0, 1, 1, -2, 0.5, 0.5, 0:
    differences 1, -3, -0.5, 2, 1, -1, -1 and squares 1, 9, 0.25, 4, 1, 1, 1, so that the means are 5, 2.125, 1.
    """
    strong_reference = tensor([-5.0, -1.0, -2.0, -3.0, -4.0, -1.0, -2.0])
    weak_reference = tensor([-6.0, -2.0, -1.5, -2.5, -3.0, -7.0, -1.0])
    strong = (strong_reference + tensor([2.0, -4.0, 1.0, 0.0, 3.0, -1.0, -2.0])).requires_grad_()
    weak = weak_reference + tensor([0.0, 1.0, 1.0, -2.0, 0.5, 0.5, 0.0])
    owner = tensor([0, 0, 1, 1, 2, 2, 2])
    found = wspo(strong, strong_reference, weak, weak_reference, owner, 3, gamma=0.5)
    assert found.tolist() == approx([5.0, 2.125, 1.0])
    found.sum().backward()  # 2 gamma difference / tokens of the reply
    assert strong.grad.tolist() == pytest.approx([0.5, -1.5, -0.25, 1.0, 1 / 3, -1 / 3, -1 / 3], rel=1e-6)


def test_wspo_of_scattered_tokens_and_of_replies_without_any():
    strong = tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    zero = torch.zeros(4)
    found = wspo(strong, zero, zero, zero, tensor([3, 1, 3, 3]), 5, gamma=1.0)
    assert found.tolist() == pytest.approx([0.0, 4.0, 0.0, 26 / 3, 0.0], rel=1e-6)
    found.sum().backward()
    assert strong.grad.tolist() == pytest.approx([2 / 3, 4.0, 2.0, 8 / 3], rel=1e-6)


def test_wspo_is_content_when_the_change_is_the_weak_models():
    generator = torch.Generator().manual_seed(0)
    strong_reference, weak, weak_reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    strong = strong_reference + (weak - weak_reference) / 0.1
    owner = tensor([0, 0, 0, 1, 1, 1])
    assert wspo(strong, strong_reference, weak, weak_reference, owner, 2, gamma=0.1).tolist() == approx([0.0, 0.0])
    assert wspo(strong, strong_reference, weak, weak_reference, owner, 2, gamma=0.2).min() > 0.01


def test_auxiliary_confidence():
    given, own = tensor([-2.0, -4.0], requires_grad=True), tensor([-1.0, -0.5], requires_grad=True)
    found = auxiliary_confidence(given, own, 0.25)
    assert found.tolist() == [1.75, 3.125]  # 3/4 of 2 and 4, 1/4 of 1 and 1/2
    found.sum().backward()
    assert given.grad.tolist() == [-0.75, -0.75]
    assert own.grad.tolist() == [-0.25, -0.25]
    assert auxiliary_confidence(given, own, 0.0).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("loss", sorted(preference.LOSSES))
def test_displacement_is_warned_of_where_there_is_a_reference_alone(loss):
    last = {"rewards/chosen": -0.4, "rewards/margins": 0.1}
    lines = preference.displacement("weak", loss, last)
    assert bool(lines) == (loss not in {"simpo", "reference_free"})
    assert preference.displacement("weak", loss, last | {"rewards/chosen": 0.2}) == []
    assert preference.displacement("weak", loss, {}) == []


@pytest.mark.parametrize("loss", preference.LOSSES.values(), ids=preference.LOSSES)
def test_shapes_that_would_be_broadcast_are_refused(loss):
    with pytest.raises(UserError, match=r"takes \[B, 2\] sums, chosen and rejected; got policy \[4\]"):
        loss(POLICY[:, 0], REFERENCE, LENGTHS, beta=0.1)
    if loss.__name__ != "reference_free":  # which reads neither
        with pytest.raises(UserError, match=r"\[1, 2\]"):
            loss(POLICY, REFERENCE[:1], LENGTHS[:1], beta=0.1)
    with pytest.raises(UserError, match=r"beta: must be above 0 \(got 0.0\)"):
        loss(POLICY, REFERENCE, LENGTHS, beta=0.0)


def test_half_of_the_pairs_turned_round_says_nothing():
    with pytest.raises(UserError, match="label_smoothing: must be at least 0 and below one half"):
        robust(POLICY, REFERENCE, LENGTHS, beta=0.1, label_smoothing=0.5)
