"""The two networks of an evaluation: one that decides, and one that may be faster and only searches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.compilation import compile_in_place
from holdfast.errors import HoldfastError
from holdfast.evaluation.agreement import HALF
from holdfast.evaluation.folding import folded
from holdfast.evaluation.paths import Judge, Path, backward, chosen, deciding_view, plain_copy
from holdfast.evaluation.running import logits_from, told
from holdfast.models.adapted import is_scripted

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
        self.view = deciding_view(model)
        self.batch_size = batch_size
        self.dtype = dtype_of(model)

    @torch.no_grad()
    def __call__(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Logits (R, K), in batches."""
        with torch.autocast(x.device.type, enabled=False):
            parts = [
                logits_from(self.view, part.to(self.dtype, copy=True))  # it may write into its input
                for part in x.split(batch_size or self.batch_size)
            ]
        return torch.cat(parts).to(x.dtype)


@dataclass
class Trouble:
    """What went wrong in passes of a search that went on all the same.

    Attributes:
        cut: Rows that asked for a gradient and got none.
        why: The reason of the last of them.
        size: How many rows could still be run together, where more could not; 0: as many as were asked for.
        fails: Why more could not.
    """

    cut: int = 0
    why: str = ""
    size: int = 0
    fails: str = ""


class Searching:
    """The network that searches: a frozen copy of the model, folded, in low precision where allowed, compiled if asked.

    Copy and model are compared on a few images, logits and gradients. Where they differ beyond rounding, or the copy
    gets no gradient and the model does, the model itself is searched, in the first way that agrees.

    Args:
        model: Left alone.
        x: A few images, on the device.
        speed: What is allowed.
        randomised: The model draws: it is not folded, because two runs could not be compared.

    Attributes:
        judge: The bare network on these images.
        copied: Whether a copy is searched, and not the model itself.
        differs: How the search differs from the bare network all the same; "" where it does not.
        reason: Why no gradient reaches the pixels, where none does.
        trouble: What went wrong since it was last reset.
    """

    def __init__(self, model: nn.Module, x: Tensor, speed: Speed, *, randomised: bool = False) -> None:
        self.folded, self.batch_size = 0, speed.batch_size
        self.compiled = self.padded = False
        self.dtype = dtype_of(model)
        self.low = speed.precision == "bf16" and self.dtype == torch.float32
        self.judge = Judge(model, x, self.dtype)
        choice = chosen(self.judge, self._copies(model, x, speed.fold and not randomised), randomised=randomised)
        self.precise, self.differs = choice.path, choice.differs
        self.differentiable, self.reason = choice.differentiable, choice.reason
        self.copied = isinstance(self.precise.network, nn.Module)
        self.fast = self._fast(randomised) if self.low else self.precise
        self.judge.forget()
        if speed.compile and isinstance(self.precise.network, nn.Module) and not is_scripted(self.precise.network):
            for network in {id(path.network): path.network for path in (self.precise, self.fast)}.values():
                compile_in_place(network)  # type: ignore[arg-type]  # both are modules where the first is
            # a compiled network must be given a leaf, or it warns
            self.precise, self.fast = replace(self.precise, leaf=True), replace(self.fast, leaf=True)
            self.compiled = self.padded = True
        self.trouble = Trouble()
        self.largest = dict.fromkeys((True, False), self.batch_size)  # rows that run together, with a graph or without

    def _copies(self, model: nn.Module, x: Tensor, fold: bool) -> Iterator[Path]:
        """Copies in full precision, the fastest first."""
        for folding in (True, False) if fold else (False,):
            try:
                network, self.folded = folded(model, x.to(self.dtype)) if folding else (plain_copy(model), 0)
            except Exception as error:  # whatever a copy raises that the model's own code cannot stand
                told(error)
                continue
            for parameter in network.parameters():  # one by one: a scripted network refuses `requires_grad_`
                parameter.requires_grad_(False)
            path = self._laid(network, x)
            yield path
            yield replace(path, name=f"{path.name}, pixels a leaf", leaf=True)
            if folding and self.folded == 0:
                break  # it is a plain copy already
        self.folded = 0

    def _laid(self, network: nn.Module, x: Tensor) -> Path:
        """A copy in the memory format that is fastest, if it runs in it."""
        layout = torch.channels_last
        try:
            laid = network.to(memory_format=layout)  # type: ignore[call-overload]  # of four dimensions
            laid(x.to(self.dtype, memory_format=layout, copy=True))
        except Exception as error:  # a view of the pixels that wants them in a row, or a copy that cannot be run at all
            told(error)
            layout = torch.contiguous_format
            network = network.to(memory_format=layout)  # type: ignore[call-overload]  # as above
        return Path("a folded copy" if self.folded else "a copy", network, self.dtype, layout)

    def _fast(self, randomised: bool) -> Path:
        """The network with the weights of its large layers in bfloat16, to be run under autocast; if it agrees."""
        path = self.precise
        if isinstance(path.network, nn.Module):
            network = plain_copy(path.network)
            shared = [id(p) for p in network.parameters()]
            for module in network.modules():
                if type(module) in (nn.Conv2d, nn.Linear) and all(
                    shared.count(id(p)) == 1 for p in module.parameters()
                ):
                    module.to(torch.bfloat16)
            path = replace(path, network=network)
        with torch.autocast(self.judge.x.device.type, dtype=torch.bfloat16):
            answers = self.judge.ask(replace(path, name=f"{path.name}, bfloat16"))
        if randomised or self.differs or self.judge.accepts(answers, HALF):
            return path
        self.low = False
        return self.precise

    def run(self, x: Tensor, loss: Callable[[Tensor], Tensor], want: str, *, fast: bool) -> Pass:
        """One pass, and the gradient with respect to the pixels alone.

        A batch that the network cannot run, or through which it returns no gradient, is run in smaller ones; where
        that does not help either, the gradient is zero. Both are noted in `trouble`.

        Args:
            x: (R, C, H, W).
            loss: Logits to (R,).
            want: ``"logits"``, ``"gradient"`` or ``"gradients"``.
            fast: In low precision, if there is one.

        Raises:
            SearchFailed: the network cannot be run on a single image any more.
        """
        if self.padded:
            return self._padded(x, loss, want, fast=fast)
        low = fast and self.low
        path = self.fast if low else self.precise
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
            if want != "logits" and self.differentiable:
                done = self._differentiated(path, x, loss, want)
                if done is not None:
                    return done
            with torch.no_grad():
                logits = self._logits(path, x)
                value = loss(logits)
        if want == "logits":
            return Pass(logits, value, None)
        # no gradient is a gradient of zero: attacks that need none go on
        self.trouble.cut, self.trouble.why = self.trouble.cut + len(x), self.reason
        shape = (len(x), logits.shape[1], *x.shape[1:]) if want == "gradients" else x.shape
        return Pass(logits, value, x.new_zeros(shape))

    def gradients(self, x: Tensor, losses: Sequence[Callable[[Tensor], Tensor]]) -> tuple[Tensor, list[Tensor]] | None:
        """Logits, and the gradient of every loss (R,), from one pass in full precision; None where there is none."""
        if not self.differentiable:
            return None
        try:
            with torch.enable_grad():
                point = self.precise.point(x)
                logits = self.precise(point)
                found = None
                if logits.requires_grad:
                    found = backward([loss(logits.to(x.dtype)) for loss in losses], [point])
            self.reason = "" if found is not None else "the graph does not reach the pixels"
        except Exception as error:  # whatever a person's code raises
            self.reason, found = told(error), None
        return None if found is None else (logits.detach().to(x.dtype), [each.to(x.dtype) for each in found])

    def _differentiated(self, path: Path, x: Tensor, loss: Callable[[Tensor], Tensor], want: str) -> Pass | None:
        """A pass with a gradient, in as few batches as work; None where none works."""
        while True:
            size = self.largest[True]
            with torch.enable_grad():
                try:
                    points = [path.point(part) for part in x.split(size)]
                    logits = _whole([path(point) for point in points])
                except Exception as error:  # whatever a person's code raises
                    if not self._smaller(len(x), told(error), graph=True):
                        return None
                    continue
                value = loss(logits)
                try:
                    each = [value] if want == "gradient" else [logits[:, k] for k in range(logits.shape[1])]
                    found = backward(each, points) if logits.requires_grad else None
                    reason = "the graph does not reach the pixels"
                except Exception as error:  # the graph is cut, or its own backward fails
                    found, reason = None, told(error)
            if found is not None:
                gradient = found[0] if want == "gradient" else torch.stack(found, 1)
                return Pass(logits.detach(), value.detach(), gradient.to(x.dtype))
            if not self._smaller(len(x), reason, graph=True):
                return None

    def _smaller(self, rows: int, reason: str, *, graph: bool) -> bool:
        """Halve how many rows run together; False where it was one."""
        size = min(rows, self.largest[graph])
        if size == 1:
            if graph:  # not looked for any more; larger batches may run without it
                self.differentiable, self.reason = False, reason
            return False
        self.largest[graph] = size // 2
        self.trouble.size, self.trouble.fails = size // 2, reason
        return True

    def _logits(self, path: Path, x: Tensor) -> Tensor:
        """Logits without a graph, in as few batches as work."""
        while True:
            try:
                return _whole([path(part) for part in x.split(self.largest[False])])
            except Exception as error:  # whatever a person's code raises
                reason = told(error)
                if not self._smaller(len(x), reason, graph=False):
                    raise SearchFailed(reason) from error

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


class SearchFailed(Exception):
    """The network cannot be run any more, not even on one image; the reason is its message."""


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which type a model wants its images: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
