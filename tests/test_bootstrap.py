"""Intervals hold what they promise, and no verdict says more than they do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenmed.bootstrap import BETTER, HIGHER, LOWER, NO_DIFFERENCE, WORSE, Bootstrap, Sample, exp_ratio, ratio

BOOTSTRAP = Bootstrap(seed=1)


def means(values, share=False):
    return Sample(np.column_stack([np.asarray(values, dtype=float), np.ones(len(values))]), ratio, share)


def coverage(draw, truth, trials=1000):
    inside = 0
    for _ in range(trials):
        found = BOOTSTRAP.estimate(draw())
        inside += found.low <= truth <= found.high
    return inside / trials


@pytest.mark.parametrize("rows", [12, 40, 150])
def test_intervals_of_means_hold_the_truth_in_95_of_100_cases(rows):
    random = np.random.default_rng(rows)
    assert 0.93 <= coverage(lambda: means(random.normal(3, 2, rows)), 3.0) <= 0.97


def test_intervals_of_shares_hold_the_truth_in_95_of_100_cases():
    random = np.random.default_rng(5)
    assert 0.93 <= coverage(lambda: means(random.random(150) < 0.7, share=True), 0.7) <= 0.97


def test_intervals_of_perplexities_hold_the_truth_in_95_of_100_cases():
    random = np.random.default_rng(7)

    def perplexity():
        tokens = random.integers(50, 400, 100)
        return Sample(np.column_stack([tokens * random.normal(2, 0.3, 100), tokens]), exp_ratio)

    assert 0.93 <= coverage(perplexity, np.exp(2)) <= 0.97


def test_paired_differences_hold_the_truth_in_95_of_100_cases():
    random = np.random.default_rng(9)
    inside = 0
    for _ in range(1000):
        hard = random.normal(0, 5, 60)  # how hard a row is, for both models
        one, other = means(hard + random.normal(1, 1, 60)), means(hard + random.normal(0, 1, 60))
        found = BOOTSTRAP.difference(one, other, HIGHER)
        inside += found.low <= 1 <= found.high
        assert found.verdict == BETTER  # unpaired, the hard and easy rows would hide it
    assert 0.93 <= inside / 1000 <= 0.97


def test_no_difference_is_called_one_in_95_of_100_cases():
    random = np.random.default_rng(11)
    verdicts = [
        BOOTSTRAP.difference(means(random.normal(0, 1, 40)), means(random.normal(0, 1, 40)), HIGHER).verdict
        for _ in range(1000)
    ]
    assert 0.93 <= verdicts.count(NO_DIFFERENCE) / 1000 <= 0.97


def test_same_seed_same_interval_and_another_seed_another():
    sample = means(np.random.default_rng(0).normal(size=30))
    assert Bootstrap(3).estimate(sample) == Bootstrap(3).estimate(sample) != Bootstrap(4).estimate(sample)


def test_verdict_follows_interval_and_direction():
    low, high = means(np.arange(20.0)), means(np.arange(20.0) + 1 + np.arange(20) % 3)
    assert BOOTSTRAP.difference(high, low, HIGHER).verdict == BETTER
    assert BOOTSTRAP.difference(high, low, LOWER).verdict == WORSE
    assert BOOTSTRAP.difference(low, high, HIGHER).verdict == WORSE
    assert BOOTSTRAP.difference(high, low, None).verdict is None
    assert BOOTSTRAP.difference(low, low, HIGHER).verdict == NO_DIFFERENCE


def test_five_rows_show_nothing_however_clear_they_look():
    found = BOOTSTRAP.difference(means([9, 9, 9, 9, 9]), means([1, 1, 1, 1, 1]), HIGHER)
    assert found.value == 8 and found.low is None and found.verdict == NO_DIFFERENCE
    assert BOOTSTRAP.estimate(means([9, 9, 9, 9, 9])).low is None


def test_five_differing_rows_of_many_show_nothing():
    # All five in one direction: the bootstrap alone would call it a difference, a sign test (p = 0.06) does not.
    one, other = [1.0] * 10, [1.0] * 5 + [0.0] * 5
    found = BOOTSTRAP.difference(means(one, share=True), means(other, share=True), HIGHER)
    assert found.low > 0 and found.differing == 5 and found.verdict == NO_DIFFERENCE
    other[0] = 0.0
    assert BOOTSTRAP.difference(means(one, share=True), means(other, share=True), HIGHER).verdict == BETTER


def test_ten_right_of_ten_are_not_certainly_all():
    found = BOOTSTRAP.estimate(means([1] * 10, share=True))
    assert found.high == 1 and found.low == pytest.approx(0.692, abs=0.001)  # Clopper and Pearson
    nothing = BOOTSTRAP.estimate(means([0] * 10, share=True))
    assert nothing.low == 0 and nothing.high == pytest.approx(0.308, abs=0.001)


def test_no_rows_are_no_figure():
    found = BOOTSTRAP.estimate(means([]))
    assert np.isnan(found.value) and found.low is None
    assert BOOTSTRAP.difference(means([]), means([]), HIGHER).verdict == NO_DIFFERENCE


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=40))
def test_interval_lies_within_the_values_and_a_difference_turns_round(values):
    sample, other = means(values), means(values[::-1])
    found = BOOTSTRAP.estimate(sample)
    assert min(values) - 1e-6 <= found.low <= found.high <= max(values) + 1e-6
    there, back = BOOTSTRAP.difference(sample, other, HIGHER), BOOTSTRAP.difference(other, sample, HIGHER)
    assert there.low == pytest.approx(-back.high, abs=1e-6) and there.differing == back.differing
    assert {there.verdict, back.verdict} in ({NO_DIFFERENCE}, {BETTER, WORSE})
