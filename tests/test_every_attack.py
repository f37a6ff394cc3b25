"""One table that every attack must pass."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import small_batch, small_network
from holdfast.attacks.base import AttackWithMemory
from holdfast.components import ATTACKS
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, View
from holdfast.functional import cross_entropy, margin
from holdfast.schedule import Progress
from holdfast.threat import L1, L2, Linf
from parts import IMAGES, MAKE_ATTACK

EVERY = pytest.mark.parametrize("name", MAKE_ATTACK)
LINF_ONLY = ("prior_guided_fgsm", "class_start_fgsm", "class_start_fgsm, wide", "fgsm, bernoulli")
REACH = {"fgsm, unprojected": 3.0, "class_start_fgsm, wide": 3.0}  # in epsilons; 1 for all others
BALLS = pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8)], ids=str)


def test_the_table_is_complete() -> None:
    assert set(ATTACKS) <= set(MAKE_ATTACK)


def made(name: str, network, batch: Batch):
    """The attack of a name, with its memory where it has one."""
    attack = MAKE_ATTACK[name]()
    if isinstance(attack, AttackWithMemory):
        attack.prepare(network, batch.x[:2], IMAGES)
    return attack


def found_by(name: str, threat, batch: Batch, *, network=None, progress: Progress | None = None, loss=cross_entropy):
    network = network or small_network(dtype=batch.x.dtype)
    attack = made(name, network, batch)
    return attack(View(network), batch, lambda f: loss(f, batch.y), threat=threat, progress=progress or Progress())


@EVERY
@BALLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stays_in_the_ball_and_keeps_the_row_order(name: str, threat, dtype: torch.dtype) -> None:
    batch = small_batch(dtype=dtype)
    if name in LINF_ONLY and threat.norm != "Linf":
        with pytest.raises(HoldfastError, match=r"L2: use"):
            found_by(name, threat, batch)
        return
    found = found_by(name, threat, batch)
    assert found.x_adv.dtype == dtype
    assert found.x_adv.shape == batch.x.shape
    reach = threat.with_epsilon(REACH.get(name, 1.0) * threat.epsilon)
    assert bool(reach.contains(found.x_adv, batch.x).all())
    for images in (found.others or {}).values():
        assert bool(reach.contains(images, batch.x).all())
    assert found.steps_survived.shape == batch.y.shape
    nearest = torch.cdist(found.x_adv.flatten(1), batch.x.flatten(1)).argmin(1)
    assert torch.equal(nearest, torch.arange(len(batch.y)))


@EVERY
@BALLS
@pytest.mark.parametrize("loss", [cross_entropy, lambda f, y: -margin(f, y)], ids=["cross-entropy", "margin"])
def test_raises_the_loss_it_is_given(name: str, threat, loss) -> None:
    if name in LINF_ONLY and threat.norm != "Linf":
        threat = Linf(0.1)
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    with torch.no_grad():
        network[-1].weight *= 10  # a fresh network is too flat to tell a search from noise
    found = found_by(name, threat, batch, network=network, loss=loss)
    statistics = MAKE_ATTACK[name]().statistics
    view = View(network, statistics=statistics)
    before, after = loss(view(batch.x).logits, batch.y), loss(view(found.x_adv).logits, batch.y)
    assert after.mean() > before.mean() + 0.1


@EVERY
def test_touches_nothing(name: str) -> None:
    network, batch = small_network(), small_batch()
    before = copy.deepcopy(network.state_dict())
    x, state = batch.x.clone(), torch.get_rng_state()
    found = found_by(name, Linf(0.1), batch, network=network)
    assert not found.x_adv.requires_grad
    assert torch.equal(batch.x, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())


@EVERY
def test_is_reproducible_and_keyed(name: str) -> None:
    batch = small_batch(dtype=torch.float64)
    one = found_by(name, Linf(0.1), batch, progress=Progress(seed=1)).x_adv
    again = found_by(name, Linf(0.1), batch, progress=Progress(seed=1)).x_adv
    assert torch.equal(one, again)
    if "batch" not in name:  # batch statistics couple the rows
        order = torch.arange(len(batch.y)).flip(0)
        flipped = Batch(batch.x[order], batch.y[order], None, batch.rows[order])
        other = found_by(name, Linf(0.1), flipped, progress=Progress(seed=1)).x_adv
        torch.testing.assert_close(other[order], one, rtol=0, atol=1e-12)


@EVERY
def test_epsilon_zero_returns_the_images(name: str) -> None:
    batch = small_batch()
    assert torch.equal(found_by(name, Linf(0.0), batch).x_adv, batch.x)


@EVERY
def test_l1_is_refused(name: str) -> None:
    with pytest.raises(HoldfastError, match="no step for L1"):
        found_by(name, L1(1.0), small_batch())


@EVERY
def test_a_batch_of_one(name: str) -> None:
    batch = small_batch(rows=1)
    assert found_by(name, Linf(0.1), batch).x_adv.shape == batch.x.shape


@EVERY
def test_runs_in_low_precision(name: str) -> None:
    batch = small_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = found_by(name, Linf(0.1), batch)
    assert found.x_adv.dtype == torch.float32
    assert bool(Linf(0.1 * REACH.get(name, 1.0)).contains(found.x_adv, batch.x).all())


@EVERY
def test_states_its_cost(name: str) -> None:
    """Forwards counted by a hook; each but the restarts' choices has one backward to the input."""
    network, batch = small_network(), small_batch()
    forwards: list[int] = []
    attack = made(name, network, batch)
    network.register_forward_hook(lambda *_: forwards.append(1))
    for step in (0, 1):  # the first call may make what later ones use
        forwards.clear()
        attack(
            View(network), batch, lambda f: cross_entropy(f, batch.y), threat=Linf(0.0), progress=Progress(step=step)
        )
    restarts = getattr(attack, "restarts", 1)
    backwards = len(forwards) - (restarts if restarts > 1 else 0)
    stopped = getattr(attack, "early_stop", None) is not None
    assert len(forwards) + backwards <= attack.passes()
    if not stopped:
        assert len(forwards) + backwards == attack.passes()
