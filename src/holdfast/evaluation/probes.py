"""Probes: what can be measured on a few images that shows whether an attack on this model can be believed.

Every probe asks one question and answers with a `Flag` or None. Thresholds and their reasons stand in docs/flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.attacks.stepwise import StepwiseAttack
from holdfast.errors import HoldfastError
from holdfast.evaluation.flags import Flag
from holdfast.evaluation.gradient_probes import GRADIENT_PROBES
from holdfast.evaluation.probed_model import (
    ProbedModel,
    count,
    direction,
    finite,
    left_as_it_was,
    probed_model,
    unit,
)
from holdfast.evaluation.running import CannotRun
from holdfast.evaluation.saturation import withstands_saturation
from holdfast.functional import correct
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

IMAGES = 128  # more are not looked at
DARK = 2 / 255  # a whole set below this was divided by 255 twice
SUM_TOLERANCE = 1e-3
NEAR_ZERO = 0.5  # of the mean output: the least of a row of probabilities is below it
SPREAD = 0.5  # between the least and the largest sigmoid output; small logits are closer together
REPEATS = 5
UNSTABLE = 0.02  # of the rows: draws on fewer cannot move an accuracy by more
RANDOM_TOLERANCE = 1e-4  # of logits of length 1: the reference's own
BATCH_TOLERANCE_IN_HALVES = 0.03  # 16 bits, inside: 0.006 was seen on an H200, whose kernels go by the batch
BATCH_TOLERANCE = 1e-3  # of logits of length 1: rounding stays below it, in TF32 too
MANY = 0.25  # of the images


def probe(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    key: Key,
    index: Tensor | None = None,
    attacks: Sequence[StepwiseAttack] = (),
) -> list[Flag]:
    """What a few images show before an attack is run.

    The model is run in evaluation mode and left as it was: training flags, gradients, buffers and the random state of
    torch, Python and NumPy are the same afterwards, after an exception too. It costs 64 forward passes with a
    backward to the pixels, and about 40 without.

    Args:
        model: Pixels in [0, 1] to logits.
        x: Images; the first 128 are looked at.
        y: Their labels.
        threat: The ball of the evaluation.
        key: Of all draws.
        index: Identity of every image, for keyed draws; None for its place.
        attacks: Those of the evaluation. Where one of them searches long enough with a loss that large logits do not
            saturate, `saturated-cross-entropy` is not raised. Without them it is.

    Shapes:
        x: (n, C, H, W); y, index: (n,).
    Raises:
        HoldfastError: there is no image, the model does not run, or it has no output for a label.

    Example:
        >>> from holdfast.threat import Linf
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softmax(1))
        >>> x, y = torch.rand(8, 1, 2, 2), torch.tensor([0, 1] * 4)
        >>> [flag.name for flag in probe(model, x, y, Linf(0.1), key=Key(0))][:2]
        ['train-mode', 'probabilities']
    """
    if len(x) == 0:
        raise HoldfastError("there is no image to probe the model with: give at least one")
    index = torch.arange(len(y), device=x.device) if index is None else index
    x, y, index = x[:IMAGES].detach(), y[:IMAGES], index[:IMAGES]
    found = [_pixel_range(x), _train_mode(model)]
    with left_as_it_was(model, x.device), torch.autocast(x.device.type, enabled=False):
        probed = probed_model(model, x, y, index, threat, key)
        for measure in OUTPUT_PROBES:
            probed.seed()
            found.append(measure(probed))
        for measures in GRADIENT_PROBES:
            probed.seed()
            found += measures(probed)
    if withstands_saturation(attacks):
        found = [flag for flag in found if flag is None or flag.name != "saturated-cross-entropy"]
    return [flag for flag in found if flag is not None]


def _pixel_range(x: Tensor) -> Flag | None:
    low, high = float(finite(x).min()), float(finite(x).max())
    flat = x.flatten(1)
    constant = count(flat.amax(1) == flat.amin(1))
    values = {"min": low, "max": high, "constant_images": constant, "n": len(x)}
    if not bool(x.isfinite().all()):
        return Flag("pixel-range", "some pixels are NaN or infinite", "serious", values)
    if low < 0 or high > 1:
        says = f"pixels lie in [{low:g}, {high:g}] instead of [0, 1]"
        return Flag("pixel-range", says, "serious", values)
    if high < DARK:
        says = f"no pixel of {len(x)} images is above {high:.2g}: they look divided by 255 twice"
        return Flag("pixel-range", says, "serious", values)
    if constant == 0:
        return None
    severity = "serious" if constant > MANY * len(x) else "warning"
    return Flag("pixel-range", f"{constant} of {len(x)} images are one plain colour", severity, values)


def _train_mode(model: nn.Module) -> Flag | None:
    modules = list(model.modules())
    training = sum(getattr(module, "training", False) for module in modules)  # frozen TorchScript has no mode
    if training == 0:
        return None
    return Flag(
        "train-mode",
        f"{training} of {len(modules)} modules were in training mode; they were run in evaluation mode all the same",
        "warning",
        {"training": training, "modules": len(modules)},
    )


def _probabilities(probed: ProbedModel) -> Flag | None:
    logits = probed.clean
    low, high = float(logits.min()), float(logits.max())
    rows = logits.double().sum(1)
    total = float(rows.mean())
    off = float((rows - total).abs().max())
    values = {"min": low, "max": high, "row_sum": total, "row_sum_deviation": off}
    if low < 0:
        return None
    if abs(total - 1) + off < SUM_TOLERANCE:
        says = f"outputs lie in [0, 1] and rows sum to 1 on all {len(rows)} images"
        return Flag("probabilities", says, "serious", values)
    varied = not torch.equal(logits, logits[:1].expand_as(logits))  # constant outputs have constant sums
    # centred logits plus a constant have constant sums too, but stay away from zero
    near_zero = float(logits.amin(1).median()) < NEAR_ZERO * total / logits.shape[1]
    if varied and near_zero and off < SUM_TOLERANCE * total:
        says = f"no output is negative and rows sum to {total:.4g} on all {len(rows)} images: scaled probabilities"
        return Flag("probabilities", says, "serious", values)
    if high <= 1 and high - low > SPREAD:
        says = f"outputs lie in [{low:.2g}, {high:.2g}] on all {len(rows)} images: they look like sigmoid outputs"
        return Flag("probabilities", says, "warning", values)
    return None


def _constant_predictions(probed: ProbedModel) -> Flag | None:
    predicted, labels = probed.clean.argmax(1).unique(), len(probed.y.unique())
    if len(predicted) > 1 or labels < 2:
        return None
    accuracy = float(probed.correct.float().mean())
    return Flag(
        "constant-predictions",
        f"all {len(probed.x)} images of {labels} classes are predicted as class {int(predicted[0])}"
        f" ({accuracy:.1%} are right)",
        "serious" if len(probed.x) >= 10 else "warning",
        {"predicted": int(predicted[0]), "classes": labels, "accuracy": accuracy, "n": len(probed.x)},
    )


def _randomised(probed: ProbedModel) -> Flag | None:
    """The same points several times: a model may draw only for images that were changed, or only near its boundary."""
    n = len(probed.x)
    places = {"images": probed.x, "random points of the ball": probed.random_point}
    stepped = _stepped(probed)
    if stepped is not None:
        places["points after a step along the gradient"] = stepped
    found = {name: _repeated(probed, points) for name, points in places.items()}
    name, (unstable, apart, counts) = max(found.items(), key=lambda each: each[1][0])  # the first of equals
    probed.randomised = unstable > 0
    if not probed.randomised:
        return None
    return Flag(
        "randomised",
        f"in {REPEATS} runs of the same {name} the answers to {unstable} of {n} differ, by up to {apart:.2g} (logits of"
        f" length 1); {min(counts)} to {max(counts)} of {n} are classified correctly",
        "serious" if unstable > UNSTABLE * n else "warning",
        {
            "unstable": unstable,
            "share": unstable / n,
            "difference": apart,
            "fewest_correct": min(counts),
            "most_correct": max(counts),
            "n": n,
        },
    )


def _stepped(probed: ProbedModel) -> Tensor | None:
    """Where one step of length epsilon along the gradient leads; None without a gradient."""
    found = probed.gradients(probed.x, probed.loss)
    if found is None:
        return None
    move = probed.threat.epsilon * direction(finite(found[1][0]), probed.x, probed.threat)
    return probed.threat.project(probed.x + move, probed.x)


def _repeated(probed: ProbedModel, points: Tensor) -> tuple[int, float, list[int]]:
    """How many rows differ between runs, by how much at most, and how many were correct in every run."""
    answers = [probed.raw(points) for _ in range(REPEATS)]
    first = finite(answers[0])
    unstable, apart = torch.zeros(len(points), dtype=torch.bool, device=points.device), 0.0
    for outputs in answers[1:]:
        logits = finite(outputs)
        distance = (unit(logits) - unit(first)).norm(dim=1)
        unstable |= (distance > RANDOM_TOLERANCE) | (logits.argmax(1) != first.argmax(1))
        unstable |= correct(outputs, probed.y) != correct(answers[0], probed.y)
        apart = max(apart, float(distance.max()))
    return count(unstable), apart, [count(correct(outputs, probed.y)) for outputs in answers]


def _batch_dependent(probed: ProbedModel) -> Flag | None:
    """The same images in another order, in batches of one, a quarter and the rest; and points of the ball likewise."""
    if probed.randomised:
        return None  # the draws differ
    point = probed.random_point
    return _in_other_batches(probed, probed.x, probed.clean, "images") or _in_other_batches(
        probed, point, probed.logits(point), "random points of the ball"
    )


def _in_other_batches(probed: ProbedModel, x: Tensor, answers: Tensor, what: str) -> Flag | None:
    """Compare answers with those to the same images in other batches."""
    n = len(x)
    try:
        if n == 1:
            other = probed.logits(torch.cat([x, x.flip(-1)]))[:1]
        else:
            order = torch.arange(n - 1, -1, -1, device=x.device)
            parts = [part for part in order.tensor_split([1, 1 + n // 4]) if len(part)]
            other = torch.cat([probed.logits(x[part]) for part in parts])[order]
    except CannotRun as error:
        says = f"the model fails on a batch of another size: {error.reason}"
        return Flag("batch-dependent", says, "serious", {"n": n})
    apart = (unit(other) - unit(answers)).norm(dim=1)
    tolerance = BATCH_TOLERANCE_IN_HALVES if probed.halves else BATCH_TOLERANCE
    largest, differ = float(apart.max()), count(apart > tolerance)
    changed = count(other.argmax(1) != answers.argmax(1))
    if differ == 0:
        return None
    return Flag(
        "batch-dependent",
        f"in another batch the logits of {differ} of {n} {what} differ by up to {largest:.2g} (logits of length 1) and"
        f" {changed} predictions change",
        "serious",
        {"difference": largest, "differ": differ, "changed": changed, "n": n},
    )


def _optimises(probed: ProbedModel) -> Flag | None:
    """Count the calls of the gradient engine during one forward."""
    if sys.getprofile() is not None:  # a person's profiler, whose place the count would take; up to 3.11 cProfile too
        return None
    with _engine_calls() as calls:
        probed.raw(probed.x)
    if not calls:
        return None
    return Flag(
        "optimises-at-inference",
        f"the gradient engine was called {len(calls)} times while the model classified {len(probed.x)} images",
        "serious",
        {"calls": len(calls), "n": len(probed.x)},
    )


@contextmanager
def _engine_calls() -> Iterator[list[str]]:
    """The names of torch.autograd's functions that are called inside, by whatever name a model imported them."""
    calls: list[str] = []
    watched = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in watched:
            calls.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


OUTPUT_PROBES: tuple[Callable[[ProbedModel], Flag | None], ...] = (
    _probabilities,
    _constant_predictions,
    _randomised,
    _batch_dependent,
    _optimises,
)
"""Probes that look at outputs alone. What follows `_randomised` may ask whether the model draws."""
