"""SCORE in float64 against a naive restatement: arXiv:2202.10103, squared distances of probability vectors."""

from __future__ import annotations

import pytest
import torch

from conftest import small_batch, small_network
from holdfast import Progress, SquaredProbabilities, View
from test_restated_objectives import Case, Rows, close, finite_difference, softmax


def restated(clean: Rows, adv: Rows, targets: Rows, beta: float, clip: float) -> tuple[list[float], list[float]]:
    """Both terms, class by class."""
    brier, distance = [], []
    for one, other, target in zip(clean, adv, targets, strict=True):
        p, p_adv = softmax(one), softmax(other)
        brier.append(sum((a - t) ** 2 for a, t in zip(p, target, strict=True)))
        distance.append(beta * max(0.0, sum((b - a) ** 2 for a, b in zip(p, p_adv, strict=True)) - clip))
    return brier, distance


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("beta", "clip"), [(4.0, 0.0), (3.0, 0.3)])
def test_terms_and_gradients(soft: bool, beta: float, clip: float) -> None:
    for seed in range(3):
        case = Case(seed, soft=soft)
        clean, adv, _, targets = case.plain
        terms = SquaredProbabilities(beta=beta, clip=clip)(case.forward())
        brier, distance = restated(clean, adv, targets, beta, clip)
        assert close(terms["brier"], brier)
        assert close(terms["distance"], distance)
        assert any(value > 0 for value in distance)

        def total(clean: Rows, adv: Rows, targets: Rows = targets) -> float:
            return sum(map(sum, restated(clean, adv, targets, beta, clip)))

        sum(term.sum() for term in terms.values()).backward()  # type: ignore[union-attr]
        assert close(case.clean.grad, finite_difference(lambda rows, adv=adv: total(rows, adv), clean), 1e-7)
        assert close(case.adv.grad, finite_difference(lambda rows, clean=clean: total(clean, rows), adv), 1e-7)


def test_the_attack_climbs_the_squared_distance_from_the_clean_prediction() -> None:
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    other = torch.randn(len(batch.y), 5, dtype=torch.float64)
    loss = SquaredProbabilities().inner_loss(View(network), batch, Progress())(other)
    clean = network.eval()(batch.x).tolist()
    expected = [
        sum((b - a) ** 2 for a, b in zip(softmax(one), softmax(two), strict=True))
        for one, two in zip(clean, other.tolist(), strict=True)
    ]
    assert close(loss, expected)
