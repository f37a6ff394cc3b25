"""Honest networks of many kinds get no flag, and what computes the same gets the same number."""

from __future__ import annotations

from functools import cache

import pytest
from digit_networks import BALL, digits
from honest_networks import ZOO, bare

from holdfast import evaluate

EVERYDAY = ("MLP", "logits × 1e-6", "float64 inside", "in-place first layer")


@cache
def plain(name: str, count: int) -> float:
    """The robust accuracy of the plain network."""
    return evaluate(bare(name), *digits(count), threat=BALL, attack="quick").robust_accuracy


def assert_believed(name: str, *, count: int = 100) -> None:
    """Fail where a flag is raised, or where the number is another than that of the plain network."""
    honest = ZOO[name]
    found = evaluate(honest.make().eval(), *digits(count), threat=BALL, attack="quick")
    assert {flag.name for flag in found.flags} <= {"few-images"}
    if honest.like is not None:
        assert abs(found.robust_accuracy - plain(honest.like, count)) <= 0.02 + 1e-9


@pytest.mark.parametrize("name", EVERYDAY)
def test_honest_networks_are_believed(name: str) -> None:
    assert_believed(name, count=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_honest_network_is_believed(name: str) -> None:
    assert_believed(name)
