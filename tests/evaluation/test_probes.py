"""Probes: what they leave alone, what they refuse, and where their thresholds lie."""

from __future__ import annotations

import copy
import cProfile
import math
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from broken_defences import BALL, ZOO, Around, Purifier, StaysInTraining, digits, honest_network, in_place, probed
from torch import Tensor, nn

from holdfast import L1, L2, Batch, HoldfastError, Linf
from holdfast.evaluation import probes
from holdfast.evaluation.flags import as_dict
from holdfast.evaluation.probed_model import ProbedModel, left_as_it_was, probed_model
from holdfast.evaluation.probes import probe
from holdfast.functional import margin
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@pytest.fixture
def images() -> Batch:
    """Sixty-four test digits."""
    return digits()


@pytest.fixture
def honest() -> nn.Module:
    """An adversarially trained network, for the test alone."""
    return copy.deepcopy(honest_network(0.15))


# --------------------------------------------------------------------------------------------------- no side effects


def state_of(model: nn.Module) -> list[Any]:
    """All that a probe must leave alone."""
    modules = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    tensors = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    owned = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return [modules, tensors, owned]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


WRITES = ("dropout put back on", "batch statistics", "purifies with gradients", "partly in training mode")


@pytest.mark.parametrize("name", ["honest", "writes into its input", *WRITES])
def test_nothing_is_changed(name: str, honest: nn.Module, images: Batch) -> None:
    """Training flags, parameters, buffers, gradients, and the random state of torch, Python and NumPy."""
    images = Batch(images.x[:8], images.y[:8])
    inside = {"honest": honest, "writes into its input": Around(honest, in_place)}
    model = inside[name] if name in inside else ZOO[name].make(honest, images.x)
    first = next(model.parameters())
    first.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.full_like(last, 3.0)
    before, x, y = state_of(model), images.x.clone(), images.y.clone()
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with torch.no_grad():
        probed(model, images)
        assert not torch.is_grad_enabled()
    assert same(before, state_of(model))
    assert torch.equal(x, images.x)
    assert torch.equal(y, images.y)
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    assert draws[2] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_nothing_is_changed_by_an_exception(honest: nn.Module, images: Batch) -> None:
    """A model that changes its mode, draws, and then fails at the second call."""

    class Fails(StaysInTraining):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            random.random()
            np.random.rand()  # noqa: NPY002
            if self.calls > 1:
                raise KeyError("no more")
            return super().forward(x)

    model = Fails(honest).eval()
    before = state_of(model)
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with pytest.raises(HoldfastError, match="no more"):
        probed(model, images)
    assert same(before, state_of(model))
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    assert draws[2] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_a_probe_repeats_itself(honest: nn.Module, images: Batch) -> None:
    """The same key gives the same figures, of a model that draws too, whatever was drawn before."""
    images = Batch(images.x[:16], images.y[:16])
    for name in ("noise", "ripples"):
        model = ZOO[name].make(honest, images.x)
        first = [as_dict(flag) for flag in probed(model, images).values()]
        torch.rand(3)
        assert first == [as_dict(flag) for flag in probed(model, images).values()]


def test_profiler_is_put_back(honest: nn.Module, images: Batch) -> None:
    """The watch on the gradient engine ends with the probe, and takes no place that is a person's own."""
    few = Batch(images.x[:2], images.y[:2])
    assert probed(Purifier(honest), few)["optimises-at-inference"].values["calls"] == 1
    assert sys.getprofile() is None

    def own(*_: Any) -> None:
        """A function that a person has given to `sys.setprofile`."""

    sys.setprofile(own)
    try:
        found, kept = probed(Purifier(honest), few), sys.getprofile()
    finally:
        sys.setprofile(None)
    assert kept is own
    assert "optimises-at-inference" not in found


def test_cprofile_sees_what_comes_after_the_probe(honest: nn.Module, images: Batch) -> None:
    """Up to Python 3.11 it is what `sys.getprofile` tells; from 3.12 on it has a place of its own."""

    def afterwards() -> None:
        """Called when the probe is done."""

    with cProfile.Profile() as profile:
        probed(Purifier(honest), Batch(images.x[:2], images.y[:2]))
        afterwards()
    assert afterwards.__code__ in {entry.code for entry in profile.getstats()}


# ---------------------------------------------------------------------------------------------------------- refusals


def test_refusals(honest: nn.Module, images: Batch) -> None:
    """One line, with what to do."""
    cases = {
        "no image": (honest, images.x[:0], images.y[:0], "no image to probe.*: give"),
        "channels": (
            honest,
            images.x.repeat(1, 3, 1, 1),
            images.y,
            r"cannot run on images of shape \(3, 8, 8\).*check",
        ),
        "label": (honest, images.x, images.y + 5, r"labels in \[5, 14\]: return"),
        "one output": (nn.Sequential(honest, nn.Linear(10, 1)), images.x, images.y * 0, "at least two"),
        "shape": (nn.Sequential(honest, nn.Unflatten(1, (5, 2))), images.x, images.y, "instead of logits"),
        "type": (Around(honest, lambda x: x.missing), images.x, images.y, "cannot run.*missing.*: *check|cannot run"),
    }
    for name, (model, x, y, message) in cases.items():
        with pytest.raises(HoldfastError, match=message) as caught:
            probe(model, x, y, BALL, key=Key(0))
        assert "\n" not in str(caught.value), name


def test_only_the_first_images_are_looked_at(honest: nn.Module, images: Batch) -> None:
    """A hundred and twenty-eight of them."""
    seen: list[int] = []

    def count(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    many = Batch(images.x.repeat(3, 1, 1, 1), images.y.repeat(3))
    probed(Around(honest, count), many)
    assert max(seen) == probes.IMAGES
    assert sum(seen) <= 103 * probes.IMAGES  # what a probe may cost


# -------------------------------------------------------------------------------------------------- thresholds' edges


class Table(nn.Module):
    """Fixed logits, whatever the images; a little of the image, so that there is a gradient."""

    def __init__(self, logits: Tensor, *, share: float = 0.0) -> None:
        super().__init__()
        self.logits, self.share = logits, share

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)] + self.share * x.flatten(1)[:, : self.logits.shape[1]]


def subject(model: nn.Module, batch: Batch, threat: ThreatModel = BALL) -> ProbedModel:
    rows = torch.arange(len(batch.y))
    return probed_model(model, batch.x, batch.y, rows, threat, Key(0))


def test_edge_of_probabilities() -> None:
    """The sum's tolerance; scaled ones; outputs in [0, 1]; a single negative output is a logit."""
    batch = Batch(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])

    def severity(outputs: Tensor) -> str | None:
        flag = probes._probabilities(subject(Table(outputs), batch))
        return None if flag is None else flag.severity

    assert severity(p) == "serious"
    uneven = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert severity(p * (1 + 3e-4 * uneven)) == "serious"
    assert severity(p * (1 + 3e-3 * uneven) * 0.99) == "warning"
    assert severity(7 * p) == "serious"
    assert severity(p * torch.tensor([[1.0], [0.9], [1.0], [0.8]])) == "warning"
    assert severity(3 * p * torch.tensor([[1.0], [0.9], [1.0], [0.8]])) is None
    assert severity(p - 0.01) is None
    assert severity(50 * p + 1e6) is None  # logits with an offset: their sums are alike only beside it
    assert severity(p + 2) is None
    assert severity(1e-3 * p * torch.tensor([[1.0], [0.9], [1.0], [0.8]])) is None  # small logits are no sigmoid's


def test_edge_of_pixels() -> None:
    """A dark set just above and just below twice 1/255; one plain image of five; bounds met exactly."""
    x = torch.rand(5, 1, 4, 4) * 0.9 + 0.01
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0.0, 1.0

    def told(x: Tensor) -> str | None:
        flag = probes._pixel_range(x)
        return None if flag is None else flag.severity

    assert told(x) is None
    assert told(x * 2.02 / 255) is None
    assert told(x * 1.98 / 255) == "serious"
    assert told(x * 1.001) == "serious"
    assert told(x - 0.001) == "serious"
    plain = x.clone()
    plain[2] = 0.25
    assert told(plain) == "warning"
    plain[3] = 0.5
    assert told(plain) == "serious"


def test_edge_of_randomness() -> None:
    """Logits of length 1 that differ by half and by twice the reference's tolerance."""
    batch = Batch(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))

    class Drifts(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by, self.calls = by, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (
                torch.tensor([[100.0, 0.0, 0.0]]).repeat(len(x), 1) + 100 * self.by * (self.calls % 2) * torch.eye(3)[1]
            )

    assert probes._randomised(subject(Drifts(0.5e-4), batch)) is None
    assert probes._randomised(subject(Drifts(2e-4), batch)) is not None


def test_randomness_by_share_of_rows() -> None:
    """Draws on one row of a hundred are a warning, on two too, on three serious: more than 2 %."""
    batch = Batch(torch.rand(100, 1, 4, 4), torch.arange(100) % 3)

    class Draws(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, x: Tensor) -> Tensor:
            drawn = torch.where((torch.arange(len(x)) < self.rows)[:, None], torch.randn(len(x), 3), 0.0)
            return x.flatten(1)[:, :3] + drawn

    for rows, severity in ((0, None), (1, "warning"), (2, "warning"), (3, "serious")):
        one = subject(Draws(rows), batch)
        flag = probes._randomised(one)
        assert (None if flag is None else flag.severity) == severity
        assert flag is None or flag.values["unstable"] == rows
        assert one.randomised == (rows > 0)


def test_randomness_is_looked_for_where_it_is(honest: nn.Module, images: Batch) -> None:
    """Images alone show nothing of a network that draws for perturbed ones; where it is not sure, one step does."""
    with torch.no_grad():
        sure = honest(images.x).topk(2, dim=1).values.diff(dim=1)[:, 0] < -3
    few = Batch(images.x[sure], images.y[sure])
    for name, place in (("noise where tampered", "random points"), ("noise where unsure", "a step along")):
        one = subject(ZOO[name].make(honest, few.x), few)
        assert probes._repeated(one, few.x)[0] == 0
        flag = probes._randomised(one)
        assert flag is not None
        assert flag.serious
        assert place in flag.says


def test_edge_of_batch_dependence(honest: nn.Module, images: Batch) -> None:
    """A dependence as small as rounding is no flag, one of a few thousandths is, though no prediction changes."""

    def leak(size: float) -> nn.Module:
        return Around(honest, after=lambda z: z * (1 + size * torch.arange(10) * (len(z) == len(images.y))))

    assert probes._batch_dependent(subject(leak(1e-5), images)) is None
    flag = probes._batch_dependent(subject(leak(1e-3), images))
    assert flag is not None
    assert flag.values["changed"] <= 2


@pytest.mark.parametrize(("size", "halves", "told"), [(0.01, True, False), (0.1, True, True), (0.01, False, True)])
def test_rounding_of_16_bits_depends_on_the_batch(
    honest: nn.Module, images: Batch, size: float, halves: bool, told: bool
) -> None:
    """As kernels of accelerators do; in float32 as much is no rounding."""

    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = honest

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            if halves:
                logits = logits.double() + 0 * logits.bfloat16()
            return logits.float() + size * logits.norm(dim=1, keepdim=True) * (len(x) % 2) * torch.eye(10)[0]

    flag = probes._batch_dependent(subject(Rounds(), images))
    assert (flag is not None) == told


@pytest.mark.parametrize("error", [RuntimeError("all at once"), AttributeError("all at once"), OSError("all at once")])
@pytest.mark.parametrize("calls", [3, 30, 60])
def test_a_model_that_ends_in_the_middle(honest: nn.Module, images: Batch, calls: int, error: Exception) -> None:
    """One line, wherever it is."""
    left = [calls]

    def count(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return x

    with pytest.raises(HoldfastError, match=r"^the model cannot run on .*all at once"):
        probed(Around(honest, count), images)


def test_a_model_of_one_batch_size_only(honest: nn.Module, images: Batch) -> None:
    """It fails on a batch of one: that is told, not raised."""
    model = Around(honest, lambda x: x.view(64, 1, 8, 8))
    assert "fails on a batch of another size" in probed(model, images)["batch-dependent"].says


def test_edge_of_constant_predictions(images: Batch) -> None:
    """One class for one class of images is right; two predictions are not constant."""
    logits = torch.zeros(64, 10)
    logits[:, 3] = 1.0
    assert probes._constant_predictions(subject(Table(logits), images)) is not None
    assert probes._constant_predictions(subject(Table(logits), images._replace(y=torch.full((64,), 3)))) is None
    logits[5, 4] = 2.0
    assert probes._constant_predictions(subject(Table(logits), images)) is None


def test_zero_gradients_by_share(honest: nn.Module, images: Batch) -> None:
    """One image of sixty-four is a warning, four are serious, none is no flag; exact figures."""
    for blind, severity in ((0, None), (1, "warning"), (4, "serious")):
        rows = torch.arange(64) < blind

        def before(x: Tensor, rows: Tensor = rows) -> Tensor:
            return torch.where(rows[: len(x)].view(-1, 1, 1, 1), x.detach(), x)

        flag = probed(Around(honest, before), images).get("zero-gradients")
        assert (None if flag is None else flag.severity) == severity
        assert flag is None or flag.values["zero"] == blind


def test_saturation_by_scale(honest: nn.Module, images: Batch) -> None:
    """A sure network, whose probability rounds to 1, still has a gradient; the flag counts those that have none."""
    shares = []
    for scale in (5.0, 20.0, 1e3):
        flag = probed(Around(honest, after=lambda z, s=scale: s * z), images).get("saturated-cross-entropy")
        shares.append(0.0 if flag is None else flag.values["share"])
    with torch.no_grad():
        sure = (5.0 * honest(images.x)).softmax(1).amax(1) == 1
    assert sure.any()
    assert shares[0] == 0.0
    assert 0.0 < shares[1] < shares[2]


def test_saturation_needs_a_gradient_of_the_margin(honest: nn.Module, images: Batch) -> None:
    """Where the margin has none either, the cause is another."""
    flags = probed(Around(honest, lambda x: (x * 8).round() / 8, lambda z: 1e6 * z), images)
    assert "zero-gradients" in flags
    assert "saturated-cross-entropy" not in flags


def test_huge_ball_reaches_grey(honest: nn.Module, images: Batch) -> None:
    """In every norm the radius is the distance of a black image from grey."""
    from holdfast.evaluation.gradient_probes import reach

    x, grey = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5)
    for threat in (Linf(0.1), L2(0.1), L1(0.1)):
        radius = reach(subject(honest, images, threat))
        assert math.isclose(radius, float(threat.length(grey - x)), rel_tol=1e-6)
    assert reach(subject(honest, images, Linf(0.7))) == 0.7


def test_ascend_is_projected_gradient_ascent(images: Batch) -> None:
    """On a linear network the best loss within Linf is known."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 2)
    batch = Batch(images.x * 0.2 + 0.4, (images.y >= 5).long())
    best, _ = subject(nn.Sequential(nn.Flatten(), linear), batch, Linf(0.05)).ascend(0.05, 10)
    weight = (linear.weight[1] - linear.weight[0]).detach()
    with torch.no_grad():
        clean = -margin(linear(batch.x.flatten(1)), batch.y)
    torch.testing.assert_close(best, clean + 0.05 * weight.abs().sum())


def test_monotone_and_one_step_from_figures(images: Batch, honest: nn.Module) -> None:
    """The rules themselves."""
    from holdfast.evaluation.gradient_probes import _huge, _monotone, _one_step

    assert _monotone(0.0, {0.1: 1.0, 0.2: 2.0, 0.4: 3.0}) is None
    assert _monotone(0.0, {0.1: 1.0, 0.2: 2.99, 0.4: 2.98}) is None  # 0.3 % of the growth
    fall, collapse = _monotone(0.0, {0.1: 1.0, 0.2: 3.0, 0.4: 2.9}), _monotone(0.0, {0.1: 3.0, 0.2: 2.0, 0.4: 3.0})
    assert fall is not None
    assert fall.severity == "warning"
    assert collapse is not None
    assert collapse.severity == "serious"
    still = _monotone(-4.0, {0.1: -4.0, 0.2: -4.0})
    assert still is not None
    assert "does not grow" in still.says
    right = subject(honest, images)
    order = right.correct.nonzero()[:, 0]

    def rows(count: int, start: int = 0) -> Tensor:
        return torch.zeros(64, dtype=torch.bool).index_fill(0, order[start : start + count], True)

    assert _one_step(right, rows(1), rows(0)) is None
    assert _one_step(right, rows(2), rows(1, 10)) is None
    assert _one_step(right, rows(2), rows(2)) is None
    flag = _one_step(right, rows(3), rows(1, 10))
    assert flag is not None
    assert (flag.values["only_one_step"], flag.values["only_many_steps"]) == (3, 1)
    chance = int(images.y.bincount().max())
    alive = len(order)
    assert _huge(right, 0.5, rows(alive - chance)) is None
    assert _huge(right, 0.5, rows(alive - chance - 1)) is not None


def test_seed_is_put_back_by_the_context(honest: nn.Module) -> None:
    """Used alone, too."""
    state = torch.get_rng_state()
    with left_as_it_was(honest, torch.device("cpu")):
        torch.manual_seed(3)
        honest.train()
    assert torch.equal(state, torch.get_rng_state())
    assert not honest.training
