"""PIAT's interpolation and EMA by hand: equations (3) and (4), Algorithm 1, and the identity with Lookahead."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.averages.base import Average
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.averages.swa import SWA
from holdfast.errors import HoldfastError
from holdfast.schedule import Progress

Weights = dict[str, Tensor]


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small network with parameters, floating-point buffers and an integer buffer, all of them distinct."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    disturb(model, torch.Generator().manual_seed(seed))
    return model


def disturb(model: nn.Module, generator: torch.Generator) -> None:
    """What an epoch does: every parameter and buffer moves."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
            else:
                tensor.add_(7)


def weights(model: nn.Module) -> Weights:
    """A copy of all that the model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def is_buffer(name: str) -> bool:
    """Whether the name is one of BatchNorm's running quantities."""
    return "running" in name or "num_batches" in name


def mixed(before: Weights, now: Weights, kept: float, *, buffers: bool = True) -> Weights:
    """Eq. (3), tensor by tensor; integer tensors are those of now."""
    result = {}
    for name, tensor in now.items():
        moves = tensor.is_floating_point() and (buffers or not is_buffer(name))
        result[name] = kept * before[name] + (1 - kept) * tensor if moves else tensor
    return result


def assert_close(found: Weights, expected: Weights) -> None:
    """Equal up to rounding in float64, and integers exactly."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if tensor.is_floating_point():
            assert torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-12), name
        else:
            assert torch.equal(found[name], tensor), name


def assert_identical(found: Weights, expected: Weights) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def steps(epochs: int, per_epoch: int, warmup_steps: int = 0) -> Iterator[Progress]:
    """The progress of every step of a run."""
    for step in range(epochs * per_epoch):
        yield Progress(
            epoch=step // per_epoch,
            step=step,
            steps_per_epoch=per_epoch,
            epochs=epochs,
            warmup_steps=warmup_steps,
        )


def run(
    model: nn.Module,
    average: Any,
    epochs: int,
    per_epoch: int = 1,
    *,
    warmup_steps: int = 0,
    seen: Callable[[Progress, Weights, Weights], None] | None = None,
) -> None:
    """A run in which chance takes the optimiser's place; `seen` is told what each step's end made of the weights."""
    generator = torch.Generator().manual_seed(99)
    average.start(model)
    for progress in steps(epochs, per_epoch, warmup_steps):
        disturb(model, generator)
        now = weights(model)
        average.after_step(model, progress)
        if (progress.step + 1) % per_epoch == 0:
            average.after_epoch(model, progress)
        if seen is not None:
            seen(progress, now, weights(model))


class ByHand:
    """Follows a run and checks it against eq. (3) with a λ for every step; None where nothing is interpolated."""

    def __init__(
        self, model: nn.Module, kept: Callable[[Progress], float | None], *, per_epoch: int = 1, buffers: bool = True
    ) -> None:
        self.kept, self.buffers, self.per_epoch = kept, buffers, per_epoch
        self.anchor = weights(model)
        self.interpolations = 0

    def __call__(self, progress: Progress, now: Weights, after: Weights) -> None:
        share = self.kept(progress)
        if share is None:
            assert_identical(after, now)
            if (progress.step + 1) % self.per_epoch == 0:
                self.anchor = now
            return
        expected = mixed(self.anchor, now, share, buffers=self.buffers)
        assert_close(after, expected)
        self.anchor, self.interpolations = after, self.interpolations + 1


def at_epoch_end(share: Callable[[int], float | None]) -> Callable[[Progress], float | None]:
    """λ as a function of the epoch, counted from 1, and None within epochs."""
    return lambda p: share(p.epoch + 1) if (p.step + 1) % p.steps_per_epoch == 0 else None


@pytest.mark.parametrize("per_epoch", [1, 3])
def test_interpolation_follows_equations_3_and_4_with_n_from_one(per_epoch: int) -> None:
    model = network()
    byhand = ByHand(model, at_epoch_end(lambda n: (n + 1) / (n + 10)), per_epoch=10**9)
    run(model, Interpolation(), epochs=8, per_epoch=per_epoch, seen=byhand)
    assert byhand.interpolations == 8


def test_first_epoch_keeps_two_elevenths_of_the_start() -> None:
    model = network()
    start = weights(model)
    average = Interpolation()
    average.start(model)
    disturb(model, torch.Generator().manual_seed(1))
    now = weights(model)
    average.after_epoch(model, Progress(epochs=120))
    assert_close(weights(model), mixed(start, now, 2 / 11))


def test_training_goes_on_from_the_interpolated_weights() -> None:
    model = network()
    average = Interpolation(weight=0.5)
    average.start(model)
    name, parameter = next(iter(model.named_parameters()))
    for epoch, expected in enumerate((0.5, 1.0, 1.5)):  # + 1 each epoch, half of it kept
        start = weights(network())[name]
        with torch.no_grad():
            parameter.add_(1.0)
        average.after_epoch(model, Progress(epoch=epoch, step=epoch, epochs=3))
        assert torch.allclose(parameter.detach(), start + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coefficients", [(1, 2, 3, 4), (0, 1, 0, 4), (0.5, 0, 1, 2)])
def test_all_four_coefficients_of_g(coefficients: tuple[float, ...]) -> None:
    a, b, c, d = coefficients
    model = network()
    byhand = ByHand(model, at_epoch_end(lambda n: (a * n + b) / (c * n + d)))
    run(model, Interpolation(coefficients=coefficients), epochs=5, seen=byhand)
    assert byhand.interpolations == 5


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 0.9])
def test_fixed_weight(weight: float) -> None:
    model = network()
    byhand = ByHand(model, at_epoch_end(lambda n: weight))
    run(model, Interpolation(weight=weight), epochs=5, seen=byhand)
    assert byhand.interpolations == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_zero_is_bit_identical_to_no_interpolation(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    run(
        model, Interpolation(weight=0.0), epochs=6, per_epoch=2, seen=lambda p, now, after: assert_identical(after, now)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_one_never_moves_except_for_integer_buffers(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    start = weights(model)

    def seen(progress: Progress, now: Weights, after: Weights) -> None:
        """Floating-point tensors are those of the start at every epoch's end."""
        for name, tensor in after.items():
            assert torch.equal(tensor, start[name] if tensor.is_floating_point() else now[name]), name

    run(model, Interpolation(weight=1.0), epochs=6, seen=seen)
    assert model[1].num_batches_tracked == start["1.num_batches_tracked"] + 6 * 7


def test_what_an_epoch_did_not_move_stays_bit_identical() -> None:
    model = network(dtype=torch.float32)
    average = Interpolation()
    start = weights(model)
    average.start(model)
    for epoch in range(30):
        average.after_epoch(model, Progress(epoch=epoch, step=epoch, epochs=30))
    assert_identical(weights(model), start)


def test_integer_buffers_keep_their_current_value() -> None:
    model = network()
    before = int(model[1].num_batches_tracked)
    run(model, Interpolation(weight=0.5), epochs=3)
    assert model[1].num_batches_tracked.dtype == torch.long
    assert int(model[1].num_batches_tracked) == before + 3 * 7


@pytest.mark.parametrize("buffers", ["keep", "reestimate"])
def test_buffers_that_are_not_interpolated_stay_as_they_are(buffers: str) -> None:
    model = network()
    average = Interpolation(buffers=buffers)
    byhand = ByHand(model, at_epoch_end(lambda n: (n + 1) / (n + 10)), buffers=False)
    run(model, average, epochs=4, seen=byhand)
    assert byhand.interpolations == 4
    assert average.reestimate == ("clean" if buffers == "reestimate" else None)
    assert Interpolation().reestimate is None


def test_counting_from_the_first_adversarial_epoch() -> None:
    model = network()
    # 5 warm-up steps in epochs of 2: epochs 1 and 2 are clean, the third holds one adversarial step and is n = 1.
    byhand = ByHand(model, at_epoch_end(lambda n: None if n <= 2 else (n - 2 + 1) / (n - 2 + 10)), per_epoch=2)
    run(model, Interpolation(count_from="adversarial"), epochs=6, per_epoch=2, warmup_steps=5, seen=byhand)
    assert byhand.interpolations == 4


def test_counting_from_the_start_interpolates_in_the_warm_up_too() -> None:
    model = network()
    byhand = ByHand(model, at_epoch_end(lambda n: (n + 1) / (n + 10)))
    run(model, Interpolation(count_from="start"), epochs=12, warmup_steps=10, seen=byhand)
    assert byhand.interpolations == 12


def test_share_kept_at_the_first_adversarial_epoch_after_ten_of_warm_up() -> None:
    progress = Progress(epoch=10, step=10, epochs=120, warmup_steps=10)
    assert Interpolation().share_kept(progress) == pytest.approx(12 / 21, rel=1e-12)
    assert Interpolation(count_from="adversarial").share_kept(progress) == pytest.approx(2 / 11, rel=1e-12)
    clean = Progress(epoch=9, step=9, epochs=120, warmup_steps=10)
    assert Interpolation(count_from="adversarial").share_kept(clean) is None


@pytest.mark.parametrize("period", [1, 2, 4])
def test_period_in_steps_counts_interpolations(period: int) -> None:
    model = network()

    def kept(progress: Progress) -> float | None:
        """λ after every `period` steps, whatever the epoch."""
        n, rest = divmod(progress.step + 1, period)
        return None if rest else (n + 1) / (n + 10)

    byhand = ByHand(model, kept, per_epoch=10**9)
    run(model, Interpolation(period=period), epochs=4, per_epoch=3, seen=byhand)
    assert byhand.interpolations == 12 // period


def test_period_of_an_epoch_equals_interpolation_at_the_epoch_end() -> None:
    one, other = network(), network()
    run(one, Interpolation(), epochs=5, per_epoch=3)
    run(other, Interpolation(period=3), epochs=5, per_epoch=3)
    assert_identical(weights(one), weights(other))


@pytest.mark.parametrize(("period", "warmup_epochs"), [(2, 1), (2, 2), (4, 1), (3, 1)])
def test_period_and_counting_from_the_first_adversarial_epoch(period: int, warmup_epochs: int) -> None:
    model = network()
    clean = 4 * warmup_epochs // period  # interpolations that fall into the warm-up and do not happen

    def kept(progress: Progress) -> float | None:
        """The first period that ends after the warm-up is n = 1."""
        done, rest = divmod(progress.step + 1, period)
        return None if rest or done <= clean else (done - clean + 1) / (done - clean + 10)

    byhand = ByHand(model, kept, per_epoch=period)
    average = Interpolation(period=period, count_from="adversarial")
    run(model, average, epochs=6, per_epoch=4, warmup_steps=4 * warmup_epochs, seen=byhand)
    assert byhand.interpolations == 24 // period - clean


@pytest.mark.parametrize("scale_n", [120, 12, 3])
def test_scaled_counter_runs_as_if_the_run_had_so_many_epochs(scale_n: int) -> None:
    model = network()

    def share(n: int) -> float:
        """g at the position which the epoch has in the run that is imitated."""
        position = n * scale_n / 6
        return (position + 1) / (position + 10)

    byhand = ByHand(model, at_epoch_end(share))
    run(model, Interpolation(scale_n=scale_n), epochs=6, seen=byhand)
    assert byhand.interpolations == 6
    last = Interpolation(scale_n=scale_n).share_kept(Progress(epoch=5, step=5, epochs=6))
    assert last == pytest.approx((scale_n + 1) / (scale_n + 10), rel=1e-12)


def test_scaled_counter_with_a_period_in_steps() -> None:
    model = network()

    def kept(progress: Progress) -> float | None:
        """The share of the run that is done, times 120."""
        done = progress.step + 1
        position = 120 * done / (4 * 3)
        return None if done % 2 else (position + 1) / (position + 10)

    byhand = ByHand(model, kept, per_epoch=10**9)
    run(model, Interpolation(period=2, scale_n=120), epochs=4, per_epoch=3, seen=byhand)
    assert byhand.interpolations == 6


def test_scaled_counter_from_the_first_adversarial_epoch() -> None:
    model = network()
    # 12 epochs that stand for 120, one of them warm-up: after the first adversarial epoch n is 10.
    average = Interpolation(scale_n=120, count_from="adversarial")
    byhand = ByHand(model, at_epoch_end(lambda n: None if n == 1 else (10 * (n - 1) + 1) / (10 * (n - 1) + 10)))
    run(model, average, epochs=12, warmup_steps=1, seen=byhand)
    assert byhand.interpolations == 11


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fixed_weight_is_lookahead_with_an_epoch_as_its_period(momentum: float) -> None:
    per_epoch, epochs, kept = 4, 5, 0.7
    torch.manual_seed(0)
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)

    def train(after_epoch: Callable[[nn.Module, Progress], None], model: nn.Module) -> Tensor:
        """Least squares with SGD, whose momentum is left alone."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
        for progress in steps(epochs, per_epoch):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            if (progress.step + 1) % per_epoch == 0:
                after_epoch(model, progress)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def regression() -> nn.Linear:
        """The same start every time."""
        torch.manual_seed(1)
        return nn.Linear(6, 1).double()

    first = regression()
    slow = [parameter.detach().clone() for parameter in first.parameters()]

    def lookahead(model: nn.Module, progress: Progress) -> None:
        """Slow weights go a share 1 - λ of the way to the fast ones, which start again from there."""
        with torch.no_grad():
            for anchor, fast in zip(slow, model.parameters(), strict=True):
                anchor += (1 - kept) * (fast - anchor)
                fast.copy_(anchor)

    expected = train(lookahead, first)
    second = regression()
    average = Interpolation(weight=kept)
    average.start(second)
    assert torch.allclose(train(average.after_epoch, second), expected, rtol=1e-12, atol=1e-12)
    plain = train(lambda model, progress: None, regression())
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Written and read as a checkpoint is, without running anything."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Interpolation(),
        lambda: Interpolation(weight=0.4),
        lambda: Interpolation(count_from="adversarial"),
        lambda: Interpolation(period=2, scale_n=120),
        lambda: EMA(decay=0.9),
        lambda: EMA(decay=0.9, warm_up=False, buffers="keep"),
    ],
)
@pytest.mark.parametrize("interrupted_after", [1, 3, 5, 6, 11])
def test_a_state_round_trip_continues_identically(build: Callable[[], Any], interrupted_after: int) -> None:
    epochs, per_epoch, warmup = 5, 3, 4

    def advance(model: nn.Module, average: Any, generator: torch.Generator, progress: Progress) -> None:
        """One step."""
        disturb(model, generator)
        average.after_step(model, progress)
        if (progress.step + 1) % per_epoch == 0:
            average.after_epoch(model, progress)

    whole, average, generator = network(), build(), torch.Generator().manual_seed(5)
    average.start(whole)
    for progress in steps(epochs, per_epoch, warmup):
        advance(whole, average, generator, progress)

    first, begun, generator = network(), build(), torch.Generator().manual_seed(5)
    begun.start(first)
    resumed, again = network(seed=8), build()
    for progress in steps(epochs, per_epoch, warmup):
        if progress.step < interrupted_after:
            advance(first, begun, generator, progress)
            continue
        if progress.step == interrupted_after:
            resumed.load_state_dict(through_a_file(first.state_dict()))
            again.load_state_dict(through_a_file(begun.state_dict()))
        advance(resumed, again, generator, progress)
    assert_identical(weights(resumed), weights(whole))
    assert (again.exported() is None) == (average.exported() is None)
    if average.exported() is not None:
        assert_identical(dict(again.exported()), dict(average.exported()))


def test_which_averages_change_the_model() -> None:
    assert Interpolation().writes_back
    assert Interpolation().exported() is None
    assert not EMA().writes_back


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": -0.1},
        {"weight": 1.1},
        {"weight": float("nan")},
        {"count_from": "end"},
        {"buffers": "average"},
        {"period": 0},
        {"scale_n": 0},
        {"coefficients": (1, 1, 1)},
        {"coefficients": (2, 1, 1, 10)},  # eq. (4) asks for c >= a
        {"coefficients": (1, 11, 1, 10)},  # and d >= b
    ],
)
def test_interpolation_refuses_what_the_equations_exclude(settings: dict[str, Any]) -> None:
    with pytest.raises(HoldfastError):
        Interpolation(**settings)


def ema_by_hand(trajectory: list[Weights], decay: float, warm_up: bool, buffers: bool) -> Weights:
    """The shadow after a trajectory whose first entry is the start; integers are the model's last."""
    shadow = trajectory[0]
    for s, now in enumerate(trajectory[1:]):
        tau = min(decay, (1 + s) / (10 + s)) if warm_up else decay
        shadow = mixed(shadow, now, tau, buffers=buffers)
    return shadow


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.28, 0.9995])
@pytest.mark.parametrize("buffers", ["average", "keep", "clean", "adversarial"])
def test_ema_by_hand(warm_up: bool, decay: float, buffers: str) -> None:
    model = network()
    average = EMA(decay=decay, warm_up=warm_up, buffers=buffers)
    trajectory = [weights(model)]

    def seen(progress: Progress, now: Weights, after: Weights) -> None:
        """The model is left alone, and the shadow follows the formula."""
        assert_identical(after, now)
        trajectory.append(now)
        expected = ema_by_hand(trajectory, decay, warm_up, buffers == "average")
        exported = dict(average.exported())
        if buffers in ("clean", "adversarial"):  # the loop writes them at the epoch's end
            exported = {name: tensor for name, tensor in exported.items() if "running" not in name}
            expected = {name: tensor for name, tensor in expected.items() if "running" not in name}
        assert_close(exported, expected)

    run(model, average, epochs=3, per_epoch=4, seen=seen)
    assert len(trajectory) == 13
    assert average.reestimate == (buffers if buffers in ("clean", "adversarial") else None)


def test_ema_warm_up_forgets_the_start_and_a_fixed_decay_does_not() -> None:
    model = network()
    start = weights(model)
    warm, fixed = EMA(), EMA(warm_up=False)
    warm.start(model)
    fixed.start(model)
    generator = torch.Generator().manual_seed(0)
    for progress in steps(1, 20):
        disturb(model, generator)
        warm.after_step(model, progress)
        fixed.after_step(model, progress)
    name = "3.weight"
    moved = (weights(model)[name] - start[name]).norm()
    assert (fixed.exported()[name] - start[name]).norm() < 0.02 * moved
    assert (warm.exported()[name] - start[name]).norm() > 0.3 * moved


def test_the_ema_is_loadable_into_the_model() -> None:
    model = network()
    average = EMA(decay=0.5)
    run(model, average, epochs=2)
    model.load_state_dict(dict(average.exported()))
    assert_identical(weights(model), dict(average.exported()))


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"buffers": "interpolate"}])
def test_ema_refusals(settings: dict[str, Any]) -> None:
    with pytest.raises(HoldfastError):
        EMA(**settings)


@pytest.mark.parametrize("frozen_parameter", [False, True])
@pytest.mark.parametrize(
    "average",
    [EMA(decay=0.9), SWA(begin=0.0, period=1, buffers="average"), Interpolation(period=1)],
    ids=lambda one: type(one).__name__,
)
def test_infinite_masks_stay_infinite(average: Average, frozen_parameter: bool) -> None:
    """-inf of an attention mask, and a range that was infinite before the first image; NaN otherwise."""
    model, mask = network(), torch.tensor([0.0, -torch.inf, torch.inf], dtype=torch.float64)
    if frozen_parameter:
        model.mask = nn.Parameter(mask.clone(), requires_grad=False)
    else:
        model.register_buffer("mask", mask.clone())
    average.start(model)
    for _ in range(3):
        average.after_step(model, Progress(epochs=1, steps_per_epoch=3))
        model.state_dict()["mask"][2] = 5.0
    average.after_step(model, Progress(epochs=1, steps_per_epoch=3))
    found = (average.exported() or model.state_dict())["mask"]
    assert found.tolist() == [0.0, -torch.inf, 5.0]
