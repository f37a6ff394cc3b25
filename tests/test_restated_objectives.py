"""Each objective in float64 against a naive restatement of its paper's equation, row by row and class by class."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Forward, Outputs, View
from holdfast.functional import cross_entropy, kl, margin, probability_of
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.standard import StandardTraining
from holdfast.schedule import Progress, constant, linear, piecewise

ROWS, CLASSES = 7, 5
Rows = list[list[float]]


def softmax(row: list[float]) -> list[float]:
    """The definition, without any shift."""
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def entropy_against(row: list[float], target: list[float]) -> float:
    """Minus the sum of t log p over the classes."""
    return -sum(share * math.log(probability) for share, probability in zip(target, softmax(row), strict=True))


def direction(row: list[float]) -> list[float]:
    """The row divided by its Euclidean length."""
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def squared_gap(clean: list[float], adv: list[float]) -> float:
    """The norm of eq. (5), squared."""
    return sum((a - b) ** 2 for a, b in zip(direction(clean), direction(adv), strict=True))


def restated_nmse(clean: Rows, adv: Rows, y: list[int], strength: float, weights: list[float] | None = None) -> list:
    """Strength times eq. (5) for every row; `weights` freezes the factor 1 - p."""
    terms = []
    for i, label in enumerate(y):
        weight = 1 - softmax(clean[i])[label] if weights is None else weights[i]
        terms.append(strength * weight * squared_gap(clean[i], adv[i]))
    return terms


def restated_adv_ce(adv: Rows, targets: Rows) -> list[float]:
    """The first term of eq. (6) for every row."""
    return [entropy_against(row, target) for row, target in zip(adv, targets, strict=True)]


def one_hot(y: list[int]) -> Rows:
    """Hard labels as rows of 0 and 1."""
    return [[1.0 if k == label else 0.0 for k in range(CLASSES)] for label in y]


def finite_difference(function: Callable[[Rows], float], at: Rows, step: float = 1e-6) -> Tensor:
    """Central differences of a function of rows of numbers."""
    slopes = torch.zeros(len(at), len(at[0]), dtype=torch.float64)
    for i in range(len(at)):
        for k in range(len(at[0])):
            values = []
            for sign in (1, -1):
                moved = [list(row) for row in at]
                moved[i][k] += sign * step
                values.append(function(moved))
            slopes[i, k] = (values[0] - values[1]) / (2 * step)
    return slopes


class Case:
    """Random logits and labels, as tensors and as plain numbers."""

    def __init__(self, seed: int, scale: float = 1.5, soft: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (ROWS, CLASSES)
        self.clean = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        self.adv = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        self.y = torch.randint(CLASSES, (ROWS,), generator=generator)
        mixed = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.target = mixed / mixed.sum(1, keepdim=True) if soft else None
        self.cotangent = torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.5

    @property
    def plain(self) -> tuple[Rows, Rows, list[int], Rows]:
        """Clean and adversarial logits, labels and targets."""
        labels = self.y.tolist()
        targets = one_hot(labels) if self.target is None else self.target.tolist()
        return self.clean.tolist(), self.adv.tolist(), labels, targets

    def forward(self, sides: tuple[str, ...] = ("clean", "adv"), progress: Progress | None = None) -> Forward:
        """What the objective sees."""
        logits = {"clean": self.clean, "adv": self.adv}
        batch = Batch(torch.zeros(ROWS, 1, 2, 2, dtype=torch.float64), self.y, target=self.target)
        attacked = Attacked(batch.x, torch.zeros(ROWS, dtype=torch.long)) if "adv" in sides else None
        outputs = {side: Outputs(logits[side], {}) for side in sides}
        return Forward(batch, outputs, attacked, progress or Progress())


def close(found: Tensor, expected: list[float] | Tensor, tolerance: float = 1e-12) -> bool:
    """Equal up to rounding in float64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return found.shape == expected.shape and torch.allclose(found.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("detach_weight", [False, True])
@pytest.mark.parametrize("strength", [5.0, 0.5])
def test_nmse_terms_follow_equations_5_and_6(soft: bool, detach_weight: bool, strength: float) -> None:
    for seed in range(5):
        case = Case(seed, soft=soft)
        clean, adv, y, targets = case.plain
        terms = NormalizedMSE(strength=strength, detach_weight=detach_weight)(case.forward())
        assert set(terms) == {"adv_ce", "nmse"}
        assert close(terms["adv_ce"], restated_adv_ce(adv, targets))
        assert close(terms["nmse"], restated_nmse(clean, adv, y, strength))


def test_paper_strength_is_five() -> None:
    case = Case(0)
    clean, adv, y, _ = case.plain
    assert close(NormalizedMSE()(case.forward())["nmse"], restated_nmse(clean, adv, y, 5.0))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("detach_weight", [False, True])
def test_nmse_gradients_are_finite_differences_of_the_equation(soft: bool, detach_weight: bool) -> None:
    case = Case(11, soft=soft)
    clean, adv, y, targets = case.plain
    share = case.cotangent.tolist()
    frozen = [1 - softmax(row)[label] for row, label in zip(clean, y, strict=True)] if detach_weight else None

    def total(clean_rows: Rows, adv_rows: Rows) -> float:
        """Weighted sum of both terms over the rows."""
        nmse = restated_nmse(clean_rows, adv_rows, y, 5.0, frozen)
        entropy = restated_adv_ce(adv_rows, targets)
        return sum(s * (a + b) for s, a, b in zip(share, nmse, entropy, strict=True))

    terms = NormalizedMSE(detach_weight=detach_weight)(case.forward())
    ((terms["adv_ce"] + terms["nmse"]) * case.cotangent).sum().backward()
    assert close(case.clean.grad, finite_difference(lambda rows: total(rows, adv), clean), 1e-7)
    assert close(case.adv.grad, finite_difference(lambda rows: total(clean, rows), adv), 1e-7)


def test_detaching_the_weight_changes_the_clean_gradient_only() -> None:
    gradients = []
    for detach_weight in (False, True):
        case = Case(3)
        NormalizedMSE(detach_weight=detach_weight)(case.forward())["nmse"].sum().backward()
        gradients.append((case.clean.grad, case.adv.grad))
    (clean_through, adv_through), (clean_detached, adv_detached) = gradients
    assert close(adv_through, adv_detached)
    assert ((clean_through - clean_detached).abs().amax(1) > 1e-3).all()
    # The difference is the gradient of the weight alone, -strength * gap * dp_y/df, with dp_y/df_k = p_y (1[k=y] - p_k)
    case = Case(3)
    clean, adv, y, _ = case.plain
    expected = []
    for i, label in enumerate(y):
        p = softmax(clean[i])
        gap = squared_gap(clean[i], adv[i])
        expected.append([-5.0 * gap * p[label] * ((k == label) - p[k]) for k in range(CLASSES)])
    assert close(clean_through - clean_detached, torch.tensor(expected, dtype=torch.float64), 1e-11)


def test_detached_clean_gradient_has_no_component_along_the_logits() -> None:
    case = Case(4)
    NormalizedMSE(detach_weight=True)(case.forward())["nmse"].sum().backward()
    assert case.clean.grad.norm() > 0.1
    assert (case.clean.grad * case.clean).sum(1).abs().max() < 1e-12
    assert (case.adv.grad * case.adv).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-4, 0.3, 40.0])
def test_nmse_ignores_the_scale_of_the_adversarial_logits(scale: float) -> None:
    case, scaled = Case(5), Case(5)
    factor = scale * torch.arange(1, ROWS + 1, dtype=torch.float64)[:, None]
    scaled.adv = (scaled.adv * factor).detach()
    plain = NormalizedMSE()(case.forward())
    assert close(NormalizedMSE()(scaled.forward())["nmse"], plain["nmse"].detach())
    assert not close(NormalizedMSE()(scaled.forward())["adv_ce"], plain["adv_ce"].detach(), 1e-3)


def test_scaling_the_clean_logits_changes_the_weight_and_not_the_distance() -> None:
    case, scaled = Case(6), Case(6)
    scaled.clean = (3.0 * scaled.clean).detach()
    clean, adv, y, _ = case.plain
    for row, (found, label) in enumerate(zip(NormalizedMSE()(scaled.forward())["nmse"].tolist(), y, strict=True)):
        weight = 1 - softmax([3.0 * value for value in clean[row]])[label]
        assert found == pytest.approx(5.0 * weight * squared_gap(clean[row], adv[row]), rel=1e-12)


def test_distance_is_two_minus_twice_the_cosine() -> None:
    case = Case(7)
    clean, adv, y, _ = case.plain
    terms = NormalizedMSE(strength=1.0)(case.forward())["nmse"].tolist()
    for i, label in enumerate(y):
        cosine = sum(a * b for a, b in zip(direction(clean[i]), direction(adv[i]), strict=True))
        assert terms[i] == pytest.approx((1 - softmax(clean[i])[label]) * 2 * (1 - cosine), rel=1e-12)


def test_nmse_lies_between_zero_and_four_times_the_strength_and_reaches_both_ends() -> None:
    for seed in range(20):
        terms = NormalizedMSE(strength=3.0)(Case(seed, scale=4.0).forward())["nmse"]
        assert (terms >= 0).all()
        assert (terms <= 12.0).all()
    equal, opposite = Case(8), Case(8)
    equal.adv = equal.clean.detach().clone()
    opposite.adv = -opposite.clean.detach()
    assert NormalizedMSE(strength=3.0)(equal.forward())["nmse"].abs().max() == 0
    assert "nmse" in NormalizedMSE.zero_at_equality
    clean, _, y, _ = opposite.plain
    expected = [12.0 * (1 - softmax(row)[label]) for row, label in zip(clean, y, strict=True)]
    assert close(NormalizedMSE(strength=3.0)(opposite.forward())["nmse"], expected)
    worst = Case(8)
    worst.clean = torch.zeros(ROWS, CLASSES, dtype=torch.float64).scatter(1, worst.y[:, None], -60.0)
    worst.adv = -worst.clean
    assert close(NormalizedMSE(strength=3.0)(worst.forward())["nmse"], [12.0] * ROWS)


def test_rows_do_not_touch_each_other() -> None:
    case, changed = Case(9), Case(9)
    rows = changed.adv.detach().clone()
    rows[0, 0] += 1.0
    changed.adv = rows
    before, after = NormalizedMSE()(case.forward()), NormalizedMSE()(changed.forward())
    for name in before:
        assert torch.equal(before[name][1:], after[name][1:])
        assert before[name][0] != after[name][0]


def test_zero_logits_give_finite_terms_and_gradients() -> None:
    case = Case(10)
    case.clean = torch.zeros(ROWS, CLASSES, dtype=torch.float64, requires_grad=True)
    case.adv = torch.zeros(ROWS, CLASSES, dtype=torch.float64, requires_grad=True)
    terms = NormalizedMSE()(case.forward())
    sum(term.sum() for term in terms.values()).backward()
    assert all(torch.isfinite(term).all() for term in terms.values())
    assert torch.isfinite(case.clean.grad).all()
    assert torch.isfinite(case.adv.grad).all()


def test_sides_follow_the_strength_so_that_nobody_pays_for_an_unread_forward() -> None:
    assert NormalizedMSE(strength=0.0).sides(Progress()) == ("adv",)
    assert NormalizedMSE(strength=0.1).sides(Progress()) == ("clean", "adv")
    assert NormalizedMSE(strength=constant(0.0)).sides(Progress()) == ("adv",)
    rising = NormalizedMSE(strength=piecewise((0, 0.0), (0.5, 5.0)))
    before, after = Progress(step=49, epochs=100), Progress(step=50, epochs=100)
    assert rising.sides(before) == ("adv",)
    assert rising.sides(after) == ("clean", "adv")
    case = Case(12)
    clean, adv, y, targets = case.plain
    terms = rising(case.forward(("adv",), before))
    assert close(terms.pop("adv_ce"), restated_adv_ce(adv, targets))
    assert all((term == 0).all() for term in terms.values())
    assert close(rising(case.forward(progress=after))["nmse"], restated_nmse(clean, adv, y, 5.0))


def test_scheduled_strength_is_read_at_the_progress_of_the_step() -> None:
    case = Case(13)
    clean, adv, y, _ = case.plain
    objective = NormalizedMSE(strength=linear(0, 4))
    for step in (10, 25, 80):
        found = objective(case.forward(progress=Progress(step=step, steps_per_epoch=10, epochs=10)))["nmse"]
        assert close(found, restated_nmse(clean, adv, y, 4 * step / 100))


@pytest.mark.parametrize("strength", [-1.0, float("nan"), "much"])
def test_a_strength_that_is_none_is_refused(strength: float) -> None:
    with pytest.raises(HoldfastError):
        NormalizedMSE(strength=strength)


@pytest.mark.parametrize("soft", [False, True])
def test_adversarial_training_is_the_entropy_of_the_adversarial_side(soft: bool) -> None:
    case = Case(14, soft=soft)
    _, adv, _, targets = case.plain
    objective = AdversarialTraining()
    assert objective.sides(Progress()) == ("adv",)
    terms = objective(case.forward(("adv",)))
    assert set(terms) == {"adv_ce"}
    assert close(terms["adv_ce"], restated_adv_ce(adv, targets))
    (terms["adv_ce"] * case.cotangent).sum().backward()
    expected = [
        [share * (sum(target) * p - t) for p, t in zip(softmax(row), target, strict=True)]
        for row, target, share in zip(adv, targets, case.cotangent.tolist(), strict=True)
    ]
    assert close(case.adv.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("soft", [False, True])
def test_standard_training_is_the_entropy_of_the_clean_side(soft: bool) -> None:
    case = Case(15, soft=soft)
    clean, _, _, targets = case.plain
    objective = StandardTraining()
    assert objective.sides(Progress()) == ("clean",)
    terms = objective(case.forward(("clean",)))
    assert set(terms) == {"clean_ce"}
    assert close(terms["clean_ce"], restated_adv_ce(clean, targets))
    (terms["clean_ce"] * case.cotangent).sum().backward()
    slopes = finite_difference(
        lambda rows: sum(s * e for s, e in zip(case.cotangent.tolist(), restated_adv_ce(rows, targets), strict=True)),
        clean,
    )
    assert close(case.clean.grad, slopes, 1e-7)


@pytest.mark.parametrize("objective", [AdversarialTraining(), NormalizedMSE()])
def test_inner_loss_is_the_entropy_against_hard_labels(objective: nn.Module) -> None:
    case = Case(16, soft=True)
    _, adv, y, _ = case.plain
    batch = case.forward().batch
    loss = objective.inner_loss(View(nn.Flatten()), batch, Progress())
    assert close(loss(case.adv), restated_adv_ce(adv, one_hot(y)))


def test_functional_quantities_restated() -> None:
    case = Case(17, soft=True)
    clean, adv, y, targets = case.plain
    assert close(cross_entropy(case.adv, case.y), restated_adv_ce(adv, one_hot(y)))
    assert close(cross_entropy(case.adv, case.target), restated_adv_ce(adv, targets))
    divergences, margins, probabilities = [], [], []
    for i, label in enumerate(y):
        p, q = softmax(clean[i]), softmax(adv[i])
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        margins.append(clean[i][label] - max(value for k, value in enumerate(clean[i]) if k != label))
        probabilities.append(p[label])
    assert close(kl(case.clean, case.adv), divergences)
    assert close(margin(case.clean, case.y), margins)
    assert close(probability_of(case.clean, case.y), probabilities)
    assert close(kl(case.clean, case.clean), [0.0] * ROWS)


def test_entropy_stays_exact_where_the_plain_definition_overflows() -> None:
    logits = torch.tensor([[2000.0, 0.0, 0.0], [0.0, 2000.0, 0.0]], dtype=torch.float64)
    assert cross_entropy(logits, torch.tensor([0, 0])).tolist() == [0.0, 2000.0]
    assert margin(logits, torch.tensor([0, 0])).tolist() == [2000.0, -2000.0]
