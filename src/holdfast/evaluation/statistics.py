"""What a count of successes says about the probability behind it."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval for a proportion.

    .. math::
        \frac{\hat p + \frac{z^2}{2n} \pm z\sqrt{\frac{\hat p(1-\hat p)}{n} + \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}

    Args:
        successes: Count, 0 … n.
        n: Trials; with none the interval is (0, 1).
        confidence: Coverage.

    Source: Wilson, Journal of the American Statistical Association 22 (1927).

    Example:
        >>> [round(bound, 4) for bound in wilson_interval(81, 263)]
        [0.2553, 0.3662]
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: successes lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def binomial_tail(successes: int, n: int, probability: float) -> float:
    r"""Return the exact probability of at least so many successes: the p-value of the one-sided binomial test.

    .. math:: P(X \ge k) = \sum_{i=k}^{n} \binom{n}{i} q^i (1 - q)^{n - i}

    It tests the hypothesis that a success has the probability q at most: a small value speaks against it.

    Args:
        successes: k; with 0 the result is 1.
        n: Trials.
        probability: q, inside (0, 1).

    Raises:
        ValueError: counts or the probability are out of range.

    Example:
        >>> round(binomial_tail(3, 50, 0.01), 5), binomial_tail(0, 0, 0.01)
        (0.01382, 1.0)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: successes lie between 0 and n")
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability}: give a number between 0 and 1")
    if successes == 0:
        return 1.0
    log, log_not = math.log(probability), math.log1p(-probability)
    ways = math.lgamma(n + 1)
    terms = (
        math.exp(ways - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log + (n - i) * log_not)
        for i in range(successes, n + 1)
    )
    return min(1.0, math.fsum(terms))


def mcnemar(b: int, c: int) -> float:
    r"""Exact two-sided p-value of McNemar's test: do two classifiers, judged on the same images, err equally often?

    Only the images on which they disagree say anything. Were both equally good, each of those would fall to either side
    like a fair coin, so with :math:`m = \min(b, c)`

    .. math:: p = \min\Bigl(1,\; 2 \sum_{k=0}^{m} \binom{b + c}{k} 2^{-(b + c)}\Bigr)

    Args:
        b: Images that only the first classifies correctly.
        c: Images that only the second classifies correctly.

    Source: McNemar, Psychometrika 12 (1947); the binomial distribution in place of his chi-squared approximation.

    Example:
        >>> round(mcnemar(5, 15), 5)
        0.04139
    """
    if b < 0 or c < 0:
        raise ValueError(f"{b} and {c} discordant pairs: counts are at least 0")
    pairs = b + c
    ways = term = 1
    for k in range(1, min(b, c) + 1):
        term = term * (pairs - k + 1) // k
        ways += term
    return min(1.0, 2 * ways / 2**pairs)  # whole numbers up to here: nothing underflows, however many pairs


def difference_interval(b: int, c: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Bonett and Price's adjusted Wald interval for the difference of two proportions of the same n images.

    .. math::
        \tilde p_b - \tilde p_c \pm z\sqrt{\frac{\tilde p_b + \tilde p_c - (\tilde p_b - \tilde p_c)^2}{n + 2}},
        \quad \tilde p_b = \frac{b + 1}{n + 2},\; \tilde p_c = \frac{c + 1}{n + 2}

    Args:
        b: Images that only the first classifies correctly; the difference is :math:`(b - c) / n`.
        c: Images that only the second classifies correctly.
        n: All images, those on which both agree included; with none the interval is (-1, 1).
        confidence: Coverage.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012).

    Example:
        >>> [round(bound, 4) for bound in difference_interval(26, 4, 48)]
        [0.2548, 0.6252]
    """
    if b < 0 or c < 0 or b + c > n:
        raise ValueError(f"{b} and {c} discordant pairs among {n}: counts are at least 0 and add up to n at most")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first, second = (b + 1) / (n + 2), (c + 1) / (n + 2)
    spread = z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return max(-1.0, first - second - spread), min(1.0, first - second + spread)
