"""Networks that behave differently in copy and original, early and late, small and large batch, clean and perturbed …

Each must get the bare network's robust accuracy within two points, or a serious flag.
"""

from __future__ import annotations

import copy
import re
from functools import cache

import pytest
import torch
from digit_networks import BALL, digits
from masked_copies import BY_COPY, BY_LAYER, BY_WEIGHTS
from masked_networks import ALWAYS, BY_BATCH, BY_CALL, BY_IMAGE, BY_INPUT, Trap
from torch import nn

from holdfast import HoldfastError, evaluate

ZOO = {**BY_INPUT, **BY_BATCH, **BY_CALL, **BY_IMAGE, **BY_COPY, **BY_WEIGHTS, **BY_LAYER, **ALWAYS}
EVERYDAY = ("turned for inputs with a history", "cut after 50 calls", "perturbed: no gradient", "copy drops a field")
REFUSED = {"an error above sixty-four images": "it must take any number of them"}
WITH_AUTOATTACK = ("copy has no graph", "hook before BatchNorm")


@cache
def bare_accuracy(name: str, attack: str, count: int) -> float:
    """The robust accuracy of the bare network."""
    return evaluate(ZOO[name].bare(), *digits(count), threat=BALL, attack=attack).robust_accuracy


def assert_told(name: str, *, attack: str = "quick", count: int = 100) -> None:
    """Fail where the masked network gets a better number than the bare one and no serious flag."""
    found = evaluate(ZOO[name].model(), *digits(count), threat=BALL, attack=attack)
    bare = bare_accuracy(name, attack, count)
    flags = {flag.name: flag.severity for flag in found.flags}
    assert abs(bare - found.robust_accuracy) <= 0.02 + 1e-9 or "serious" in flags.values(), (
        f"bare {bare:.2f}, masked {found.robust_accuracy:.2f}, flags {flags}"
    )


def naive_robust_accuracy(trap: Trap, *, steps: int = 10) -> float:
    """The share that PGD leaves which searches the fooled network, and believes in a success that both confirm."""
    assert trap.fooled is not None
    bare, fooled = trap.bare(), trap.fooled(trap.model())
    x, y = digits(60)
    epsilon = BALL.epsilon
    x_adv, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    for _ in range(steps):
        seen = x_adv.clone().requires_grad_(True)
        logits = fooled(seen)
        with torch.no_grad():
            broken |= (logits.argmax(1) != y) & (bare(x_adv).argmax(1) != y)
        gradient = torch.zeros_like(x)
        if logits.requires_grad:
            gradient = torch.autograd.grad(nn.functional.cross_entropy(logits, y), seen, allow_unused=True)[0]
            gradient = torch.zeros_like(x) if gradient is None else gradient.nan_to_num(0)
        x_adv = (x + (x_adv + epsilon / 4 * gradient.sign() - x).clamp(-epsilon, epsilon)).clamp(0, 1)
    return 1 - broken.float().mean().item()


@pytest.mark.parametrize("name", EVERYDAY)
def test_masked_networks_are_told(name: str) -> None:
    assert_told(name, count=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED])
def test_every_masked_network_is_told(name: str) -> None:
    assert_told(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_AUTOATTACK)
def test_autoattack_tells_them_too(name: str) -> None:
    assert_told(name, attack="autoattack", count=10)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_some_are_refused_or_told(name: str) -> None:
    """A network that cannot take the images may be refused in one line: then no number is quoted."""
    try:
        assert_told(name)
        return
    except HoldfastError as error:
        refusal = str(error)
    assert re.fullmatch(f".*{REFUSED[name]}.*", refusal)  # one line


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, trap in ZOO.items() if trap.fooled])
def test_each_is_a_trap(name: str) -> None:
    """The bare network breaks, and who falls into the trap finds many images unbroken."""
    bare = bare_accuracy(name, "quick", 60)
    assert bare < 0.3
    assert naive_robust_accuracy(ZOO[name]) > bare + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_each_answers_like_the_bare_network(name: str) -> None:
    """Before anything was done to it, one image at a time or all in one batch."""
    x, y = digits(60)
    bare, masked = ZOO[name].bare(), ZOO[name].model()
    with torch.no_grad():
        assert (bare(x).argmax(1) == y).float().mean() > 0.9
        torch.testing.assert_close(masked(x).argmax(1), bare(x).argmax(1))
        torch.testing.assert_close(copy.deepcopy(bare)(x[:1]).argmax(1), masked(x[:1]).argmax(1))
