"""One table that every objective must pass, alone and under a weight perturbation, in two precisions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conftest import natively, small_batch, small_network
from holdfast.compilation import compile_in_place
from holdfast.components import OBJECTIVES
from holdfast.configuration import build_recipe, recipe_config
from holdfast.forward import Attacked, Batch, Forward, View
from holdfast.further_network import FurtherNetwork
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.views.split_batchnorm import branch_state
from parts import MAKE_OBJECTIVE, MAKE_VIEWS, fits, prepared, recipe_for, trained_sides

MEASURED = {"clean_accuracy": 0.4}
PROGRESS = Progress(epoch=1, step=3, steps_per_epoch=2, epochs=4, seed=7, measured=MEASURED)
EVERY = pytest.mark.parametrize("name", MAKE_OBJECTIVE)


def test_the_table_is_complete() -> None:
    assert set(OBJECTIVES) <= set(MAKE_OBJECTIVE)


def outputs_of(objective, network, batch: Batch, x_adv: torch.Tensor) -> Forward:
    found = Attacked(x_adv, torch.zeros_like(batch.y))
    view = View(network, taps=objective.taps)
    sides = objective.sides(PROGRESS)
    return Forward(batch, {s: view(objective.side_input(s, batch, found)) for s in sides}, found, PROGRESS)


FITTING = [
    (name, views)
    for name, make in MAKE_OBJECTIVE.items()
    for views in MAKE_VIEWS
    if fits(views, trained_sides(make(), PROGRESS))
]


# Where bfloat16 is emulated, every objective is run in it once.
IN_BF16 = [pytest.param(*case, "bf16", marks=() if case[1] == "no view" else natively) for case in FITTING]


@pytest.mark.parametrize(("name", "views", "precision"), [*((*case, "fp32") for case in FITTING), *IN_BF16])
def test_a_step_leaves_parameters_alone_and_trains_every_part(name: str, views: str, precision: str) -> None:
    network, batch = small_network(), small_batch()
    before = copy.deepcopy(network.state_dict())
    objective = prepared(name, network, batch)
    recipe = recipe_for(objective, network, batch, views=MAKE_VIEWS[views](trained_sides(objective, PROGRESS)))
    step = AdversarialStep(recipe, network, precision=precision)
    terms = step(batch, PROGRESS)
    assert terms["loss"].dtype == torch.float32
    assert all(torch.isfinite(term) for term in terms.values())
    terms["loss"].backward()
    for key, value in branch_state(network.state_dict()).items():
        assert torch.equal(value, before[key]) or "running" in key or "num_batches" in key, key
    for key, parameter in step.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@EVERY
def test_terms_are_per_row_and_follow_a_permutation(name: str) -> None:
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    objective = prepared(name, network, batch)
    order = torch.randperm(len(batch.y), generator=torch.Generator().manual_seed(0))
    assert batch.x2 is not None
    shuffled = Batch(batch.x[order], batch.y[order], None, batch.rows[order], batch.x2[order])

    def terms(of: Batch) -> dict[str, torch.Tensor]:
        step = AdversarialStep(recipe_for(objective, network, of), network, precision="fp64")
        found = step.find(of, objective, PROGRESS)
        return objective(outputs_of(objective, network, of, found.x_adv))

    plain, permuted = terms(batch), terms(shuffled)
    assert plain.keys() == permuted.keys()
    for key, term in plain.items():
        assert term.shape == (len(batch.y),)
        assert torch.isfinite(term).all()
        torch.testing.assert_close(permuted[key], term[order], rtol=0, atol=1e-11)


@EVERY
def test_declared_terms_vanish_at_equality(name: str) -> None:
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    objective = prepared(name, network, batch)
    terms = objective(outputs_of(objective, network, batch, batch.x))
    declared = [key for key in objective.zero_at_equality if key in terms]  # LBGAT without β has no such term
    for key in declared:
        assert terms[key].abs().max() < 1e-12
    moved = objective(outputs_of(objective, network, batch, (batch.x + 0.2).clamp(0, 1)))
    for key in declared:
        assert moved[key].abs().max() > 1e-6, "the term is always zero"


@EVERY
def test_soft_labels_that_are_hard_change_nothing(name: str) -> None:
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    objective = prepared(name, network, batch)
    if name == "start_consistency":
        objective.smoothing = 0.0  # its own labels are random
    soft = batch._replace(target=torch.nn.functional.one_hot(batch.y, 5).double())
    x_adv = (batch.x + 0.1).clamp(0, 1)
    hard_terms = objective(outputs_of(objective, network, batch, x_adv))
    for key, term in objective(outputs_of(objective, network, soft, x_adv)).items():
        torch.testing.assert_close(term, hard_terms[key])


@EVERY
def test_state_round_trip_resumes_bit_identically(name: str) -> None:
    """Five steps in one go equal two steps, a saved state, and three steps from it."""

    def trained(stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
        saved = None
        for begin, end in zip((0, *stops), (*stops, 5), strict=True):
            network = small_network()
            batch = small_batch()
            step = AdversarialStep(recipe_for(prepared(name, network, batch), network, batch), network)
            (optimizer,) = step.optimizers()
            if saved is not None:
                step.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            for number in range(begin, end):
                step(small_batch(seed=number), Progress(step=number, epochs=5, measured=MEASURED))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            saved = copy.deepcopy((step.state_dict(), optimizer.state_dict()))
        assert saved is not None
        return saved[0]

    whole, parts = trained(()), trained((2,))
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, parts[key]), key


@EVERY
def test_configuration_round_trip(name: str) -> None:
    objective = MAKE_OBJECTIVE[name]()
    networks = {guide: FurtherNetwork() for guide in objective.needs_networks}
    recipe = recipe_for(objective, small_network(), small_batch(), networks=networks)
    config = recipe_config(recipe)
    assert recipe_config(build_recipe(config)) == config


def first_of_each_kind() -> list[Any]:
    """Objectives by name; those that call the network as one before them does are slow tests."""
    seen, cases = set(), []
    for name, make in MAKE_OBJECTIVE.items():
        objective = make()
        calls = (objective.sides(PROGRESS), objective.taps, objective.needs_others, objective.needs_networks)
        if "," not in name:  # variants: the same graphs
            cases.append(pytest.param(name, marks=pytest.mark.slow if calls in seen else ()))
            seen.add(calls)
    return cases


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("name", first_of_each_kind())
def test_compiled_equals_eager(name: str, backend: str) -> None:
    """In float64: in float32 a gradient near zero may have another sign, which an attack turns into another image."""
    batch = small_batch(dtype=torch.float64)

    def losses(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        network = small_network(dtype=torch.float64)
        recipe = recipe_for(prepared(name, network, batch), network, batch)
        step = AdversarialStep(recipe, network, precision="fp64")
        if compiled:
            compile_in_place(network, backend=backend)
        (optimizer,) = step.optimizers()
        found = []
        for number in range(3):
            loss = step(batch, Progress(step=number, epochs=3, measured=MEASURED))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-9)
