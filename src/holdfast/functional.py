"""Per-example quantities that attacks and objectives are made of. Every function returns (B,)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross-entropy of every example against hard or soft labels.

    .. math:: -\sum_k t_k \log p_k, \qquad p = \mathrm{softmax}(f)

    Shapes:
        logits: (B, K); target: (B,) integer labels or (B, K) probabilities. Returns (B,).

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == torch.tensor(4.0).log().item()
        True
    """
    if target.dim() == 1:
        return F.cross_entropy(logits, target, reduction="none")
    return -(target * F.log_softmax(logits, dim=1)).sum(1)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence :math:`\mathrm{KL}(p \| q)` between two softmax distributions.

    Shapes:
        Both (B, K), before softmax. Returns (B,), in nats.
    """
    log_p, log_q = F.log_softmax(p_logits, dim=1), F.log_softmax(q_logits, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of y minus the best other logit: positive where the prediction is right.

    Shapes:
        logits: (B, K); y: (B,). Returns (B,).

    Example:
        >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1])).item()
        2.0
    """
    own = logits.gather(1, y[:, None])
    other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return own[:, 0] - other


def probability_of(logits: Tensor, y: Tensor) -> Tensor:
    """The softmax probability of class y.

    Shapes:
        logits: (B, K); y: (B,). Returns (B,).
    """
    return logits.softmax(1).gather(1, y[:, None])[:, 0]


def rank_weight(vulnerability: Tensor) -> Tensor:
    r"""Weights that fall linearly with the rank within the batch: 1 for the most vulnerable row, 1/B for the least.

    .. math:: w_i = 1 - \frac{r(v_i)}{B}, \qquad r \text{ from 0 for the highest } v

    Shapes:
        vulnerability: (B,). Returns (B,); equal values keep the order of the batch.
    Source: ISEAT, eq. (14).

    Example:
        >>> rank_weight(torch.tensor([0.3, 2.0, -1.0, 0.9])).tolist()
        [0.5, 1.0, 0.25, 0.75]
    """
    order = vulnerability.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return 1 - rank.to(vulnerability.dtype) / max(1, len(order))


def smooth_labels(y: Tensor, num_classes: int, smoothing: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Soft labels: 1 - s for class y, s shared equally by all other classes.

    Args:
        y: Labels.
        num_classes: K.
        smoothing: s in [0, 1).
        dtype: Type of the result.

    Shapes:
        y: (B,). Returns (B, K); rows sum to 1.
    Source: Szegedy et al., CVPR 2016, arXiv:1512.00567; in adversarial training, Pang et al., ICLR 2021,
        arXiv:2010.00467.
    Differs from the reference: the original gives every class s / K, y included. With our s, `torch`'s
        ``label_smoothing`` is s K / (K - 1). We follow the fast-AT benchmark (arXiv:2604.22853), where y keeps 1 - s.

    Example:
        >>> [round(value, 2) for value in smooth_labels(torch.tensor([1]), 5, 0.4)[0].tolist()]
        [0.1, 0.6, 0.1, 0.1, 0.1]
    """
    soft = torch.full((len(y), num_classes), smoothing / (num_classes - 1), dtype=dtype, device=y.device)
    return soft.scatter_(1, y[:, None], 1.0 - smoothing)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of two distributions.

    .. math:: \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \qquad m = \tfrac12 (p + q)

    Shapes:
        Both (B, K), rows that sum to 1. Returns (B,), in nats, at most log 2.

    Example:
        >>> round(jensen_shannon(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        0.6931
    """
    mean = ((p + q) / 2).clamp_min(1e-8).log()
    entropy = (torch.xlogy(p, p.clamp_min(1e-8)) + torch.xlogy(q, q.clamp_min(1e-8))).sum(1)
    return (entropy - ((p + q) * mean).sum(1)) / 2


def symmetric_kl(p_logits: Tensor, q_logits: Tensor, *, detach: bool = False) -> Tensor:
    r"""Half the sum of both Kullback-Leibler divergences between two softmax distributions.

    .. math:: \tfrac12 \mathrm{KL}(p \| q) + \tfrac12 \mathrm{KL}(q \| p)

    Args:
        p_logits: Before softmax.
        q_logits: Before softmax.
        detach: Let no gradient flow into the first argument of either divergence.

    Shapes:
        Both (B, K). Returns (B,), in nats.
    """
    p, q = (p_logits.detach(), q_logits.detach()) if detach else (p_logits, q_logits)
    return (kl(p, q_logits) + kl(q, p_logits)) / 2


def extremes(logits: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Which of several predictions gives class y the least, and which the most probability.

    Shapes:
        logits: each (B, K); y: (B,). Returns two (B,) positions in the sequence.
    """
    own = torch.stack([probability_of(each.detach(), y) for each in logits])
    return own.argmin(0), own.argmax(0)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio: the margin's negative, divided so that a rescaled network has the same loss.

    .. math:: -\frac{z_y - \max_{k \ne y} z_k}{z_{\pi_1} - z_{\pi_3} + 10^{-12}}

    with :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots`. Two classes have no third logit: the plain negative margin is used.

    Shapes:
        logits: (B, K); y: (B,). Returns (B,).
    Source: Croce and Hein, ICML 2020, arXiv:2003.01690, eq. (6).
    Differs from the reference: two classes are allowed.

    Example:
        >>> round(dlr(torch.tensor([[5.0, 3.0, 1.0]]), torch.tensor([0])).item(), 6)
        -0.5
    """
    if logits.shape[1] < 3:
        return -margin(logits, y)
    first = logits.topk(3, dim=1).values
    return -margin(logits, y) / (first[:, 0] - first[:, 2] + 1e-12)


def logit_difference(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The logit of the target minus that of y: positive where the target wins over y.

    Shapes:
        logits: (B, K); y, target: (B,). Returns (B,).
    """
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""Difference of logits ratio towards a target class.

    .. math:: -\frac{z_y - z_t}{z_{\pi_1} - \tfrac12 (z_{\pi_3} + z_{\pi_4}) + 10^{-12}}

    Three classes have no fourth logit: the denominator is :math:`z_{\pi_1} - z_{\pi_3}`. Two have neither: the plain
    difference is used.

    Shapes:
        logits: (B, K); y, target: (B,). Returns (B,).
    Source: Croce and Hein, ICML 2020, arXiv:2003.01690, eq. (7).
    Differs from the reference: two and three classes are allowed.

    Example:
        >>> round(targeted_dlr(torch.tensor([[5.0, 3.0, 2.0, 0.0]]), torch.tensor([0]), torch.tensor([1])).item(), 6)
        -0.5
    """
    difference = logit_difference(logits, y, target)
    if logits.shape[1] < 3:
        return difference
    first = logits.topk(min(4, logits.shape[1]), dim=1).values
    return difference / (first[:, 0] - (first[:, 2] + first[:, -1]) / 2 + 1e-12)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Return which rows are classified correctly, (B,) bool: the one rule behind every accuracy and every verdict.

    A row is correct if its largest logit is that of y (the first of equals counts as the largest) and all its logits
    are finite. NaN is wrong, because a search for a maximum returns anything there. Infinity is wrong, because it is
    an overflow, which an attack cannot follow: the margin and every loss become infinite or NaN.

    Shapes:
        logits: (B, K); y: (B,).

    Example:
        >>> correct(torch.tensor([[2.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0]]), torch.tensor([0, 0, 0])).tolist()
        [True, False, False]
    """
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return which rows are not `correct`, (B,) bool.

    Shapes:
        logits: (B, K); y: (B,).

    Example:
        >>> misclassified(torch.tensor([[2.0, 1.0], [torch.nan, 0.0]]), torch.tensor([0, 0])).tolist()
        [False, True]
    """
    return ~correct(logits, y)
