"""Intervals and the test of paired counts, against independent computations and published examples."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binom, binomtest

from holdfast.evaluation.statistics import binomial_tail, difference_interval, mcnemar, wilson_interval


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1), (3, 3), (5, 15), (15, 5), (0, 30), (120, 161), (7, 8)])
def test_mcnemar_is_the_binomial_test(counts: tuple[int, int]) -> None:
    """Two-sided, at one half; with no disagreement there is nothing to explain."""
    b, c = counts
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_by_hand() -> None:
    """Two of ten to one side: 2 (1 + 10 + 45) / 1024."""
    assert mcnemar(2, 8) == 112 / 1024
    assert mcnemar(8, 2) == 112 / 1024
    assert mcnemar(4, 5) == 1.0


def test_mcnemar_of_very_many_pairs() -> None:
    """No underflow to zero or division by it where floats would give up."""
    assert mcnemar(4000, 6000) == pytest.approx(binomtest(4000, 10000).pvalue, rel=1e-9)
    assert 0 < mcnemar(0, 1000) == 2.0**-999


@pytest.mark.parametrize("n", [1, 2, 50, 1000, 10000])
@pytest.mark.parametrize("probability", [0.01, 0.5, 0.999])
def test_binomial_tail(n: int, probability: float) -> None:
    """Every tail of few trials, and those about the expected count and at both ends of many."""
    centre = round(n * probability)
    for k in {0, 1, max(0, centre - 9), centre, min(n, centre + 9), n}:
        assert binomial_tail(k, n, probability) == pytest.approx(binom.sf(k - 1, n, probability), rel=1e-9, abs=1e-300)


def test_binomial_tail_by_hand() -> None:
    """Two of two, and at least one of three."""
    assert binomial_tail(2, 2, 0.25) == pytest.approx(1 / 16, rel=1e-14)
    assert binomial_tail(1, 3, 0.25) == pytest.approx(1 - 27 / 64, rel=1e-14)
    for counts in ((3, 2, 0.5), (-1, 2, 0.5), (1, 2, 0.0), (1, 2, 1.0)):
        with pytest.raises(ValueError, match=r"successes in|probability is"):
            binomial_tail(*counts)


def test_the_published_example_of_the_paired_interval() -> None:
    """The counts 12, 4, 26, 6 with which the interval is usually illustrated: 0.44 -+ 1.96 x 0.09448809."""
    low, high = difference_interval(26, 4, 48)
    assert (low, high) == pytest.approx((0.2548067, 0.6251933), abs=5e-8)
    assert (low + high) / 2 == pytest.approx(0.44)
    assert difference_interval(4, 26, 48) == pytest.approx((-high, -low))


def test_the_paired_interval_at_its_ends() -> None:
    """It stays within what a difference can be, and never shrinks to a point."""
    assert difference_interval(0, 0, 0) == (-1.0, 1.0)
    assert difference_interval(20, 0, 20)[1] == 1.0
    assert difference_interval(0, 20, 20)[0] == -1.0
    low, high = difference_interval(0, 0, 1000)
    assert low == -high < 0
    narrow = difference_interval(26, 4, 48, confidence=0.5)
    assert narrow[1] - narrow[0] < 0.2


def test_the_paired_interval_covers() -> None:
    """About 95 of 100 intervals hold the true difference."""
    draw = random.Random(0)
    held = 0
    for _ in range(1500):
        sides = draw.choices((0, 1, 2), weights=(0.12, 0.05, 0.83), k=120)
        low, high = difference_interval(sides.count(0), sides.count(1), 120)
        held += low <= 0.07 <= high
    assert 0.93 < held / 1500 < 0.98


@pytest.mark.parametrize("counts", [(-1, 2), (2, -1)])
def test_counts_below_zero(counts: tuple[int, int]) -> None:
    """A caller's mistake."""
    with pytest.raises(ValueError, match="discordant pairs"):
        mcnemar(*counts)
    with pytest.raises(ValueError, match="discordant pairs"):
        difference_interval(*counts, 10)


def test_more_pairs_than_images() -> None:
    """Discordant images are among all."""
    assert difference_interval(6, 4, 10)[1] < 1
    with pytest.raises(ValueError, match="among 10"):
        difference_interval(7, 4, 10)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 7), (504, 1000)])
def test_wilson_solves_its_equation(successes: int, n: int) -> None:
    """At a bound p the observed share lies z standard deviations of p away."""
    z = 1.959963984540054
    share = successes / n
    for bound in wilson_interval(successes, n):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson_interval(n + 1, n)
