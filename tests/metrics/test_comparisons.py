"""Win rates, gaps and length control against numbers worked out by hand, scipy, and judges whose bias is known."""

import json

import numpy as np
import pytest
from scipy import optimize, special, stats

from w2sg.metrics import logistic
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap, Estimate
from w2sg.metrics.replies import (
    length_controlled_preference,
    length_controlled_win_rate,
    length_summary,
    min_max_per_prompt,
    paired_test,
    preference_rate,
    reward_gap,
    reward_length_correlation,
    standardised_gap,
    win_matrix,
    win_rate,
)


def lengths(n, seed=0, longer=0.0):
    """Two systems' lengths in characters; the first is ``longer`` standard deviations above."""
    random = np.random.default_rng(seed)
    return random.normal(1000 + 200 * longer, 200, n), random.normal(1000, 200, n)


def covers(found, truth):
    return found.low <= truth <= found.high


# -- who wins ---------------------------------------------------------------------------------------------------------


def test_a_win_rate_is_the_share_of_wins_and_half_the_ties():
    found = win_rate([3, 1, 2, 5], [1, 2, 2, 4], Bootstrap(4))  # win, loss, tie, win
    assert found.value == 2.5 / 4
    assert 0 <= found.low < found.value < found.high <= 1


def test_a_win_rate_reads_only_the_order_of_two_rewards():
    """However small their difference."""
    assert win_rate([1e-300, -5.0], [0.0, -5.0], Bootstrap(2)).value == 0.75
    one = win_rate([7], [7], Bootstrap(1))
    assert one.value == 0.5
    assert one.low < 0.1 < 0.9 < one.high  # one tie says nothing


@pytest.mark.parametrize("n", [1, 2, 3, 7, 300])
def test_a_sure_winner_has_exactly_1_and_its_loser_0(n):
    """Float32 weights of 7 prompts sum to more than 1; and n of n is no proof of all: Clopper and Pearson's limit."""
    won, lost = (win_rate(a, b, Bootstrap(n)) for a, b in ((np.ones(n), np.zeros(n)), (np.zeros(n), np.ones(n))))
    assert (won.value, won.high, lost.value, lost.low) == (1.0, 1.0, 0.0, 0.0)
    assert won.low == pytest.approx(0.025 ** (1 / n))
    assert lost.high == pytest.approx(1 - 0.025 ** (1 / n))


def test_prompts_that_are_all_ties_or_nearly_all_have_an_interval_of_some_width():
    """1 - .025^(1/100) = .0362 of the prompts may be decided: half of that either way."""
    found = win_rate(np.ones(100), np.ones(100), Bootstrap(100))
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - 0.0181, 0.5 + 0.0181), abs=1e-4)
    one = win_rate(np.r_[np.ones(99), 2], np.ones(100), Bootstrap(100))
    assert one.low < 0.5 < one.value < one.high


def test_the_interval_of_a_win_rate_is_the_binomials():
    """Of 100 prompts 60 won: the standard error is sqrt(.6 * .4 / 100) = .049."""
    found = win_rate(np.r_[np.ones(60), np.zeros(40)], np.full(100, 0.5), Bootstrap(100))
    assert found.value == 0.6
    assert found.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.011)
    assert found.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.011)


def test_intervals_of_win_rates_and_gaps_cover_the_truth_about_as_often_as_they_say():
    """a is ahead on 50 %, behind on 30 %, level on 20 %: .6, and a mean gap of .2. 400 draws know a coverage to 1.1."""
    random, draws, covered = np.random.default_rng(0), 400, np.zeros(2)
    for seed in range(draws):
        bootstrap, b = Bootstrap(100, 400, seed), random.normal(size=100)
        a = b + random.choice([1.0, -1.0, 0.0], 100, p=[0.5, 0.3, 0.2])
        covered += [covers(win_rate(a, b, bootstrap), 0.6), covers(reward_gap(a, b, bootstrap), 0.2)]
    assert (covered / draws > 0.91).all()
    assert (covered / draws < 0.985).all()


def test_the_matrix_is_written_out_row_beats_column():
    found = win_matrix({"x": [1, 2, 3, 4], "y": [2, 2, 1, 1], "z": [0, 0, 0, 9]})
    assert found["names"] == ["x", "y", "z"]
    assert found["value"] == [[None, 0.625, 0.75], [0.375, None, 0.75], [0.25, 0.25, None]]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_matrix_is_complementary_and_of_the_same_draws_as_single_win_rates():
    random = np.random.default_rng(1)
    rewards = {name: random.integers(0, 4, 50) + k / 2 for k, name in enumerate("abc")}
    found, bootstrap = win_matrix(rewards), Bootstrap(50)
    assert found == win_matrix(rewards, bootstrap)
    for i, a in enumerate(rewards):
        for j, b in enumerate(rewards):
            if i == j:
                assert found["value"][i][j] is found["low"][i][j] is found["high"][i][j] is None
                continue
            assert found["value"][i][j] + found["value"][j][i] == pytest.approx(1, abs=1e-12)
            assert found["low"][i][j] + found["high"][j][i] == pytest.approx(1, abs=1e-12)
            single = win_rate(rewards[a], rewards[b], bootstrap)
            entry = [found[key][i][j] for key in ("value", "low", "high")]
            assert entry == pytest.approx([single.value, single.low, single.high], abs=1e-12)
    assert found["low"][2][0] > 0.5


def test_a_matrix_of_one_system_or_one_prompt():
    assert win_matrix({"x": [1, 2]}) == {"names": ["x"], "value": [[None]], "low": [[None]], "high": [[None]]}
    one = win_matrix({"x": [1], "y": [0]})
    assert (one["value"][0][1], one["low"][0][1], one["high"][0][1]) == (1.0, pytest.approx(0.025), 1.0)
    with pytest.raises(ValueError, match="no systems"):
        win_matrix({})


def test_the_paired_test_is_the_sign_test():
    """Eight wins, one loss, a tie left out: 2 * (1 + 9) / 2^9."""
    a = np.array([1, 2, 3, 4, 5, 6, 7, 8, -1, 0])
    assert paired_test(a, np.zeros(10)) == pytest.approx(20 / 512)
    assert paired_test(np.zeros(10), a) == pytest.approx(20 / 512)
    assert paired_test(np.sign(a), np.zeros(10)) == paired_test(a**3, np.zeros(10))  # sizes do not matter
    assert paired_test([1.0], [0.0]) == 1.0


def test_the_paired_test_of_equals_is_1():
    assert paired_test([1, 2, 3], [1, 2, 3]) == 1.0


# -- length control ---------------------------------------------------------------------------------------------------


def fit(x, y):
    """The same regression by scipy's minimiser."""

    def loss(beta):
        z = beta[0] + beta[1] * x
        return np.mean(np.logaddexp(0, z) - y * z) + logistic.RIDGE / 2 * beta @ beta

    return optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15}).x


def test_length_control_is_the_logistic_regression_on_tanh_of_the_standardised_difference():
    (u, v), random = lengths(60, 3, 0.5), np.random.default_rng(4)
    a, b = (u - v) / 300 + random.normal(0.3, 1, 60), np.zeros(60)
    a[:5] = 0  # ties
    x = np.tanh((u - v) / (u - v).std(ddof=1))
    y = np.where(a == 0, 0.5, a > 0)
    expected = special.expit(fit(x, y)[0])
    assert abs(expected - y.mean()) > 0.05  # or it would not be seen
    found = length_controlled_win_rate(a, b, u, v, Bootstrap(60))
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert found.low < found.value < found.high


def test_length_control_of_two_lengths_by_hand():
    """Five prompts at d = 0 of which a wins 4, five at d = 100 of which it wins 5 halves: two points fit a line."""
    a = np.array([1, 1, 1, 1, -1] + [0] * 5)
    found = length_controlled_win_rate(a, np.zeros(10), [100] * 5 + [200] * 5, [100] * 10, Bootstrap(10))
    assert found.value == pytest.approx(0.8, abs=1e-4)
    assert win_rate(a, np.zeros(10), Bootstrap(10)).value == 0.65


def test_every_bootstrap_sample_is_fitted_anew():
    (u, v), random = lengths(40, 5, 0.5), np.random.default_rng(6)
    a, bootstrap = (u - v) / 300 + random.normal(0, 1, 40), Bootstrap(40, 5)
    x, rows = np.tanh((u - v) / (u - v).std(ddof=1)), []
    for weights in bootstrap.samples(lambda weights: weights):
        drawn = np.repeat(np.arange(40), np.rint(40 * weights).astype(int))
        rows.append(special.expit(fit(x[drawn], (a > 0)[drawn])[0]))
    found = length_controlled_win_rate(a, np.zeros(40), u, v, bootstrap)
    assert [found.low, found.high] == pytest.approx(np.quantile(rows, [0.025, 0.975]), abs=1e-5)


def test_pieces_of_the_bootstrap_are_fitted_as_one(monkeypatch):
    (u, v), bootstrap = lengths(50, 7, 0.5), Bootstrap(50, 100)
    a = np.random.default_rng(8).normal(size=50)
    whole = length_controlled_win_rate(a, np.zeros(50), u, v, bootstrap)
    monkeypatch.setattr(comparisons, "ENTRIES", 150)
    assert length_controlled_win_rate(a, np.zeros(50), u, v, bootstrap).low == pytest.approx(whole.low, abs=1e-9)


def test_a_judge_that_rewards_length_alone_is_seen_through():
    u, v = lengths(500, 1, 1.0)
    noise = np.random.default_rng(2).normal(0, 100, (2, 500))
    a, b, bootstrap = u + noise[0], v + noise[1], Bootstrap(500)
    assert win_rate(a, b, bootstrap).low > 0.65
    found = length_controlled_win_rate(a, b, u, v, bootstrap)
    assert covers(found, 0.5)
    assert found.value == pytest.approx(0.5, abs=0.1)


def test_a_judge_that_ignores_length_keeps_its_win_rate():
    u, v = lengths(2000, 1, 0.3)
    random = np.random.default_rng(2)
    a, b, bootstrap = random.normal(0.5, 1, 2000), random.normal(0, 1, 2000), Bootstrap(2000, 500)
    raw, found = win_rate(a, b, bootstrap), length_controlled_win_rate(a, b, u, v, bootstrap)
    assert raw.value == pytest.approx(special.ndtr(0.5 / np.sqrt(2)), abs=0.03)
    assert found.value == pytest.approx(raw.value, abs=0.02)


def test_a_better_system_that_is_also_longer_keeps_what_is_its_own():
    """Wins drawn from the regression itself, so that the truth is known: expit(.8) = .69 at no difference."""
    random, (u, v) = np.random.default_rng(3), lengths(4000, 4, 1.2)
    x = np.tanh((u - v) / (u - v).std(ddof=1))
    a = np.where(random.random(4000) < special.expit(0.8 + 1.5 * x), 1.0, -1.0)
    found = length_controlled_win_rate(a, np.zeros(4000), u, v, Bootstrap(4000, 300))
    assert win_rate(a, np.zeros(4000), Bootstrap(4000, 300)).low > 0.75
    assert covers(found, special.expit(0.8))
    assert found.high - found.low < 0.06


def test_intervals_of_controlled_win_rates_cover_the_truth_about_as_often_as_they_say():
    random, draws, covered = np.random.default_rng(5), 300, 0
    for seed in range(draws):
        d = random.normal(60, 200, 100)
        wins = random.random(100) < special.expit(0.5 + np.tanh(d / 200))
        found = length_controlled_win_rate(
            wins, np.full(100, 0.5), 1000 + d, np.full(100, 1000), Bootstrap(100, 300, seed)
        )
        covered += covers(found, special.expit(0.5))
    assert 0.905 < covered / draws < 0.985


def test_length_control_has_no_side():
    (u, v), random, bootstrap = lengths(80, 9, 0.4), np.random.default_rng(9), Bootstrap(80)
    a, b = random.integers(0, 5, (2, 80))
    found, mirror = (
        length_controlled_win_rate(a, b, u, v, bootstrap),
        length_controlled_win_rate(b, a, v, u, bootstrap),
    )
    assert found.value + mirror.value == pytest.approx(1, abs=1e-9)
    assert found.low + mirror.high == pytest.approx(1, abs=1e-9)
    assert abs(found.value - 0.5) > 0.01


def test_replies_of_equal_length_leave_the_raw_win_rate():
    a, b, bootstrap = [1, 2, 3, 4], [2, 1, 3, 0], Bootstrap(4)
    same = [5, 80, 0, 7]
    assert length_controlled_win_rate(a, b, same, same, bootstrap) == win_rate(a, b, bootstrap) != Estimate(0.5)


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_length_is_not_told_from_system_where_one_side_is_always_longer_by_much(spread):
    """tanh(d / sd) is within 1e-3 of 1 for all: the ridge alone would choose, with a narrow interval around .6."""
    random = np.random.default_rng(0)
    u = 1050 + spread * random.random(200)
    a = random.normal(0.5, 1, 200)
    assert length_controlled_win_rate(a, np.zeros(200), u, np.full(200, 1000), Bootstrap(200)) == Estimate(None)


def test_one_long_reply_among_equals_changes_little():
    a, u = np.r_[np.ones(1500), np.zeros(3500)], np.full(5000, 50)
    u[-1] = 9000
    found = length_controlled_win_rate(a, np.full(5000, 0.5), u, np.full(5000, 50), Bootstrap(5000, 200))
    assert found.value == pytest.approx(0.3, abs=0.001)
    assert found.low == pytest.approx(0.3 - 1.96 * np.sqrt(0.21 / 5000), abs=0.003)


@pytest.mark.parametrize("step", [1e-6, 0.3, 1.0])
def test_separable_data_stay_finite(step):
    """The longer reply always wins; differences start at ``step`` standard deviations or so."""
    random = np.random.default_rng(0)
    d = random.choice([-1, 1], 200) * np.where(random.random(200) < 0.05, step, 1.0)
    found = length_controlled_win_rate(d, np.zeros(200), 1000 + 100 * d, np.full(200, 1000), Bootstrap(200))
    assert 0 < found.low < found.high < 1
    assert 0 < found.value < 1
    if step == 1.0:  # as many either side, and nothing near the middle
        assert covers(found, 0.5)


def test_a_side_that_always_wins_stays_below_1_under_length_control():
    u, v = lengths(100)
    found = length_controlled_win_rate(np.ones(100), np.zeros(100), u, v, Bootstrap(100))
    assert 0.9999 < found.low <= found.value < 1


def test_newton_arrives_where_the_gradient_is_0():
    """From far off too, where its plain form jumps further away each time."""
    (u, v), random = lengths(100, 2), np.random.default_rng(2)
    x = np.tanh((u - v) / 280)
    weights = random.dirichlet(np.ones(100), 20)
    for y in (random.random(100) < special.expit(1 + x), x > 0, np.ones(100)):
        for start in (np.zeros(2), np.array([30.0, -80.0])):
            beta = logistic.logistic_fits(x, y, weights, start)
            p = special.expit(beta[:, :1] + beta[:, 1:] * x)
            powers = np.stack([np.ones(100), x], 1)
            gradient = (weights * (y - p)) @ powers - logistic.RIDGE * beta
            assert np.abs(gradient).max() < 1e-10


# -- how much better --------------------------------------------------------------------------------------------------


def test_the_gap_is_the_mean_difference():
    found = reward_gap([1.0, 2.0, 6.0], [0.0, 2.0, 1.0], Bootstrap(3))
    assert found.value == 2.0
    assert found.low == pytest.approx(0.0, abs=1e-6)
    assert found.high == pytest.approx(5.0, abs=1e-6)


def test_the_standardised_gap_by_hand():
    """Variances 1 and 4 (n - 1): pooled sqrt(2.5); the gap is 3."""
    found = standardised_gap([4.0, 5.0, 6.0], [0.0, 2.0, 4.0], Bootstrap(3))
    assert found.value == pytest.approx(3 / np.sqrt(2.5))


def test_the_standardised_gap_does_not_depend_on_the_judges_units():
    random, bootstrap = np.random.default_rng(0), Bootstrap(50)
    a, b = random.normal(0.5, 1, 50), random.normal(0, 1, 50)
    found = standardised_gap(a, b, bootstrap)
    other = standardised_gap(1e6 + 0.01 * a, 1e6 + 0.01 * b, bootstrap)
    for key, value in found.as_dict().items():
        assert other.as_dict()[key] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("n", [3, 30])
def test_each_sample_of_the_standardised_gap_has_its_own_deviation(n):
    """Of samples of 3 prompts every ninth is one prompt thrice: its deviation of 0 is left out, rounding and all."""
    random, bootstrap, rows = np.random.default_rng(1), Bootstrap(n, 40), []
    a, b = random.normal(1, 1, n), random.normal(0, 2, n)
    for weights in bootstrap.samples(lambda weights: weights):
        drawn = np.repeat(np.arange(n), np.rint(n * weights).astype(int))
        u, v = a[drawn], b[drawn]
        if np.ptp(u):
            rows.append((u - v).mean() / np.sqrt((u.var(ddof=1) + v.var(ddof=1)) / 2))
    found = standardised_gap(a, b, bootstrap)
    assert (len(rows) < 40) == (n == 3)
    assert [found.low, found.high] == pytest.approx(np.quantile(rows, [0.025, 0.975]), rel=1e-4)


def test_rewards_that_do_not_vary_have_no_standardised_gap():
    assert standardised_gap([2.0, 2.0], [1.0, 1.0], Bootstrap(2)) == Estimate(None)


def test_min_max_by_hand():
    found = min_max_per_prompt({"x": [1.0, 5.0, 3.0], "y": [2.0, 5.0, -1.0], "z": [5.0, 5.0, 0.0]})
    assert list(found) == ["x", "y", "z"]
    assert found["x"] == pytest.approx([0, 0.5, 1])
    assert found["y"] == pytest.approx([0.25, 0.5, 0])
    assert found["z"] == pytest.approx([1, 0.5, 0.25])
    assert min_max_per_prompt({"x": [1.0, 2.0]})["x"] == pytest.approx([0.5, 0.5])


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_the_length_summary_by_hand():
    found = length_summary([0, 10, 20, 70], [False, False, False, True])
    assert found == {"mean": 25.0, "median": 15.0, "truncated": 0.25, "empty": 0.25}
    assert json.loads(json.dumps(found)) == found


def test_the_correlation_is_spearmans_in_every_sample():
    random, bootstrap, rows = np.random.default_rng(0), Bootstrap(25, 6), []
    reward, length = random.integers(0, 6, 25), random.integers(0, 9, 25)  # many ties
    reward = reward + length / 2
    for weights in bootstrap.samples(lambda weights: weights):
        drawn = np.repeat(np.arange(25), np.rint(25 * weights).astype(int))
        rows.append(stats.spearmanr(reward[drawn], length[drawn]).statistic)
    found = reward_length_correlation(reward, length, bootstrap)
    assert found.value == pytest.approx(stats.spearmanr(reward, length).statistic)
    assert [found.low, found.high] == pytest.approx(np.quantile(rows, [0.025, 0.975]), abs=1e-6)


def test_the_correlation_of_ranks_by_hand():
    assert reward_length_correlation([1, 10, 100], [3, 4, 90], Bootstrap(3)).value == pytest.approx(1.0)
    assert reward_length_correlation([1, 2, 3, 4], [9, 4, 7, 1], Bootstrap(4)).value == pytest.approx(-0.8)
    assert reward_length_correlation([1, 1, 1], [1, 2, 3], Bootstrap(3)) == Estimate(None)


# -- few prompts, bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("resamples", [1, 50])
def test_a_few_prompts_are_enough_not_to_fail(n, resamples):
    a, b, u, v = np.random.default_rng(n).normal(size=(4, n))
    bootstrap = Bootstrap(n, resamples)
    found = [
        win_rate(a, b, bootstrap),
        length_controlled_win_rate(a, b, u, v, bootstrap),
        reward_gap(a, b, bootstrap),
        standardised_gap(a, b, bootstrap),
        reward_length_correlation(a, u, bootstrap),
    ]
    for estimate in found:
        assert all(x is None or np.isfinite(x) for x in estimate.as_dict().values())
    assert found[0].value is not None
    assert (found[1].value is None) == (found[3].value is None) == (found[4].value is None) == (n == 1)
    assert 0 < paired_test(a, b) <= 1
    assert length_summary(np.abs(u), np.zeros(n, bool))["empty"] == 0


GOOD, NAN, INF = np.ones(3), np.array([1.0, np.nan, 2.0]), np.array([1.0, np.inf, np.inf])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: win_rate(x, GOOD, Bootstrap(3)),
        lambda x: win_rate(GOOD, x, Bootstrap(3)),
        lambda x: win_matrix({"x": GOOD, "b": x}),
        lambda x: length_controlled_win_rate(GOOD, x, GOOD, GOOD, Bootstrap(3)),
        lambda x: length_controlled_win_rate(GOOD, GOOD, GOOD, x, Bootstrap(3)),
        lambda x: reward_gap(x, GOOD, Bootstrap(3)),
        lambda x: standardised_gap(x, GOOD, Bootstrap(3)),
        lambda x: min_max_per_prompt({"x": GOOD, "b": x}),
        lambda x: paired_test(GOOD, x),
        lambda x: length_summary(x, GOOD),
        lambda x: reward_length_correlation(GOOD, x, Bootstrap(3)),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(call, bad):
    with pytest.raises(ValueError, match=r"^(a|b|length_b|x|lengths|length): [12] of 3 numbers are NaN or infinite"):
        call(bad)


def test_prompts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"same prompts.*'a': 3, 'b': 2"):
        win_rate([1, 2, 3], [1, 2], Bootstrap(3))
    with pytest.raises(ValueError, match="draws from 4 prompts"):
        reward_gap([1, 2, 3], [1, 2, 3], Bootstrap(4))
    with pytest.raises(ValueError, match=r"a must be a list.*\(0,\)"):
        paired_test([], [])
    with pytest.raises(ValueError, match=r"shape is \(3, 1\)"):
        win_matrix({"x": np.ones((3, 1)), "y": np.ones(3)})


# -- judges that compare ----------------------------------------------------------------------------------------------


def test_preferences_of_0_and_1_are_wins():
    a, b = np.random.default_rng(0).normal(size=(2, 40))
    long = lengths(40)
    bootstrap = Bootstrap(40)
    sure = (a > b).astype(float)
    assert preference_rate(sure, bootstrap).value == win_rate(a, b, bootstrap).value
    assert length_controlled_preference(sure, *long, bootstrap) == length_controlled_win_rate(a, b, *long, bootstrap)


def test_the_rate_of_graded_preferences_is_their_mean():
    found = preference_rate([0.9, 0.2, 0.5], Bootstrap(3))
    assert found.value == pytest.approx(1.6 / 3)
    assert 0.2 <= found.low < found.value < found.high <= 0.9
    sure = preference_rate(np.ones(7), Bootstrap(7))
    assert (sure.value, sure.low, sure.high) == (1.0, pytest.approx(0.025 ** (1 / 7)), 1.0)


def test_graded_preferences_for_length_alone_are_seen_through():
    longer, other = lengths(400, longer=1.0)
    preferred = special.expit((longer - other) / 100)
    bootstrap = Bootstrap(400)
    assert preference_rate(preferred, bootstrap).low > 0.6
    assert length_controlled_preference(preferred, longer, other, bootstrap).value == pytest.approx(0.5, abs=0.05)


def test_preferences_outside_0_and_1_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        preference_rate([1.2, 0.5], Bootstrap(2))
