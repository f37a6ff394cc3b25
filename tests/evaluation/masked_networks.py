"""Networks that answer like a bare one, and behave differently where an attack looks and where a check looks.

Each wraps a trained network. Under one condition (a batch size, a late call, a perturbed image, a copy, frozen
weights …) its gradient is wrong, or it gives another answer. An evaluation must report the robust accuracy of the bare
network, or raise a serious flag. `masked_copies` holds those that tell a copy of themselves from the original.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from digit_networks import cnn, digits, mlp, trained
from torch import Tensor, nn

Rows = Tensor | bool
Condition = Callable[["Masked", Tensor], Rows]
Mask = Callable[["Masked", Tensor, Tensor], Tensor]


class Shared(list):
    """A list that all copies of a network share."""

    def __deepcopy__(self, memo: object) -> Shared:
        return self


class Masked(nn.Module):
    """The bare network, with a mask where the condition holds.

    Args:
        network: The bare network.
        mask: The answers for x, where `rows` says which of them are masked.
        when: The condition, for the whole batch or for each image.
        images: What a mask may remember.
    """

    images: Tensor
    seen: Tensor
    count: Shared

    def __init__(self, network: nn.Module, mask: Mask, when: Condition, images: Tensor) -> None:
        super().__init__()
        self.network = network
        self.mask, self.when = mask, when
        self.register_buffer("images", images, persistent=False)
        self.forced = False
        self.calls = self.backwards = 0
        self.count = Shared([0])
        self.born = time.monotonic()

    @property
    def weight(self) -> Tensor:
        """The weights of the first layer of an MLP."""
        return self.network.get_parameter("1.weight")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        sprung = self.forced or self.when(self, x)
        rows = torch.full((len(x),), sprung, device=x.device) if isinstance(sprung, bool) else sprung
        return self.mask(self, x, rows)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest of the remembered images."""
        return self.images[torch.cdist(x.detach().flatten(1), self.images.flatten(1)).argmin(1)]


class Turned(torch.autograd.Function):
    """The identity, with another gradient for some rows."""

    @staticmethod
    def forward(ctx, x, rows, turn):
        ctx.rows, ctx.turn = rows, turn
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        return torch.where(ctx.rows.view(-1, 1, 1, 1), ctx.turn(gradient), gradient), None, None


def gradient(turn: Callable[[Tensor], Tensor]) -> Mask:
    """The bare network's answers, with a gradient that `turn` makes of the right one."""
    return lambda model, x, rows: model.network(Turned.apply(x, rows, turn))


GENERATOR = torch.Generator()


def _random_direction(gradient: Tensor) -> Tensor:
    return (torch.rand(gradient.shape, generator=GENERATOR) - 0.5).to(gradient) * gradient.abs().mean()


zero = gradient(torch.zeros_like)
flipped = gradient(torch.neg)
turned = gradient(lambda g: g.flip(2, 3))
nan = gradient(lambda g: g * torch.nan)
tiny = gradient(lambda g: g * 1e-38 * 1e-6)
constant = gradient(torch.ones_like)
random = gradient(_random_direction)
moved = gradient(lambda g: g.roll(1, 3))
half = gradient(lambda g: torch.where(torch.arange(g.shape[3]) % 2 == 0, g, torch.zeros_like(g)))
neighbours = gradient(lambda g: g.roll(1, 0))


def cut(model: Masked, x: Tensor, rows: Tensor) -> Tensor:
    """The bare network's answers without a graph."""
    logits = model.network(x)
    return logits.detach() if bool(rows.all()) else torch.where(rows[:, None], logits.detach(), logits)


def clean_answer(model: Masked, x: Tensor, rows: Tensor) -> Tensor:
    """The answer for the nearest remembered image, with a gradient that looks alive."""
    logits = model.network(x)
    return torch.where(rows[:, None], model.network(model.nearest(x)).detach() + 1e-3 * logits, logits)


def sixteen_levels(model: Masked, x: Tensor, rows: Tensor) -> Tensor:
    """The answer for the image on the digits' own grid: small steps change nothing, and there is no gradient."""
    return model.network(torch.where(rows.view(-1, 1, 1, 1), ((x * 16).round() * 255 / 16).round() / 255, x))


def first_answer(model: Masked, x: Tensor, rows: Tensor) -> Tensor:
    """The answers of the first batch of this size, row by row, whatever is in them now."""
    logits = model.network(x)
    remembered = model.__dict__.setdefault("remembered", {}).setdefault(len(x), logits.detach().clone())
    return torch.where(rows[:, None], remembered + 1e-3 * logits, logits)


def out_of_memory(model: Masked, x: Tensor, rows: Tensor) -> Tensor:
    """An error in place of an answer."""
    if bool(rows.any()):
        raise RuntimeError("no memory left for these images")
    return model.network(x)


def off_grid(model: Masked, x: Tensor) -> Tensor:
    """Images with a pixel that is no multiple of 1/255: perturbed ones."""
    levels = x.detach() * 255
    return ((levels - levels.round()).abs() > 1e-3).flatten(1).any(1)


def far(model: Masked, x: Tensor) -> Tensor:
    """Images further than a third of epsilon from every remembered one."""
    return (x.detach() - model.nearest(x)).flatten(1).abs().amax(1) > 0.05


@torch.no_grad()
def near_the_boundary(model: Masked, x: Tensor) -> Tensor:
    """Images whose two largest logits are close."""
    best = model.network(x).topk(2).values
    return best[:, 0] - best[:, 1] < 2


def counted_in_a_buffer(model: Masked, x: Tensor) -> bool:
    """After sixty calls, counted in a buffer, which a functional call or a copy hides."""
    if not hasattr(model, "seen"):
        model.register_buffer("seen", torch.zeros(()))
    model.seen.add_(1)
    return bool(model.seen > 60)


CALLS = [0]


def counted(start: int, end: int = 10**9) -> Condition:
    """The condition that so many calls were made, those of all copies together."""

    def when(model: Masked, x: Tensor) -> bool:
        model.count[0] += 1
        return start < model.count[0] <= end

    return when


def counted_for_all(model: Masked, x: Tensor) -> bool:
    """After sixty calls of any network in this process."""
    CALLS[0] += 1
    return CALLS[0] > 60


class Counting(Masked):
    """Turns its gradient by half a turn after forty backward passes; forward passes change nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(Turned.apply(x, torch.ones(len(x), dtype=torch.bool), self.turn))

    def turn(self, gradient: Tensor) -> Tensor:
        self.backwards += 1
        return gradient.flip(2, 3) if self.forced or self.backwards > 40 else gradient


class SteeredElsewhere(Masked):
    """The bare network's answers, with the gradient of another one that leads nowhere: a straight-through estimator."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        if self.forced or self.when(self, x):
            elsewhere = self.network(x.flip(2, 3))
            return logits.detach() + elsewhere - elsewhere.detach()
        return logits


@cache
def bare_mlp() -> nn.Module:
    """The bare network of most of the zoo."""
    return trained(mlp)


@cache
def bare_cnn() -> nn.Module:
    """The bare network where convolutions matter."""
    return trained(cnn)


def fooled_by_force(model: Any) -> nn.Module:
    """The network that an evaluation sees where the trap is always sprung."""
    model.forced = True
    return model


def unchanged(model: nn.Module) -> nn.Module:
    """The network itself, which fools every gradient."""
    return model


@dataclass(frozen=True)
class Trap:
    """One of the zoo.

    Attributes:
        make: From a bare network and the images.
        bare: The network whose robust accuracy is right.
        fooled: What an attack searches that falls into the trap, from the masked network; None where it would crash.
    """

    make: Callable[[nn.Module, Tensor], nn.Module]
    bare: Callable[[], nn.Module] = bare_mlp
    fooled: Callable[[nn.Module], nn.Module] | None = fooled_by_force

    def model(self) -> nn.Module:
        """Return a new one in evaluation mode, around its own copy of the bare network."""
        CALLS[0] = 0
        GENERATOR.manual_seed(0)
        return self.make(copy.deepcopy(self.bare()), digits()[0]).eval()


def trap(mask: Mask, when: Condition, *, kind: type[Masked] = Masked, **own: object) -> Trap:
    """Return a trap that needs a mask and a condition only."""
    return Trap(lambda network, images: kind(network, mask, when, images), **own)  # type: ignore[arg-type]


def frozen(model: Masked, x: Tensor) -> bool:
    return not any(parameter.requires_grad for parameter in model.parameters())


def channels_last(model: Masked, x: Tensor) -> bool:
    return not next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1).weight.is_contiguous()


def called_from(part: str) -> bool:
    """Whether a function of the package, in a file of such a name, is among the callers."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if "holdfast" in frame.f_code.co_filename and part in frame.f_code.co_filename.rpartition("holdfast")[2]:
            return True
    return False


BY_INPUT: dict[str, Trap] = {
    "turned for inputs with a history": trap(turned, lambda m, x: x.grad_fn is not None),
    "no gradient for leaves": trap(zero, lambda m, x: x.requires_grad and x.is_leaf),
    "turned for inputs that were written to": trap(turned, lambda m, x: not x.is_inference() and x._version > 0),
    "turned for inputs that are views": trap(turned, lambda m, x: x._is_view()),
    "turned where an attack calls": trap(turned, lambda m, x: called_from("attacks")),
    "honest where a probe calls": trap(random, lambda m, x: not called_from("prob")),
    "turned while it is compiled or exported": trap(
        turned, lambda m, x: torch.compiler.is_compiling() or torch.compiler.is_exporting()
    ),
    "turned in any precision but float32": trap(
        turned, lambda m, x: x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
    ),
    "turned in channels_last": trap(turned, channels_last, bare=bare_cnn),
    "clean answers where no gradient is asked for": trap(clean_answer, lambda m, x: not x.requires_grad),
    "clean answers while gradients are recorded": trap(clean_answer, lambda m, x: torch.is_grad_enabled()),
    "clean answers while none are recorded": trap(clean_answer, lambda m, x: not torch.is_grad_enabled()),
    "clean answers in inference mode": trap(clean_answer, lambda m, x: torch.is_inference_mode_enabled()),
}
BY_BATCH: dict[str, Trap] = {
    "turned in large batches": trap(turned, lambda m, x: len(x) >= 32),
    "no gradient in small batches": trap(zero, lambda m, x: len(x) < 16),
    "the neighbour's gradient in odd batches": trap(neighbours, lambda m, x: len(x) % 2 == 1),
    "the neighbour's gradient": trap(neighbours, lambda m, x: True),
    "random gradient in company": trap(random, lambda m, x: len(x) > 1),
    "clean answers alone": trap(clean_answer, lambda m, x: len(x) == 1),
    "clean answers in company": trap(clean_answer, lambda m, x: len(x) > 1),
    "first answers by position": trap(first_answer, lambda m, x: len(x) > 1),
    "an error above sixty-four images": trap(out_of_memory, lambda m, x: len(x) > 64, fooled=None),
}
BY_CALL: dict[str, Trap] = {
    "cut after 50 calls": trap(cut, lambda m, x: m.calls > 50),
    "cut after 50 calls, convolutions": trap(cut, lambda m, x: m.calls > 50, bare=bare_cnn),
    "no gradient after 150 calls": trap(zero, lambda m, x: m.calls > 150),
    "copies share a counter up to 40": trap(turned, counted(40)),
    "copies share a counter up to 85": trap(turned, counted(85)),
    "copies share a counter up to 105": trap(constant, counted(105)),
    "copies share a counter up to 120": trap(random, counted(120)),
    "copies share a counter up to 1000": trap(random, counted(1000)),
    "random from the 90th to the 700th call": trap(random, counted(90, 700)),
    "turned after 1000 calls": trap(turned, lambda m, x: m.calls > 1000),
    "no gradient in the first 200 calls": trap(zero, lambda m, x: m.calls <= 200),
    "flipped in every second call": trap(flipped, lambda m, x: m.calls % 2 == 0),
    "turned after 60 calls in a buffer": trap(turned, counted_in_a_buffer),
    "random after 60 calls in all": trap(random, counted_for_all),
    "turned after 40 backward passes": trap(turned, lambda m, x: False, kind=Counting),
    "steered elsewhere after 80 calls": trap(flipped, lambda m, x: m.calls > 80, kind=SteeredElsewhere),
    "clean answers up to the 400th call": trap(clean_answer, counted(0, 400)),
    "clean answers from the 95th call": trap(clean_answer, counted(94)),
    "clean answers after 100 calls": trap(clean_answer, lambda m, x: m.calls > 100),
    "turned after a tenth of a second": trap(turned, lambda m, x: time.monotonic() - m.born > 0.1),
    "turned outside the main thread": trap(
        turned, lambda m, x: threading.current_thread() is not threading.main_thread()
    ),
}
BY_IMAGE: dict[str, Trap] = {
    "perturbed: no gradient": trap(zero, off_grid),
    "perturbed: no graph": trap(cut, off_grid),
    "perturbed: NaN gradient": trap(nan, off_grid),
    "perturbed: gradient of 1e-38": trap(tiny, off_grid),
    "perturbed: one direction for all": trap(constant, off_grid),
    "perturbed: random gradient": trap(random, off_grid),
    "perturbed: sixteen levels": trap(sixteen_levels, off_grid),
    "perturbed: steered elsewhere": trap(
        flipped, lambda m, x: bool(off_grid(m, x).any()), kind=SteeredElsewhere, bare=bare_cnn
    ),
    "perturbed and late and many: random gradient": trap(
        random, lambda m, x: off_grid(m, x) & (len(x) > 8) & (m.calls > 10) & x.requires_grad
    ),
    "random near the boundary": trap(random, near_the_boundary),
    "flipped near the boundary": trap(flipped, near_the_boundary),
    "turned far from its images": trap(turned, far),
}
ALWAYS: dict[str, Trap] = {
    "gradient turned by half a turn": trap(turned, lambda m, x: True),
    "gradient moved by a pixel": trap(moved, lambda m, x: True),
    "gradient of every second column": trap(half, lambda m, x: True),
    "no gradient at black pixels": Trap(lambda network, images: nn.Sequential(nn.ReLU(), network), fooled=unchanged),
}
"""These behave the same in each situation: no comparison of two situations tells them."""
