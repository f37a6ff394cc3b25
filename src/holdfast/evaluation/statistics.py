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
