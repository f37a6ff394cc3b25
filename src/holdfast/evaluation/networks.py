"""The two networks of an evaluation: one that decides, and one that may be faster and only searches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.compilation import compile_in_place
from holdfast.errors import HoldfastError
from holdfast.evaluation.folding import folded
from holdfast.forward import View
from holdfast.models.adapted import is_scripted
from holdfast.models.outputs import logits_of

PRECISIONS = ("fp32", "bf16")


class Pass(NamedTuple):
    """What one pass returned: logits (R, K), loss (R,), and the gradient or gradients where they were asked for."""

    logits: Tensor
    loss: Tensor
    gradient: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How the search may save time; no setting changes what counts as a success.

    Args:
        precision: ``"bf16"`` searches in bfloat16 where a row is not near the decision boundary.
        fold: Fold BatchNorm into the layers before it.
        compile: Compile the searching network (seconds to a minute at the start).
        batch_size: Rows that are run together.
        look_every: Passes between two looks at claimed successes; see `holdfast.evaluation.pursuit.Rules`.
    """

    precision: str = "fp32"
    fold: bool = True
    compile: bool = False
    batch_size: int = 250
    look_every: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise HoldfastError(f"precision {self.precision!r} is unknown: use {' or '.join(PRECISIONS)}")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise HoldfastError(f"batch_size is {self.batch_size!r}: give a whole number of at least 1")


class Deciding:
    """The model itself, as it was given, in evaluation mode and without autocast: what decides.

    Nothing of the model is changed: it runs as a `View`, which puts every flag back.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        # A forward that writes into a buffer writes into these copies.
        if is_scripted(model):  # it takes no weights from outside
            self.view = View(_plain_copy(model))
        else:
            self.view = View(model, state={name: buffer.clone() for name, buffer in model.named_buffers()})
        self.batch_size = batch_size
        self.dtype = dtype_of(model)

    @torch.no_grad()
    def __call__(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Logits (R, K), in batches."""
        with torch.autocast(x.device.type, enabled=False):
            parts = [self._logits(part) for part in x.split(batch_size or self.batch_size)]
        return torch.cat(parts).to(x.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        """Of one batch; a copy is run, because a model may write into its input."""
        try:
            return self.view(x.to(self.dtype, copy=True)).logits
        except HoldfastError:
            raise
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if "out of memory" in str(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise HoldfastError(
                f"the model cannot run on {len(x)} image{'s' * (len(x) > 1)} of shape {tuple(x.shape[1:])}: {reason};"
                " in evaluation mode it must take any number of them"
            ) from error


class Searching:
    """A frozen copy of the model for searching: folded, in low precision where allowed, and compiled if asked.

    A model that cannot be copied is searched as it is, through a view.

    Args:
        model: Left alone.
        x: A few images, on the device.
        speed: What is allowed.
        randomised: The model draws: it is not folded, because two runs could not be compared.
    """

    def __init__(self, model: nn.Module, x: Tensor, speed: Speed, *, randomised: bool = False) -> None:
        self.folded, self.batch_size = 0, speed.batch_size
        self.compiled = self.padded = False
        self.dtype = dtype_of(model)
        self.layout = torch.channels_last
        self.low = speed.precision == "bf16" and self.dtype == torch.float32
        self.precise = self._copy(model, x, speed.fold and not randomised)
        self.differentiable = self._can_differentiate(x)
        self.fast = self._fast(speed) if self.low else self.precise
        if speed.compile and isinstance(self.precise, nn.Module) and not is_scripted(self.precise):
            for network in {id(each): each for each in (self.precise, self.fast)}.values():
                compile_in_place(network)  # type: ignore[arg-type]  # both are modules where the first is
            self.compiled = self.padded = True

    def _copy(self, model: nn.Module, x: Tensor, fold: bool) -> Callable[[Tensor], Tensor]:
        """The network in full precision."""
        try:
            network, self.folded = folded(model, x.to(self.dtype)) if fold else (_plain_copy(model), 0)
        except Exception as error:  # whatever a copy raises that the model's own code cannot stand
            if isinstance(error, HoldfastError) or "out of memory" in str(error):
                raise
            self.layout = torch.contiguous_format
            view = View(model).detached()
            return lambda images: view(images).logits
        for parameter in network.parameters():  # one by one: a scripted network refuses `requires_grad_`
            parameter.requires_grad_(False)
        try:
            laid = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # of four dimensions
            laid(x.to(self.dtype, memory_format=torch.channels_last, copy=True))
        except RuntimeError:  # a view of the pixels that wants them in a row
            self.layout = torch.contiguous_format
            network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above
        return network

    def _can_differentiate(self, x: Tensor) -> bool:
        """Whether a gradient reaches the pixels at all; a flag tells people if none does."""
        try:
            with torch.enable_grad():
                point = x.detach().requires_grad_(True)
                logits = self._logits(self.precise, point)
                _gradient(logits, logits[:, 0], point, "gradient")
        except (RuntimeError, TypeError) as error:  # the graph is cut, or pixels that want a gradient cannot be run
            if "out of memory" in str(error):
                raise
            return False
        return True

    def _fast(self, speed: Speed) -> Callable[[Tensor], Tensor]:
        """The network with the weights of its large layers in bfloat16, to be run under autocast."""
        if not isinstance(self.precise, nn.Module):
            return self.precise
        network = _plain_copy(self.precise)
        shared = [id(p) for p in network.parameters()]
        for module in network.modules():
            if type(module) in (nn.Conv2d, nn.Linear) and all(shared.count(id(p)) == 1 for p in module.parameters()):
                module.to(torch.bfloat16)
        return network

    def run(self, x: Tensor, loss: Callable[[Tensor], Tensor], want: str, *, fast: bool) -> Pass:
        """One pass, and the gradient with respect to the pixels alone.

        Args:
            x: (R, C, H, W).
            loss: Logits to (R,).
            want: ``"logits"``, ``"gradient"`` or ``"gradients"``.
            fast: In low precision, if there is one.
        """
        if self.padded:
            return self._padded(x, loss, want, fast=fast)
        low = fast and self.low
        network = self.fast if low else self.precise
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
            if want == "logits" or not self.differentiable:
                with torch.no_grad():
                    logits = self._logits(network, x)
                    value = loss(logits)
                if want == "logits":
                    return Pass(logits, value, None)
                # no gradient is a gradient of zero: attacks that need none go on
                shape = (len(x), logits.shape[1], *x.shape[1:]) if want == "gradients" else x.shape
                return Pass(logits, value, x.new_zeros(shape))
            with torch.enable_grad():
                point = x.detach().to(self.dtype, memory_format=self.layout, copy=True).requires_grad_(True)
                logits = self._logits(network, point)
                value = loss(logits)
                gradient = _gradient(logits, value, point, want)
        return Pass(logits.detach(), value.detach(), gradient.to(x.dtype))

    def _logits(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        laid = x.to(self.dtype, memory_format=self.layout)
        # A model may write into its input, so it gets a copy; a compiled one must be given a leaf, or it warns.
        logits = logits_of(network(laid if self.compiled else laid.clone()))
        if logits.dim() != 2:
            raise HoldfastError("the model must return logits (B, K): return one row of logits an image")
        return logits.to(x.dtype)

    def _padded(self, x: Tensor, loss: Callable[[Tensor], Tensor], want: str, *, fast: bool) -> Pass:
        """Rows filled up to one of a few sizes, so that a compiled network meets few shapes."""
        size = self.batch_size
        while size // 2 >= max(len(x), 8):
            size //= 2
        rows = len(x)
        padded = torch.cat([x, x[:1].expand(max(0, size - rows), *x.shape[1:])])
        self.padded = False
        try:
            done = self.run(padded, lambda logits: torch.cat([loss(logits[:rows]), logits[rows:, 0]]), want, fast=fast)
        finally:
            self.padded = True
        gradient = None if done.gradient is None else done.gradient[:rows]
        return Pass(done.logits[:rows], done.loss[:rows], gradient)


def _gradient(logits: Tensor, value: Tensor, point: Tensor, want: str) -> Tensor:
    """Of the loss, or of every logit."""
    if want == "gradient":
        (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
        return torch.zeros_like(point) if gradient is None else gradient
    count = logits.shape[1]
    each = [torch.autograd.grad(logits[:, k].sum(), point, retain_graph=k < count - 1)[0] for k in range(count)]
    return torch.stack(each, 1)


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which type a model wants its images: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode."""
    with torch.no_grad():  # else the weights of a scripted network's copy would be no leaves
        return copy.deepcopy(model).eval()
