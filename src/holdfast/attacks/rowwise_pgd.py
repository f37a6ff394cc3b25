"""PGD in which every image has its own radius, number of steps and step size."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from holdfast.attacks.base import InnerLoss, input_gradient, loss_of_rows, require_steepest
from holdfast.forward import Attacked, Batch, View
from holdfast.functional import correct
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


def rowwise_pgd(
    view: View,
    batch: Batch,
    inner_loss: InnerLoss,
    *,
    threat: ThreatModel,
    radius: Tensor,
    steps: Tensor,
    step_size: Tensor,
    key: Key,
) -> Attacked:
    r"""Projected gradient descent from a uniform start, each row by settings of its own, under running statistics.

    .. math:: x_i^{t+1} = \Pi_{B_{\epsilon_i}(x_i)}\bigl(x_i^t + \alpha_i\, s(\nabla \ell(f(x_i^t), y_i))\bigr),
        \qquad t < K_i

    A row that has taken its steps stays, and is computed no longer.

    Args:
        view: How the classifier is run.
        batch: The images.
        inner_loss: What is climbed.
        threat: Norm and pixel bounds; its epsilon is without effect.
        radius: ε of every row, in pixel scale.
        steps: K of every row.
        step_size: α of every row, in pixel scale.
        key: What the start is drawn by.

    Shapes:
        x: (B, C, H, W); radius, step_size: (B,) floating; steps: (B,) integer. steps_survived: (B,) in 0 … K_i.
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: the norm is L1.
    Source: Jia et al., CVPR 2022, arXiv:2203.06616, section 3.
    Differs from the reference: it starts every row in a ball of 8/255, which the first step cuts to the row's own; here
        the start is uniform in the row's own ball. It runs finished rows on, with steps of 0.

    Example:
        >>> from holdfast.functional import cross_entropy
        >>> from holdfast.threat import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> batch = Batch(torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1]))
        >>> found = rowwise_pgd(
        ...     View(model), batch, lambda f: cross_entropy(f, batch.y), threat=Linf(0.1), key=Key(0),
        ...     radius=torch.tensor([0.1, 0.2]), steps=torch.tensor([2, 9]), step_size=torch.tensor([0.1, 0.05]),
        ... )
        >>> [round(value, 2) for value in (found.x_adv - batch.x).abs().amax((1, 2, 3)).tolist()]
        [0.1, 0.2]
    """
    require_steepest(threat, "PGD")
    view = view.running("eval").detached()
    x, y = batch.x.detach(), batch.y
    wide = (-1, *[1] * (x.dim() - 1))
    unit = replace(threat, epsilon=1.0, lower=-math.inf, upper=math.inf)
    noise = unit.random_point(torch.zeros_like(x), key, batch.rows)
    radius, step_size = radius.to(x.dtype), step_size.to(x.dtype).view(wide)
    x_adv = threat.clamp(x + radius.view(wide) * noise)
    survived = torch.zeros_like(y)
    order = steps.argsort(descending=True, stable=True)  # the rows that go on are always the first of these
    numbers = sorted(steps.tolist(), reverse=True)
    for number in range(numbers[0] if numbers else 0):
        rows = order[: sum(steps_of_row > number for steps_of_row in numbers)]
        gradient, logits = input_gradient(view, x_adv[rows], loss_of_rows(inner_loss, rows, len(y)))
        survived = survived.index_add(0, rows, correct(logits, y[rows]).to(survived.dtype))
        moved = x_adv[rows] + step_size[rows] * threat.steepest(gradient)
        x_adv = x_adv.index_copy(0, rows, threat.project(moved, x[rows], radius[rows]))
    return Attacked(x_adv.detach(), survived, numbers[0] if numbers else 0)
