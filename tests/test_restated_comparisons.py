"""Objectives that compare two predictions, against naive restatements in float64: TRADES, MART, ALP, ISEAT.

A restatement takes the logits twice: `rows`, and `still`, the same numbers where the paper stops the gradient. Finite
differences move `rows` alone, so that a gradient on the wrong side, missing or doubled shows up.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast.attacks.pgd import PGD
from holdfast.errors import HoldfastError
from holdfast.forward import Outputs, View
from holdfast.functional import rank_weight
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.asymmetric_trades import AsymmetricTRADES
from holdfast.objectives.base import Objective
from holdfast.objectives.logit_pairing import LogitPairing
from holdfast.objectives.logit_stability import LogitStability
from holdfast.objectives.mart import MART
from holdfast.objectives.trades import TRADES
from holdfast.schedule import Progress, after_first_decay, constant, linear, piecewise
from holdfast.step import AdversarialStep
from parts import small_recipe
from test_restated_objectives import (
    CLASSES,
    ROWS,
    Case,
    Rows,
    close,
    entropy_against,
    finite_difference,
    one_hot,
    restated_adv_ce,
    softmax,
)

Named = dict[str, Rows]
Restate = Callable[[Named, Named], dict[str, list[float]]]
LOOSE = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
BEFORE, AFTER = Progress(step=49, epochs=100), Progress(step=50, epochs=100)


def divergence(p_row: list[float], q_row: list[float]) -> float:
    """The sum over the classes of p log(p / q), where both rows are logits."""
    return sum(p * math.log(p / q) for p, q in zip(softmax(p_row), softmax(q_row), strict=True))


def squared_distance(one: list[float], other: list[float]) -> float:
    """The sum over the classes of the squared difference."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def tensors_of(case: Case) -> dict[str, Tensor]:
    """Logits by side, with a third set for the adversarial images at unperturbed weights."""
    third = torch.randn(case.adv.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return {"clean": case.clean, "adv": case.adv, "adv_unperturbed": third.requires_grad_()}


def terms_of(objective: Objective, case: Case, progress: Progress | None = None) -> dict[str, Tensor]:
    """The terms, where the objective is given the sides that it asks for and no others."""
    forward = case.forward(progress=progress)
    outputs = {side: Outputs(tensors_of(case)[side], {}) for side in objective.sides(forward.progress)}
    return dict(objective(forward._replace(outputs=outputs)))


def check(objective: Objective, case: Case, restate: Restate, sides: Sequence[str] = ("clean", "adv")) -> None:
    """Every term equals its restatement, and so does its gradient with respect to the logits of every side."""
    assert objective.sides(Progress()) == tuple(sides)
    tensors = {side: tensors_of(case)[side] for side in sides}
    terms = objective(case.forward()._replace(outputs={side: Outputs(t, {}) for side, t in tensors.items()}))
    rows = {side: tensor.tolist() for side, tensor in tensors.items()}
    expected = restate(rows, rows)
    assert set(terms) == set(expected)
    share = case.cotangent.tolist()

    def slopes(name: str, side: str) -> Tensor:
        def total(moved: Rows) -> float:
            return sum(s * v for s, v in zip(share, restate({**rows, side: moved}, rows)[name], strict=True))

        return finite_difference(total, rows[side])

    for name, term in terms.items():
        assert close(term, expected[name]), name
        found = torch.autograd.grad((term * case.cotangent).sum(), list(tensors.values()), **LOOSE)
        for side, gradient in zip(sides, found, strict=True):
            assert close(gradient, slopes(name, side), 1e-7), (name, side)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("beta", [None, 0.7])
def test_trades_is_the_clean_entropy_and_the_divergence_of_both_predictions(soft: bool, beta: float | None) -> None:
    case = Case(20, soft=soft)
    targets = case.plain[3]

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = zip(rows["clean"], rows["adv"], strict=True)
        strength = 6.0 if beta is None else beta
        return {
            "clean_ce": restated_adv_ce(rows["clean"], targets),
            "kl": [strength * divergence(clean, adv) for clean, adv in pairs],
        }

    check(TRADES() if beta is None else TRADES(beta=beta), case, restate)
    assert TRADES.zero_at_equality == ("kl",)


def restated_mart(rows: Named, y: list[int], targets: Rows, beta: float) -> dict[str, list[float]]:
    """Boosted cross-entropy and weighted divergence; the label is the hard one wherever a class is singled out."""
    boosted, weighted = [], []
    for clean, adv, label, target in zip(rows["clean"], rows["adv"], y, targets, strict=True):
        runner_up = max(p for k, p in enumerate(softmax(adv)) if k != label)
        boosted.append(entropy_against(adv, target) - math.log(1.0001 - runner_up + 1e-12))
        weighted.append(beta * divergence(clean, adv) * (1.0000001 - softmax(clean)[label]))
    return {"boosted_ce": boosted, "weighted_kl": weighted}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("beta", [None, 0.7])
def test_mart_is_the_boosted_entropy_and_the_weighted_divergence(soft: bool, beta: float | None) -> None:
    case = Case(21, soft=soft)
    y, targets = case.plain[2:]
    with torch.no_grad():
        case.adv[range(4), y[:4]] += 5.0  # these rows are told right, the others wrong
    assert (case.adv.argmax(1) == case.y).tolist() == [True] * 4 + [False] * 3
    objective = MART() if beta is None else MART(beta=beta)
    check(objective, case, lambda rows, still: restated_mart(rows, y, targets, beta or 5.0))


def test_mart_keeps_its_small_constants_where_predictions_are_certain() -> None:
    case = Case(23)
    far = torch.tensor(one_hot(case.y.tolist()), dtype=torch.float64) * 30.0
    wrong = far.roll(1, 1)
    case.clean, case.adv = far, wrong
    clean, adv, y, targets = case.plain
    expected = restated_mart({"clean": clean, "adv": adv}, y, targets, 5.0)
    terms = MART()(case.forward())
    assert close(terms["boosted_ce"], expected["boosted_ce"], 1e-11)
    assert close(terms["weighted_kl"], expected["weighted_kl"], 1e-11)
    # Certain beyond rounding: the numbers that are left are the constants'
    case.clean, case.adv = (100 * far).requires_grad_(), (100 * wrong).requires_grad_()
    terms = MART()(case.forward())
    assert close(terms["boosted_ce"], [3000.0 - math.log(1e-4 + 1e-12)] * ROWS, 1e-11)
    assert close(terms["weighted_kl"], [5.0 * 3000.0 * 1e-7] * ROWS, 1e-8)
    (terms["boosted_ce"] + terms["weighted_kl"]).sum().backward()
    assert torch.isfinite(case.clean.grad).all()
    assert torch.isfinite(case.adv.grad).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("settings", [{}, {"strength": 0.3, "clean_weight": 0.8}])
def test_logit_pairing_weighs_two_entropies_and_the_mean_squared_gap(soft: bool, settings: dict) -> None:
    case = Case(24, soft=soft)
    targets = case.plain[3]
    strength, share = settings.get("strength", 1.0), settings.get("clean_weight", 0.5)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = zip(rows["clean"], rows["adv"], strict=True)
        return {
            "clean_ce": [share * value for value in restated_adv_ce(rows["clean"], targets)],
            "adv_ce": [(1 - share) * value for value in restated_adv_ce(rows["adv"], targets)],
            "pairing": [strength * squared_distance(clean, adv) / CLASSES for clean, adv in pairs],
        }

    check(LogitPairing(**settings), case, restate)
    assert LogitPairing.zero_at_equality == ("pairing",)


@pytest.mark.parametrize("detach_clean", [True, False])
@pytest.mark.parametrize(("beta", "share"), [(None, 0.0), (2.0, 0.4)])
def test_asymmetric_trades_stops_the_clean_gradient(detach_clean: bool, beta: float | None, share: float) -> None:
    case = Case(25, soft=share > 0)
    targets = case.plain[3]
    strength = 6.0 if beta is None else beta

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        source = still["clean"] if detach_clean else rows["clean"]
        terms = {
            "clean_ce": restated_adv_ce(rows["clean"], targets),
            "kl": [strength * divergence(clean, adv) for clean, adv in zip(source, rows["adv"], strict=True)],
        }
        if share:
            terms["adv_ce"] = [share * value for value in restated_adv_ce(rows["adv"], targets)]
        return terms

    settings = {} if beta is None else {"beta": beta, "adversarial_weight": share}
    settings |= {} if detach_clean else {"detach_clean": False}
    check(AsymmetricTRADES(**settings), case, restate)


def test_the_predictor_of_asymmetric_trades_reads_the_adversarial_logits_alone() -> None:
    case = Case(26)
    objective = AsymmetricTRADES(beta=2.0, predictor=True, predictor_ratio=0.7)
    network = small_network()
    objective.prepare(network, torch.rand(2, 1, 8, 8))
    assert (network.training, int(network[1].num_batches_tracked)) == (True, 0)  # it looks without a trace
    objective.double()
    first, last = (module for module in objective.modules() if isinstance(module, nn.Linear))
    (norm,) = (module for module in objective.modules() if isinstance(module, nn.BatchNorm1d))
    assert (first.in_features, first.out_features, last.out_features, first.bias) == (5, 3, 5, None)  # 3 = int(5 * 0.7)
    nn.init.normal_(norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(norm.bias, 0.0, 0.3, generator=torch.Generator().manual_seed(1))
    hidden = case.adv @ first.weight.T
    spread = ((hidden - hidden.mean(0)) ** 2).mean(0)
    hidden = ((hidden - hidden.mean(0)) / (spread + norm.eps).sqrt() * norm.weight + norm.bias).clamp_min(0)
    p, q = case.clean.detach().softmax(1), (hidden @ last.weight.T + last.bias).softmax(1)
    expected = 2.0 * (p * (p.log() - q.log())).sum(1)
    term = terms_of(objective, case)["kl"]
    assert close(term, expected.detach(), 1e-10)
    leaves = [case.adv, first.weight, norm.weight, norm.bias, last.weight, last.bias]
    found = torch.autograd.grad((term * case.cotangent).sum(), [*leaves, case.clean], **LOOSE)
    assert not found[-1].any()
    for gradient, wanted in zip(found, torch.autograd.grad((expected * case.cotangent).sum(), leaves), strict=False):
        assert close(gradient, wanted, 1e-9)


def restated_ranks(rows: Named, targets: Rows) -> list[int]:
    """How many rows of the batch lose more by the attack (eq. 13, 14)."""
    loss = {side: restated_adv_ce(rows[side], targets) for side in ("clean", "adv")}
    gains = [adv - clean for adv, clean in zip(loss["adv"], loss["clean"], strict=True)]
    return [sum(other > gain for other in gains) for gain in gains]


DEFAULTS = {"weights": "linear", "distance": "squared_l2", "compared": "adv"}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("compared", ["adv", "adv_unperturbed"])
@pytest.mark.parametrize("distance", ["squared_l2", "kl"])
@pytest.mark.parametrize("weights", ["linear", "top", "uniform"])
def test_logit_stability_follows_equations_13_to_15(weights: str, distance: str, compared: str, soft: bool) -> None:
    case = Case(27, soft=soft)
    targets = case.plain[3]

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        stability = []
        for i, rank in enumerate(restated_ranks(still, targets)):
            weight = {"linear": 1 - rank / ROWS, "top": float(rank < 3), "uniform": 1.0}[weights]  # 3 = ceil(0.4 * 7)
            gap = squared_distance if distance == "squared_l2" else divergence
            stability.append(0.1 * weight * gap(rows["clean"][i], rows[compared][i]))
        return {"adv_ce": restated_adv_ce(rows["adv"], targets), "stability": stability}

    unusual = {"weights": weights, "distance": distance, "compared": compared}.items() - DEFAULTS.items()
    objective = LogitStability(**dict(unusual), **({"top_share": 0.4} if weights == "top" else {}))
    check(objective, case, restate, ("clean", "adv", "adv_unperturbed")[: 3 if compared == "adv_unperturbed" else 2])
    assert objective.couples_batch
    assert objective.zero_at_equality == ("stability",)


@pytest.mark.parametrize(
    ("rows", "share"), [(7, "0.1"), (10, "0.1"), (30, "0.1"), (100, "0.07"), (7, "1"), (7, "0.001"), (8, "0.5")]
)
def test_equation_7_pairs_the_most_vulnerable_tenth_alone(rows: int, share: str) -> None:
    case = Case(29)
    generator = torch.Generator().manual_seed(rows)
    case.clean, case.adv = torch.randn(2, rows, CLASSES, generator=generator, dtype=torch.float64)
    case.y = torch.randint(CLASSES, (rows,), generator=generator)
    clean, adv, _, targets = case.plain
    chosen = math.ceil(Fraction(share) * rows)  # exact: 0.07 * 100 is above 7 in floating point
    ranks = restated_ranks({"clean": clean, "adv": adv}, targets)
    expected = [4.0 * squared_distance(clean[i], adv[i]) * (rank < chosen) for i, rank in enumerate(ranks)]
    settings = {} if share == "0.1" else {"top_share": float(share)}
    assert close(LogitStability(strength=4.0, weights="top", **settings)(case.forward())["stability"], expected)


def test_rank_weight_counts_down_from_one_for_the_highest() -> None:
    vulnerability = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    weights = rank_weight(vulnerability)
    assert close(weights, [0.5, 0.25, 1.0, 0.75])
    assert not weights.requires_grad
    torch.testing.assert_close(rank_weight(torch.tensor([-5.0])), torch.ones(1))
    everyone = torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = [sum(other > value for other in everyone.tolist()) for value in everyone.tolist()]
    assert close(rank_weight(everyone), [1 - rank / 128 for rank in ranks])
    assert rank_weight(torch.zeros(9)).sum().item() == pytest.approx(5.0)  # ties share out the same total


@pytest.mark.parametrize("compared", ["adv", "adv_unperturbed"])
@pytest.mark.parametrize("weights", ["linear", "top", "uniform"])
def test_a_permutation_of_rows_permutes_the_terms(weights: str, compared: str) -> None:
    case, moved = Case(30), Case(30)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    objective = LogitStability(weights=weights, compared=compared, top_share=0.3)
    outputs = {side: Outputs(tensor, {}) for side, tensor in tensors_of(case).items()}
    moved.y = case.y[order]
    before = objective(case.forward()._replace(outputs=outputs))
    after = objective(moved.forward()._replace(outputs={s: Outputs(o.logits[order], {}) for s, o in outputs.items()}))
    for name, term in before.items():
        assert close(after[name], term[order].detach())


def test_nobody_pays_for_a_side_while_the_strength_is_zero() -> None:
    case, both = Case(32), ("clean", "adv")
    late = piecewise((0, 0.0), (0.5, 2.0))
    for make, kept, rest in (
        (lambda value: TRADES(beta=value), "clean_ce", ("clean",)),
        (lambda value: MART(beta=value), "boosted_ce", ("adv",)),
        (lambda value: LogitStability(strength=value), "adv_ce", ("adv",)),
    ):
        objective = make(late)
        assert objective.sides(BEFORE) == rest
        assert objective.sides(AFTER) == both
        assert [make(value).sides(Progress()) for value in (0.0, constant(0.0), 0.1)] == [rest, rest, both]
        early, whole = terms_of(objective, case, BEFORE), terms_of(objective, case, AFTER)
        assert close(early.pop(kept), whole[kept].detach())
        assert all((term == 0).all() for term in early.values())
    assert LogitPairing(strength=late).sides(BEFORE) == both
    stable = LogitStability(strength=after_first_decay(0.1), compared="adv_unperturbed")
    assert stable.sides(Progress(stage=0)) == ("adv",)
    assert stable.sides(Progress(stage=1)) == (*both, "adv_unperturbed")


def test_asymmetric_trades_needs_no_attack_while_neither_weight_is_above_zero() -> None:
    case, late = Case(36), piecewise((0, 0.0), (0.5, 2.0))
    weighted = AsymmetricTRADES(beta=0.0, adversarial_weight=late)
    assert weighted.sides(AFTER) == ("clean", "adv")
    entropy = [2.0 * value for value in restated_adv_ce(case.plain[1], case.plain[3])]
    assert close(terms_of(weighted, case, AFTER)["adv_ce"], entropy)
    assert "adv_ce" not in terms_of(weighted, case, BEFORE)
    assert weighted.sides(BEFORE) == ("clean",)


def test_scheduled_strengths_are_read_at_the_progress_of_the_step() -> None:
    case = Case(33)
    for make, name in (
        (lambda value: TRADES(beta=value), "kl"),
        (lambda value: MART(beta=value), "weighted_kl"),
        (lambda value: LogitPairing(strength=value), "pairing"),
        (lambda value: AsymmetricTRADES(beta=value), "kl"),
        (lambda value: LogitStability(strength=value), "stability"),
    ):
        unit = terms_of(make(1.0), case)[name].detach()
        for step in (10, 80):
            progress = Progress(step=step, steps_per_epoch=10, epochs=10)
            assert close(terms_of(make(linear(0, 4)), case, progress)[name], unit * 4 * step / 100)


@pytest.mark.parametrize("objective", [TRADES(), AsymmetricTRADES(), AsymmetricTRADES(detach_clean=False)])
def test_the_inner_loss_is_the_divergence_from_one_clean_prediction(objective: Objective) -> None:
    case, calls = Case(34), []
    network, batch = small_network(dtype=torch.float64).eval(), small_batch(rows=ROWS, dtype=torch.float64)
    network.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    loss = objective.inner_loss(View(network), batch, Progress())
    others = (case.clean, case.adv)
    found = [loss(logits) for logits in others]
    assert len(calls) == 1
    assert torch.equal(calls[0], batch.x)
    clean = network(batch.x).detach()
    for value, logits in zip(found, others, strict=True):
        assert close(value, [divergence(p, q) for p, q in zip(clean.tolist(), logits.tolist(), strict=True)])
    (found[1] * case.cotangent).sum().backward()
    assert close(case.adv.grad, ((case.adv.softmax(1) - clean.softmax(1)) * case.cotangent[:, None]).detach(), 1e-10)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not loss(case.adv.detach()).requires_grad
    assert objective.inner_passes(Progress()) == 1.0
    assert objective.needs_random_start


@pytest.mark.parametrize(("objective", "extra"), [(TRADES(), 1), (AsymmetricTRADES(), 1), (MART(), 0)])
def test_a_step_predicts_the_clean_images_once_for_its_attack(objective: Objective, extra: int) -> None:
    network, calls = small_network(), []
    network.register_forward_hook(lambda module, inputs, output: calls.append(1))
    step = AdversarialStep(small_recipe(objective, attack=PGD(steps=3, step_size=0.05)), network)
    step(small_batch(), Progress())
    assert len(calls) == extra + 3 + 2
    assert objective.inner_passes(Progress()) == float(extra)


@pytest.mark.parametrize("objective", [AdversarialTraining(), MART(), LogitPairing(), LogitStability()])
def test_the_other_attacks_climb_the_entropy_of_the_hard_label(objective: Objective) -> None:
    case = Case(35, soft=True)
    _, adv, y, _ = case.plain
    loss = objective.inner_loss(View(nn.Flatten()), case.forward().batch, Progress())
    assert close(loss(case.adv), restated_adv_ce(adv, one_hot(y)))
    assert objective.inner_passes(Progress()) == 0.0
    assert not objective.needs_random_start


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *((make, {"beta": value}) for make in (TRADES, MART, AsymmetricTRADES) for value in (-1.0, float("nan"), "x")),
        *((make, {"strength": value}) for make in (LogitPairing, LogitStability) for value in (-1.0, float("inf"))),
        *((LogitPairing, {"clean_weight": value}) for value in (-0.1, 1.1, float("nan"))),
        *((AsymmetricTRADES, {"adversarial_weight": value}) for value in (-1.0, float("nan"))),
        *((AsymmetricTRADES, {"predictor": True, "predictor_ratio": value}) for value in (0.0, -1.0, float("nan"))),
        *((LogitStability, {"weights": "top", "top_share": value}) for value in (0.0, -0.1, 1.1, float("nan"))),
        *((LogitStability, {name: "cosine"}) for name in ("weights", "distance", "compared")),
        (LogitStability, {"compared": "clean"}),
    ],
)
def test_bad_values_are_refused(make: Callable[..., Objective], settings: dict) -> None:
    with pytest.raises(HoldfastError):
        make(**settings)
