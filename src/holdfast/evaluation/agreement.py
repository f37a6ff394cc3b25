"""Whether two ways of running a network give the same answers beyond rounding: logits, and gradients of the pixels.

Every figure is taken a row at a time and relative to the row: logits are compared after their mean has been taken away,
in units of the largest logit that is left, so that neither a constant offset nor a scale hides a difference; gradients
in units of the longer of the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from holdfast.evaluation.running import logits_from
from holdfast.forward import View
from holdfast.keyed_random import Key, uniform

MOVE = 0.01  # how far a point is moved towards random pixels, so that no two of its pixels are tied
SMALL = 1e-4  # of the logits' spread: a gradient that promises less over the whole pixel range is not compared
ULPS = 1e-6  # of the largest logit: what float32 cannot resolve
HALVES = (torch.bfloat16, torch.float16)


class Tolerance(NamedTuple):
    """How far two answers may be apart.

    Attributes:
        logits: Relative to the row's spread.
        gradients: Relative to the longer gradient; 1 is a gradient beside a zero one, 2 a reversed one.
        share: Of compared rows that may be farther apart: beyond a kink, or next to a level of a quantiser.
    """

    logits: float
    gradients: float
    share: float


FULL = Tolerance(0.01, 0.3, 0.02)
TENSOR_CORES = Tolerance(0.05, 0.5, 0.02)  # float32 on an accelerator may multiply with 10 bits (TF32)
HALF = Tolerance(0.5, 0.9, 0.1)  # 8 bits: it only steers


def logits_apart(logits: Tensor, wanted: Tensor) -> Tensor:
    """How far two networks' logits are apart, as a share of how far the wanted ones spread.

    Where one logit is NaN or infinite and its counterpart is not, the row is infinitely far apart.

    Shapes:
        logits, wanted: (R, K). Returns (R,), float64.

    Example:
        >>> logits_apart(torch.tensor([[1.0, 3.0]]), torch.tensor([[101.0, 103.0]])).tolist()
        [0.0]
        >>> logits_apart(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]])).tolist()
        [0.5]
    """
    one, two = logits.double(), wanted.double()
    both = one.isfinite() & two.isfinite()
    count = both.sum(1, keepdim=True).clamp_min(1)
    largest = torch.where(both, two, 0.0).abs().amax(1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(both, values, 0.0)
        return torch.where(both, values - values.sum(1, keepdim=True) / count, 0.0)

    apart = (centred(one) - centred(two)).abs().amax(1)
    apart = torch.where(apart <= ULPS * largest, 0.0, apart)
    share = torch.where(apart > 0, apart / centred(two).abs().amax(1).clamp_min(1e-300), 0.0)
    return torch.where((one.isfinite() != two.isfinite()).any(1), torch.inf, share)


def gradients_apart(gradient: Tensor, wanted: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
    """How far two gradients are apart, as a share of the longer one.

    Rows are not compared (0) where both gradients promise less than rounding over the whole pixel range, as a
    saturated network's do, and where the wanted one is NaN or infinite.

    Args:
        gradient: Of the weighted sum of the logits.
        wanted: The same, another way.
        weights: Of the logits.
        logits: What the spread is taken of.

    Shapes:
        gradient, wanted: (R, C, H, W); weights, logits: (R, K). Returns (R,), float64.

    Example:
        >>> one = torch.tensor([[[[3.0, 4.0]]]])
        >>> gradients_apart(0 * one, one, torch.ones(1, 2), torch.tensor([[0.0, 1.0]])).tolist()
        [1.0]
    """
    one, two = gradient.double().flatten(1), wanted.double().flatten(1)
    told, asked = one.isfinite().all(1), two.isfinite().all(1)
    one, two = one * 1.0, two * 1.0
    one[~told], two[~asked] = 0.0, 0.0
    centred = (logits.double() - logits.double().mean(1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    least = SMALL * weights.double().norm(dim=1) * centred.abs().amax(1)
    worth = (torch.maximum(one.abs().sum(1), two.abs().sum(1)) > least) & asked
    longest = torch.maximum(one.abs().amax(1), two.abs().amax(1)).clamp_min(1e-300)[:, None]
    one, two = one / longest, two / longest
    share = (one - two).norm(dim=1) / torch.maximum(one.norm(dim=1), two.norm(dim=1)).clamp_min(1e-300)
    return torch.where(asked & ~told, 2.0, torch.where(worth, share, 0.0))


def moved(x: Tensor, key: Key) -> Tensor:
    """Images moved a hundredth of the way towards random pixels: inside [0, 1], and no two pixels are tied.

    Where pixels are tied (a black background), rounding decides which of them a max-pooling hands its gradient to.

    Shapes:
        x: (R, C, H, W). Returns the same.
    """
    noise = uniform(key, torch.arange(len(x), device=x.device), x.shape[1:], dtype=x.dtype)
    return x + MOVE * (noise - x)


class _Halves(TorchFunctionMode):
    """Notes whether any function of torch returned a tensor of 16 bits."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]  # torch gives no types
        returned = func(*args, **(kwargs or {}))
        if isinstance(returned, Tensor) and returned.dtype in HALVES:
            self.seen = True
        return returned


@torch.no_grad()
def computes_in_halves(view: View, x: Tensor) -> bool:
    """Whether a network computes anything in 16 bits, whatever its weights and outputs are.

    Example:
        >>> class Half(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.flatten(1).bfloat16().float()
        >>> computes_in_halves(View(Half()), torch.zeros(1, 1, 1, 2))
        True
    """
    with _Halves() as mode:
        logits_from(view, x.clone())
    return mode.seen or any(tensor.dtype in HALVES for tensor in (*view.model.parameters(), *view.model.buffers()))


def tolerance_of(device: torch.device, *, halves: bool) -> Tolerance:
    """What rounding can do: on which processor, and whether anything is computed in 16 bits."""
    if halves:
        return HALF
    return FULL if device.type == "cpu" else TENSOR_CORES
