"""Ways of running a network so that a gradient reaches the pixels, and the choice of the one that a search takes.

A network can tell how it is run: copied or not, from pixels that are a leaf of the graph or a copy of one, with weights
that want gradients or with frozen ones, with the graph recorded or without. An honest network's answers depend on none
of that. The search must see what the deciding network is, so its way is compared with the bare network's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.evaluation.agreement import (
    Tolerance,
    computes_in_halves,
    gradients_apart,
    logits_apart,
    moved,
    tolerance_of,
)
from holdfast.evaluation.draws import begin_draws, left_as_it_was
from holdfast.evaluation.running import logits_from, told
from holdfast.forward import View
from holdfast.keyed_random import Key, normal
from holdfast.models.adapted import is_scripted
from holdfast.models.outputs import logits_of

KEY = Key(0).fold("agreement")
FEW = 0.25  # of the rows that are compared at the start: kinks


@dataclass(frozen=True)
class Path:
    """One way of running a network.

    Args:
        name: What it is, in words.
        network: Images to logits.
        dtype: In which type it wants its images.
        layout: In which memory format.
        leaf: The network is given the very pixels that want the gradient, and not a copy, which it may write into.

    Shapes:
        x: (R, C, H, W). Logits: (R, K).
    """

    name: str
    network: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format
    leaf: bool = False

    def point(self, x: Tensor) -> Tensor:
        """A copy of the images that wants a gradient."""
        return x.detach().to(self.dtype, memory_format=self.layout, copy=True).requires_grad_(True)

    def __call__(self, x: Tensor) -> Tensor:
        laid = x.to(self.dtype, memory_format=self.layout)
        logits = logits_of(self.network(laid if self.leaf and laid.requires_grad else laid.clone()))
        if logits.dim() != 2:
            raise HoldfastError("the model must return logits (B, K): return one row of logits an image")
        return logits.to(x.dtype)


def backward(values: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor] | None:
    """Gradients of the sum of every value with respect to all points; None where the graph reaches no point."""
    each: list[Tensor] = []
    reached = False
    for number, value in enumerate(values):
        again = number < len(values) - 1
        found = torch.autograd.grad(value.sum(), points, retain_graph=again, allow_unused=True)
        reached |= any(part is not None for part in found)
        whole = [torch.zeros_like(p) if part is None else part for part, p in zip(found, points, strict=True)]
        each.append(whole[0] if len(whole) == 1 else torch.cat(whole))
    return each if reached else None


def vector_product(path: Path, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and the gradient of their weighted sum; None where the graph is cut."""
    with torch.enable_grad():
        point = path.point(x)
        logits = path(point)
        if not logits.requires_grad:
            return logits, None
        found = backward([(logits * weights.to(logits.dtype)).sum(1)], [point])
    return logits.detach().to(x.dtype), None if found is None else found[0].to(x.dtype)


class Answers(NamedTuple):
    """What a path said: logits without and with the graph, (R, K), and the gradient, or why there is none."""

    logits: Tensor | None
    recorded: Tensor | None
    gradient: Tensor | None
    reason: str

    @property
    def alive(self) -> bool:
        """Whether there is a gradient that an attack could go by."""
        return self.gradient is not None and bool(((self.gradient != 0) & self.gradient.isfinite()).any())


def ways(model: nn.Module, dtype: torch.dtype) -> list[Path]:
    """The model itself, run as others would run it, the most usual way first."""
    buffers = _buffers(model)
    alike = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanting = {name: p.detach().requires_grad_(p.is_floating_point()) for name, p in model.named_parameters()}
    views = {
        "as they are": deciding_view(model),
        "trainable": View(model, state={**wanting, **buffers}, copies_images=False),
        "frozen": View(model, state={**alike, **buffers}, copies_images=False),
    }
    if not takes_weights(model):
        views = {"as they are": views["as they are"]}
    return [
        Path(f"the model itself, weights {name}, pixels {kind}", _viewed(view), dtype, leaf=leaf)
        for name, view in views.items()
        for leaf, kind in ((True, "a leaf"), (False, "copied"))
    ]


def deciding_view(model: nn.Module) -> View:
    """The model as it decides; what a forward writes into its buffers is lost, and the model's own stay as they are.

    It is given the very images, and may write into them: the caller makes a copy.
    """
    if takes_weights(model):
        return View(model, state=_buffers(model), copies_images=False)
    try:
        model = plain_copy(model)
    except Exception as error:  # whatever a copy raises that the model's own code cannot stand: it is run itself
        told(error)
    return View(model, copies_images=False)


def takes_weights(model: nn.Module) -> bool:
    """Whether the model can be run with tensors from outside in place of its own: TorchScript and wrappers cannot."""
    return not isinstance(model, nn.DataParallel) and not any(is_scripted(module) for module in model.modules())


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode."""
    with torch.no_grad():  # else the weights of a scripted network's copy would be no leaves
        return copy.deepcopy(model).eval()


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies, into which a forward may write."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _viewed(view: View) -> Callable[[Tensor], Tensor]:
    return lambda images: logits_from(view, images)


@dataclass
class Judge:
    """The bare network on the first few images: what a search must agree with.

    Args:
        model: Left alone.
        x: A few real images.
        dtype: In which type the model wants them.

    Attributes:
        points: The images, and the images a little moved, (2n, C, H, W).
        path: The way of running the model whose gradient is the reference; None where no way gives one.
        contradiction: Two ways of asking the model itself gave different answers; "" where none did.
        passes: Made for the comparison: forward and backward, of one image each.
    """

    model: nn.Module
    x: Tensor
    dtype: torch.dtype
    path: Path | None = None
    contradiction: str = ""
    passes: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.x = self.x.detach()
        self.points = torch.cat([self.x, moved(self.x, KEY)])
        self.asked: dict[Path, Answers] = {}
        self.ways = ways(self.model, self.dtype)
        self.view = deciding_view(self.model)
        self.decided = self._plain(_viewed(self.view))
        rows = torch.arange(len(self.points), device=self.x.device)
        self.weights = normal(KEY.fold("weights"), rows, self.decided.shape[1:], dtype=self.x.dtype)
        with undisturbed(self.model, self.x.device):
            halves = computes_in_halves(self.view, self.x.to(self.dtype))
        self.tolerance = tolerance_of(self.x.device, halves=halves)
        self.usual = self.ways[0]
        self.answers = self.ask(self.usual)
        if self.answers.alive:
            self.path = self.usual
        if not self.says_alike(self._called()) and self.is_itself():
            self.contradiction = "its logits are others when it is called than when it is given its own buffers"

    @torch.no_grad()
    def _plain(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of the points without a graph, from the same draws as always."""
        with undisturbed(self.model, self.x.device):
            parts = [network(part.to(self.dtype, copy=True)).to(self.x.dtype) for part in self._parts]
        self.passes[0] += len(self.points)
        return torch.cat(parts)

    def _called(self) -> Tensor:
        """Logits of the model as anyone calls it; what it writes into its buffers is taken back."""
        before = _buffers(self.model)
        try:
            return self._plain(_viewed(View(self.model)))
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    if name in before and not torch.equal(buffer, before[name]):
                        buffer.copy_(before[name])

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.points.split(len(self.x))

    def ask(self, path: Path) -> Answers:
        """What a path answers to the points; it is asked once."""
        if path not in self.asked:
            self.asked[path] = self._ask(path)
        return self.asked[path]

    def _ask(self, path: Path) -> Answers:
        logits = recorded = gradient = None
        reason = ""
        try:
            with undisturbed(self.model, self.x.device), torch.no_grad():
                logits = torch.cat([path(part) for part in self._parts])
            with undisturbed(self.model, self.x.device):
                weights = self.weights.split(len(self.x))
                done = [vector_product(path, part, w) for part, w in zip(self._parts, weights, strict=True)]
            recorded = torch.cat([part.detach() for part, _ in done])
            found = [part for _, part in done if part is not None]
            gradient = torch.cat(found) if len(found) == len(done) else None
            reason = "" if gradient is not None else "the graph does not reach the pixels"
        except Exception as error:  # whatever a person's code raises when it is run this way
            reason = told(error)
        self.passes[0] += 2 * len(self.points)
        self.passes[1] += len(self.points)
        return Answers(logits, recorded, gradient, reason)

    def says_alike(self, logits: Tensor | None, tolerance: Tolerance | None = None) -> bool:
        """Whether logits of the points are those of the deciding network."""
        if logits is None or logits.shape != self.decided.shape:
            return False
        apart = logits_apart(logits, self.decided) > (tolerance or self.tolerance).logits
        return float(apart.double().mean()) <= FEW

    def steers_alike(self, gradient: Tensor | None, tolerance: Tolerance | None = None) -> bool:
        """Whether a gradient at the moved points is that of the bare network."""
        if self.path is None or gradient is None or self.answers.gradient is None:
            return self.path is None
        half = len(self.x)
        apart = gradients_apart(gradient[half:], self.answers.gradient[half:], self.weights[half:], self.decided[half:])
        return float((apart > (tolerance or self.tolerance).gradients).double().mean()) <= FEW

    def accepts(self, answers: Answers, tolerance: Tolerance | None = None) -> bool:
        """Whether a search may run this way: the deciding network's logits, and the bare network's gradient."""
        same = self.says_alike(answers.logits, tolerance) and self.says_alike(answers.recorded, tolerance)
        return same and self.steers_alike(answers.gradient, tolerance)

    def look_closer(self) -> None:
        """Ask the model itself in every way: the first that gives a gradient is the reference, others must agree."""
        for path in self.ways[1:]:
            answers = self.ask(path)
            if not answers.alive:
                continue
            if self.path is None:
                self.path, self.answers = path, answers
            elif not self.steers_alike(answers.gradient):
                self.contradiction = f"its gradient is another with {path.name} than with {self.path.name}"

    def forget(self) -> None:
        """Let go of what only the choice needed: copies and answers of the ways that were not chosen."""
        self.asked.clear()
        self.ways = []

    def gradient(self, x: Tensor, weights: Tensor) -> Tensor | None:
        """The gradient of weighted logits, of the bare network in full precision; None where its graph is cut."""
        with torch.autocast(x.device.type, enabled=False):
            return vector_product(self.path or self.usual, x, weights)[1]

    def is_itself(self) -> bool:
        """Whether the deciding network repeats its answers from the same draws: otherwise nothing can be compared."""
        return self.says_alike(self._plain(_viewed(self.view)))


class Choice(NamedTuple):
    """The way that a search takes.

    Attributes:
        path: This one.
        differentiable: Whether a gradient reaches the pixels.
        reason: Why none does.
        differs: How the way differs from the deciding network all the same; "" where it does not.
    """

    path: Path
    differentiable: bool
    reason: str
    differs: str


def chosen(judge: Judge, candidates: Iterable[Path], *, randomised: bool = False) -> Choice:
    """The first way of running the network that agrees with the bare one.

    Args:
        judge: The bare network.
        candidates: Fast ways first; the model itself is tried after them.
        randomised: Draws may differ between two ways: any way is taken that gives a gradient.
    """
    tried: list[tuple[Path, Answers]] = []
    for path in chain(candidates, judge.ways[::-1]):
        answers = judge.ask(path)
        tried.append((path, answers))
        if len(tried) == 1 and not (answers.alive and judge.accepts(answers)) and not randomised:
            judge.look_closer()  # it does not agree at once: can the model be believed itself?
        if answers.alive and (randomised or judge.accepts(answers)):
            return Choice(path, True, "", judge.contradiction)
    choice = _least_bad(judge, tried)
    return choice._replace(differs="") if randomised else choice


def _least_bad(judge: Judge, tried: Sequence[tuple[Path, Answers]]) -> Choice:
    """No way gives a gradient and agrees."""
    if judge.path is None:  # no gradient anywhere, or a gradient of zero everywhere
        same = next((each for each in tried if judge.accepts(each[1])), None)
        path, answers = same or tried[0]
        differs = "" if same or not judge.is_itself() else "no way of running it gives the logits that decide"
        return Choice(path, answers.gradient is not None, answers.reason, differs)
    if not judge.is_itself():  # it draws from a generator of its own: the first that gives a gradient
        path, answers = next((each for each in tried if each[1].alive), tried[0])
        return Choice(path, answers.alive, answers.reason, "")
    differs = judge.contradiction or "its logits are others where a gradient is asked for"
    return Choice(judge.path, True, "", differs)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Draws begin anew inside; afterwards the model and the random state are as if nothing had been run."""
    with left_as_it_was(model, device):
        begin_draws(KEY.torch_seed, device)
        yield
