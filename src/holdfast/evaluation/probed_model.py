"""The model under examination: run in evaluation mode on a few images, from the same draws, and left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.evaluation.agreement import computes_in_halves
from holdfast.evaluation.draws import begin_draws
from holdfast.evaluation.draws import left_as_it_was as left_as_it_was
from holdfast.evaluation.networks import Searching, Speed
from holdfast.evaluation.paths import deciding_view
from holdfast.evaluation.running import CannotRun, logits_from, told
from holdfast.forward import View
from holdfast.functional import margin, misclassified
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

TRIED = 8  # images on which ways of running the model are compared

Loss = Callable[[Tensor], Tensor]
"""Logits (n, K) to the loss (n,)."""


@dataclass
class ProbedModel:
    """The model under examination, and what several probes share."""

    model: nn.Module
    view: View
    x: Tensor
    y: Tensor
    index: Tensor
    threat: ThreatModel
    key: Key
    dtype: torch.dtype
    outputs: Tensor | None = None  # of x, as the model returned them
    reason: str = ""  # why no gradient could be taken
    randomised: bool = False  # written by the probe of that name

    def seed(self) -> None:
        """Begin all draws anew, so that two runs of a model that draws can be compared."""
        begin_draws(self.key.fold("probe").torch_seed, self.x.device)

    @torch.no_grad()
    def raw(self, x: Tensor) -> Tensor:
        """What the model returns; it gets a copy, because it may write into its input."""
        return logits_from(self.view, x.to(self.dtype, copy=True)).to(x.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """The same with numbers in place of NaN and infinity."""
        return finite(self.raw(x))

    @property
    def clean(self) -> Tensor:
        """Logits of the images."""
        assert self.outputs is not None  # written by probed_model
        return finite(self.outputs)

    @property
    def correct(self) -> Tensor:
        """Which images are classified correctly, (n,) bool."""
        assert self.outputs is not None  # written by probed_model
        return ~misclassified(self.outputs, self.y)

    @property
    def random_point(self) -> Tensor:
        """A point of the ball around every image."""
        return self.threat.random_point(self.x, self.key.fold("probe point"), self.index)

    def loss(self, logits: Tensor) -> Tensor:
        """The negative margin, which no scale of the logits saturates."""
        return -margin(logits, self.y)

    def gradients(self, x: Tensor, *losses: Loss) -> tuple[Tensor, list[Tensor]] | None:
        """Logits, and the gradient of every loss with respect to the pixels; None where there is none."""
        found = self.search.gradients(x, [partial(_of_finite, loss) for loss in losses])
        if found is None:
            self.reason = self.search.reason
            return None
        return found

    @cached_property
    def halves(self) -> bool:
        """Whether it computes anything in 16 bits."""
        return computes_in_halves(self.view, self.x[:1].to(self.dtype))

    @cached_property
    def search(self) -> Searching:
        """The network as an attack would run it, so that a probe sees the gradients that an attack will see."""
        with left_as_it_was(self.model, self.x.device):
            try:
                return Searching(self.model, self.x[:TRIED], Speed(), randomised=self.randomised)
            except Exception as error:  # it runs on a batch of one size only, and another flag says so
                told(error)
                return Searching(self.model, self.x, Speed(), randomised=self.randomised)

    def ascend(self, radius: float, steps: int, share: float = 0.25) -> tuple[Tensor, Tensor]:
        """A short PGD from the image: the largest loss of all points, and whether one of them was misclassified.

        A model without gradient is looked at where it stands: that is what an attack on it would do.
        """
        ball = self.threat.with_epsilon(radius)
        point, broken = self.x, ~self.correct
        best = self.loss(self.clean)
        for number in range(steps + 1):
            found = self.gradients(point, self.loss) if number < steps else None
            outputs = self.raw(point) if found is None else found[0]
            best = torch.maximum(best, self.loss(finite(outputs)))
            broken = broken | misclassified(outputs, self.y)
            if found is None:
                break
            move = share * radius * direction(finite(found[1][0]), point, self.threat)
            point = ball.project(point + move, self.x)
        return best, broken


def probed_model(model: nn.Module, x: Tensor, y: Tensor, index: Tensor, threat: ThreatModel, key: Key) -> ProbedModel:
    """The model as it decides, with its outputs for the images."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    probed = ProbedModel(model, deciding_view(model), x, y, index, threat, key, dtype)
    probed.seed()
    try:
        outputs = probed.raw(x)
    except CannotRun as error:
        raise HoldfastError(
            f"the model cannot run on images of shape {tuple(x.shape[1:])}: {error.reason}; check channels, image"
            " size and type"
        ) from error
    classes = outputs.shape[1]
    if outputs.shape[0] != len(x) or classes < 2 or not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise HoldfastError(
            f"the model returned shape {tuple(outputs.shape)} for {len(x)} images with labels in"
            f" [{int(y.min())}, {int(y.max())}]: return one row an image, one logit a class, at least two"
        )
    probed.outputs = outputs
    return probed


def finite(tensor: Tensor) -> Tensor:
    """NaN becomes 0, infinity a large number whose differences are finite."""
    return torch.nan_to_num(tensor, nan=0.0, posinf=1e30, neginf=-1e30)


def _of_finite(loss: Loss, logits: Tensor) -> Tensor:
    return loss(finite(logits))


def unit(logits: Tensor) -> Tensor:
    """Rows divided by their length, whatever their scale: squares of 1e-25 or 1e30 do not fit float32."""
    largest = logits.abs().amax(1, keepdim=True)
    scaled = logits / torch.where(largest > 0, largest, 1.0)
    return scaled / scaled.norm(dim=1, keepdim=True).clamp_min(0.5)  # at least 1, but for a row of zeros


def count(rows: Tensor) -> int:
    return int(rows.sum())


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def direction(gradient: Tensor, point: Tensor, threat: ThreatModel) -> Tensor:
    """A step of length 1 uphill that the pixel bounds do not stop.

    Linf and L2 take their steepest one. For L1 that is a single pixel, too little for a few steps: the tenth of all
    pixels with the largest gradient share the length.
    """
    stopped = ((point >= threat.upper) & (gradient > 0)) | ((point <= threat.lower) & (gradient < 0))
    free = gradient.masked_fill(stopped, 0.0)
    if threat.norm != "L1":
        longest = free.flatten(1).abs().amax(1).clamp_min(1e-38)  # a gradient of 1e-30 has a direction too
        return threat.steepest(free / broadcast(longest, free))
    flat = free.flatten(1)
    chosen = flat.abs().topk(max(1, flat.shape[1] // 10), dim=1).indices
    signs = torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen).sign())
    return (signs / chosen.shape[1]).view_as(gradient)
