"""Probes of the gradient with respect to the pixels, and of what short attacks do with it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from holdfast.evaluation.flags import Flag
from holdfast.evaluation.probed_model import ProbedModel, count, direction, dot, finite
from holdfast.functional import cross_entropy, margin, probability_of
from holdfast.keyed_random import normal

STEPS = 20
DIRECTIONS = 4
FEW, SOME, MANY = 0.05, 0.1, 0.25  # of the images
VANISHED = 10.0  # times the change that the gradient predicts
ROUNDING = 1e-4  # of the largest logit: a smaller change of the loss is never taken for one
NOISY = 0.9  # quantile, over the images, of the rounding that is measured
SMALL_STEP = 0.1  # of epsilon
FALL = 0.01  # of the growth of the mean loss
STEEP_FALL = 0.1
ONE_STEP_SHARE = 0.01  # of the images
TINY = torch.finfo(torch.float32).tiny


def _first_look(probed: ProbedModel) -> list[Flag]:
    """What gradients at a random point of the ball show: whether there are any, whether they are zero and finite."""
    point = probed.random_point
    found = probed.gradients(point, probed.loss, lambda logits: cross_entropy(logits, probed.y))
    n = len(probed.x)
    answers = {"images": ~probed.raw(probed.x).isfinite().all(1), "random points": ~probed.raw(point).isfinite().all(1)}
    flags = []
    if found is not None:
        answers["gradients"] = ~found[1][0].flatten(1).isfinite().all(1)
    worst = max(count(rows) for rows in answers.values())
    if worst:
        where = " and ".join(f"{count(rows)} {what}" for what, rows in answers.items() if bool(rows.any()))
        values = {what.replace(" ", "_"): count(rows) for what, rows in answers.items()}
        flags.append(Flag("non-finite", f"NaN or infinity on {where} (of {n} each)", "serious", {**values, "n": n}))
    if found is None:
        says = f"no gradient with respect to the pixels can be taken: {probed.reason}"
        return [*flags, Flag("no-gradients", says, "serious", {"n": n})]
    logits, (of_margin, of_entropy) = finite(found[0]), found[1]
    zero = (finite(of_margin) == 0).flatten(1).all(1)
    if bool(zero.any()):
        severity = "serious" if count(zero) >= FEW * n else "warning"
        says = (
            f"the gradient of the margin at a random point of the ball is exactly zero on {count(zero)} of {n} images"
        )
        flags.append(Flag("zero-gradients", says, severity, {"zero": count(zero), "n": n, "share": count(zero) / n}))
    flat = (of_entropy == 0).flatten(1).all(1) & (probability_of(logits, probed.y) == 1) & ~zero
    if bool(flat.any()):
        typical = float(margin(logits, probed.y)[flat].median())
        flags.append(
            Flag(
                "saturated-cross-entropy",
                f"the label's probability is exactly 1 and the cross-entropy has no gradient, though the margin has, on"
                f" {count(flat)} of {n} images (their median margin is {typical:.3g})",
                "serious" if count(flat) >= SOME * n else "warning",
                {"saturated": count(flat), "n": n, "share": count(flat) / n, "median_margin": typical},
            )
        )
    return flags


def _along(probed: ProbedModel) -> list[Flag]:
    """What the gradient predicts, against what the loss does."""
    point = probed.random_point
    probed.seed()
    found = probed.gradients(point, probed.loss)
    if found is None:
        return []
    logits, gradient = finite(found[0]), finite(found[1][0])
    start = probed.loss(logits)
    largest = logits.abs().amax(1)
    floor = _rounding(probed, point, start, largest)
    alive = (gradient != 0).flatten(1).any(1)
    uphill = direction(gradient, point, probed.threat)
    return [*_vanishing(probed, point, gradient, start, ROUNDING * largest, uphill, alive),
            *_misleading(probed, point, gradient, start, floor, uphill, alive)]  # fmt: skip


def _rounding(probed: ProbedModel, point: Tensor, start: Tensor, largest: Tensor) -> Tensor:
    """The change of the loss that rounding alone may cause, (n,): large where a network computes in bfloat16.

    Two steps of a tenth of epsilon in opposite random directions change a smooth loss by opposite amounts; what is left
    of their sum is curvature, which is small, and rounding. No gradient is asked, so no wrong one can hide in it.
    """
    threat = probed.threat
    noise = normal(probed.key.fold("probe rounding"), probed.index, point.shape[1:], dtype=point.dtype)
    move = SMALL_STEP * threat.epsilon * threat.steepest(noise)
    stopped = (point + move.abs() > threat.upper) | (point - move.abs() < threat.lower)
    move = move.masked_fill(stopped, 0.0)
    both = _change(probed, point, start, move) + _change(probed, point, start, -move)
    share = (both.abs() / largest.clamp_min(TINY)).quantile(NOISY)
    return torch.clamp_min(2 * share, ROUNDING) * largest


def _change(probed: ProbedModel, point: Tensor, start: Tensor, move: Tensor) -> Tensor:
    """How much the loss grows by a move, from the same draws."""
    probed.seed()
    return probed.loss(probed.logits(point + move)) - start


def _vanishing(
    probed: ProbedModel,
    point: Tensor,
    gradient: Tensor,
    start: Tensor,
    floor: Tensor,
    uphill: Tensor,
    alive: Tensor,
) -> list[Flag]:
    """Moves as long as epsilon, up, down and in random directions, against the most that the gradient predicts.

    In a random direction the linear change is far smaller than that, and what curvature adds is honest: so every move
    is held against the change along the gradient's own direction.
    """
    threat, radius = probed.threat, probed.threat.epsilon
    predicted = radius * dot(gradient, uphill).abs()
    ratio = torch.zeros_like(start)
    for number in range(-2, DIRECTIONS):
        if number < 0:
            move = threat.clamp(point + (radius if number == -1 else -radius) * uphill) - point
        else:
            noise = normal(probed.key.fold("probe direction", number), probed.index, point.shape[1:], dtype=point.dtype)
            move = threat.clamp(point + radius * threat.steepest(noise)) - point
        change = _change(probed, point, start, move).abs()
        measured = change > floor
        ratio = torch.where(measured, torch.maximum(ratio, change / predicted.clamp_min(TINY)), ratio)
    gone = alive & (ratio > VANISHED)
    n = len(gone)
    if count(gone) < SOME * n:
        return []
    typical = min(float(ratio[gone].median()), 1e30)
    return [
        Flag(
            "vanishing-gradients",
            f"on {count(gone)} of {n} images the loss changes inside the ball at least {VANISHED:.0f} times (half of"
            f" them {typical:.3g} times) as much as the gradient predicts",
            "serious" if count(gone) >= MANY * n else "warning",
            {"vanished": count(gone), "n": n, "share": count(gone) / n, "median_ratio": typical},
        )
    ]


def _misleading(
    probed: ProbedModel,
    point: Tensor,
    gradient: Tensor,
    start: Tensor,
    floor: Tensor,
    uphill: Tensor,
    alive: Tensor,
) -> list[Flag]:
    """A small step uphill that does not lead up."""
    move = probed.threat.clamp(point + SMALL_STEP * probed.threat.epsilon * uphill) - point
    asked = alive & (dot(gradient, move) > floor)
    wrong = asked & (_change(probed, point, start, move) <= 0)
    if count(wrong) == 0 or count(wrong) < max(SOME * count(asked), FEW * len(wrong)):
        return []
    share = count(wrong) / count(asked)
    return [
        Flag(
            "misleading-gradients",
            f"a step of a tenth of epsilon along the gradient does not increase the loss on {count(wrong)} of"
            f" {count(asked)} images",
            "serious" if share >= MANY else "warning",
            {"wrong": count(wrong), "asked": count(asked), "share": share},
        )
    ]


def reach(probed: ProbedModel) -> float:
    """The radius within which every image can be turned into plain grey, or epsilon where that is larger."""
    half, pixels = (probed.threat.upper - probed.threat.lower) / 2, probed.x[0].numel()
    power = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}[probed.threat.norm]
    return max(half * pixels**power, probed.threat.epsilon)


def _short_attacks(probed: ProbedModel) -> list[Flag]:
    """One step against many, and PGD at four radii."""
    epsilon = probed.threat.epsilon
    if epsilon == 0:
        return []
    largest = reach(probed)
    radii = [epsilon / 4, epsilon / 2, epsilon]
    radii = [*radii, largest] if largest > epsilon else [epsilon / 8, *radii]
    runs = {radius: probed.ascend(radius, STEPS if radius >= epsilon else STEPS // 2) for radius in radii}
    one = probed.ascend(epsilon, 1, share=1.0)[1]
    means = {radius: float(best.double().mean()) for radius, (best, _) in runs.items()}
    clean = float(probed.loss(probed.clean).double().mean())
    found = (
        _one_step(probed, one, runs[epsilon][1]),
        _huge(probed, largest, runs[largest][1]),
        _monotone(clean, means),
    )
    return [flag for flag in found if flag is not None]


def _one_step(probed: ProbedModel, one: Tensor, many: Tensor) -> Flag | None:
    """FGSM against PGD of the same epsilon, on images that are right."""
    n = len(probed.x)
    by_one, by_many = count(probed.correct & one & ~many), count(probed.correct & many & ~one)
    net = by_one - by_many
    if net < 2 or net <= ONE_STEP_SHARE * n:
        return None
    return Flag(
        "one-step-beats-many",
        f"one step of length epsilon broke {by_one} of {n} images that {STEPS} steps did not; the other way round"
        f" {by_many}",
        "serious",
        {"only_one_step": by_one, "only_many_steps": by_many, "n": n},
    )


def _huge(probed: ProbedModel, radius: float, broken: Tensor) -> Flag | None:
    """Accuracy where every image can become the same."""
    n = len(probed.x)
    left = count(probed.correct & ~broken)
    chance = int(probed.y.bincount().max())
    if left <= chance:
        return None
    return Flag(
        "accurate-at-huge-epsilon",
        f"{left} of {n} images survive PGD-{STEPS} within {probed.threat.with_epsilon(radius)}, where all of them can"
        f" become the same grey image and at most {chance} should",
        "serious",
        {"survived": left, "possible": chance, "n": n, "epsilon": radius},
    )


def _monotone(clean: float, means: dict[float, float]) -> Flag | None:
    """The mean loss at growing radii."""
    losses = list(means.values())
    growth = max(losses) - clean
    fall = max(before - after for before, after in pairwise(losses))
    nothing = growth <= 1e-6 * abs(clean)
    if not nothing and fall <= FALL * growth:
        return None
    path = ", ".join(f"{loss:.4g} at {radius:.3g}" for radius, loss in means.items())
    return Flag(
        "loss-not-monotone",
        f"the mean loss after PGD {'does not grow' if nothing else 'falls'} with epsilon: {clean:.4g} at 0, {path}",
        "serious" if nothing or fall > STEEP_FALL * growth else "warning",
        {"clean": clean, "growth": growth, "fall": max(fall, 0.0), **{f"loss_{k}": v for k, v in enumerate(losses)}},
    )


GRADIENT_PROBES: tuple[Callable[[ProbedModel], list[Flag]], ...] = (_first_look, _along, _short_attacks)
"""Probes that take gradients; several flags each, because gradients are shared."""
