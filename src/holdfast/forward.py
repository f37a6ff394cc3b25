"""How a network is run: with which weights, which BatchNorm branch and which statistics.

A `View` is a value. Other weights are passed to it instead of being written into the model, because weights that are
changed in place are silently ignored inside one autocast region (cached casts), break a backward that is still to
come, and leave residue when something raises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.compilation import copies_input
from holdfast.errors import HoldfastError
from holdfast.models.modes import kept_in_evaluation
from holdfast.models.outputs import logits_of
from holdfast.models.substitution import called_with
from holdfast.models.taps import tapped
from holdfast.schedule import Progress

Statistics = Literal["eval", "batch", "batch_tracked"]
STATISTICS: tuple[Statistics, ...] = ("eval", "batch", "batch_tracked")


class Batch(NamedTuple):
    """What one step works on.

    Attributes:
        x: (B, C, H, W) pixels in [0, 1].
        y: (B,) integer labels.
        target: (B, K) soft labels where smoothing, MixUp or a memory makes them, else None.
        index: (B,) position of every image in the data set: memories and keyed randomness go by it.
        x2: A second augmentation of the same images, only where a method asks.
        mixed: The images are mixtures of two (MixUp, CutMix): y is only the label of the larger share.
    """

    x: Tensor
    y: Tensor
    target: Tensor | None = None
    index: Tensor | None = None
    x2: Tensor | None = None
    mixed: bool = False

    @property
    def labels(self) -> Tensor:
        """The soft labels where there are any, else y."""
        return self.y if self.target is None else self.target

    @property
    def attacked_labels(self) -> Tensor:
        """What an attack on the cross-entropy moves away from: y, or the soft labels of mixed images."""
        return self.labels if self.mixed else self.y

    @property
    def rows(self) -> Tensor:
        """The index of every image, or its place in the batch where none was given."""
        return torch.arange(len(self.y), device=self.y.device) if self.index is None else self.index


class Attacked(NamedTuple):
    """What an attack found. Rows are in the order of the batch.

    Attributes:
        x_adv: (B, C, H, W).
        steps_survived: (B,) how many of the iterates the attack looked at, the starting point included, the network
            still classified correctly (GAIRAT's κ).
        steps: How many iterates the attack looks at at most, the K of κ in 0 … K.
        others: Further images that the search made, by the side that runs on them: STAT's "collaborative", a one-step
            method's "adv_start", a second view's "adv2".
    """

    x_adv: Tensor
    steps_survived: Tensor
    steps: int = 0
    others: Mapping[str, Tensor] | None = None


class Outputs(NamedTuple):
    """What a view returns: logits (B, K), at least float32, and the features that were tapped, by module name."""

    logits: Tensor
    features: Mapping[str, Tensor]


class Forward(NamedTuple):
    """What an objective sees: outputs by side, never the model.

    `attacked` is None where no attacked side was asked for. `remember` is true in the step's own outer forward alone:
    an objective with memories writes them then, and not in a weight search.
    """

    batch: Batch
    outputs: Mapping[str, Outputs]
    attacked: Attacked | None
    progress: Progress
    remember: bool = False


@dataclass(frozen=True)
class View:
    """One way of running a network; immutable.

    Args:
        model: The network, pixels to logits.
        state: Parameters and buffers, by name, used in place of the model's own.
        branch: BatchNorm branch, for models that have several: every module with an attribute ``active_branch``
            runs under this name.
        statistics: ``"eval"`` normalises by running statistics; ``"batch"`` by those of the batch, leaving the running
            ones alone; ``"batch_tracked"`` by those of the batch, moving the running ones (training mode). Dropout
            is off in ``"eval"`` only.
        taps: Names of modules whose outputs are wanted as features.
        in_evaluation: Names of modules that stay in evaluation mode under every statistics (frozen BatchNorm); None:
            those that `holdfast.models.modes.kept_in_evaluation` finds when the view is run.
        cast_once: Names of weights that `detached` casts under autocast; see `holdfast.low_precision`.
        copies_images: The network is given a copy of the images; False where the caller has made one, or wants the
            network to see that its images are a leaf of the graph.

    Shapes:
        x: (B, C, H, W) in [0, 1]; never changed, though a network may write into what it is given. Logits: (B, K).
    Raises:
        HoldfastError: the model has no such branch, returns no logits (B, K) that `holdfast.models.outputs.logits_of`
            finds, or has no module of a tap's name.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> View(model)(torch.zeros(3, 1, 2, 2)).logits.shape
        torch.Size([3, 2])
    """

    model: nn.Module
    state: Mapping[str, Tensor] | None = None
    branch: str = "main"
    statistics: Statistics = "eval"
    taps: Sequence[str] = ()
    in_evaluation: frozenset[str] | None = None
    cast_once: frozenset[str] = frozenset()
    copies_images: bool = True

    def __post_init__(self) -> None:
        if self.statistics not in STATISTICS:
            raise HoldfastError(f"statistics {self.statistics!r} is unknown: use one of {', '.join(STATISTICS)}")

    def __call__(self, x: Tensor) -> Outputs:
        state = self.state
        if self.statistics == "batch":  # tracking writes into copies that are dropped
            copies = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            state = {**copies, **{n: t.clone() if n in copies else t for n, t in (state or {}).items()}}
        training, kept = self.statistics != "eval", self.in_evaluation
        if training and kept is None:
            kept = kept_in_evaluation(self.model)
        taps = tapped(self.model, self.taps) if self.taps else nullcontext({})
        mode = running(self.model, self.branch, training=training, in_evaluation=kept or ())
        with mode, _no_casts_without_gradient(), taps as features:
            if self.copies_images and not copies_input(self.model):  # else it may write into the caller's images
                x = x.clone()
            output = self.model(x) if state is None else called_with(self.model, state, x)
        logits = logits_of(output)
        if logits.dim() != 2:
            raise HoldfastError(
                f"the model returned {tuple(logits.shape)} instead of logits (B, K): return one row of logits an image"
            )
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return Outputs(logits, features)

    def detached(self) -> View:
        """The same view with weights that no gradient reaches: what an attack runs on.

        Under autocast the weights named by `cast_once` are cast here, once for all steps of the attack: autocast keeps
        no copies of weights without gradient and would cast them at every forward, to the same numbers.
        """
        state = {name: parameter.detach() for name, parameter in self.model.named_parameters()}  # tied ones once
        state.update({name: tensor.detach() for name, tensor in (self.state or {}).items()})
        device = next(iter(state.values())).device.type if state else "cpu"
        if self.cast_once and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            state.update({name: tensor.to(dtype) for name, tensor in state.items() if name in self.cast_once})
        return replace(self, state=state)

    def running(self, statistics: Statistics) -> View:
        """The same view under other statistics."""
        return replace(self, statistics=statistics)


Views = Mapping[str, View]
"""Views by side: "clean", "adv", and what a method adds ("guide", "collaborative", "adv_unperturbed")."""


@contextmanager
def _no_casts_without_gradient() -> Iterator[None]:
    """Keep autocast from remembering weights that are cast while no gradient is taken.

    A later forward of the same step would use them, and its weights get no gradient: on a CPU so it is in torch's
    transformer layers.
    """
    remember = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(remember and torch.is_grad_enabled())
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(remember)


@contextmanager
def running(
    model: nn.Module, branch: str, *, training: bool | None = None, in_evaluation: Collection[str] = ()
) -> Iterator[None]:
    """Set branch and mode (None: as it is) for one forward, and put every module back, after an exception too.

    The modules named by `in_evaluation` are in evaluation mode in training, too.
    """
    switched: list[nn.Module] = []
    branched: list[tuple[nn.Module, str]] = []
    named = model.named_modules() if in_evaluation else (("", module) for module in model.modules())
    for name, module in named:
        wanted = training and name not in in_evaluation
        if training is not None and getattr(module, "training", wanted) != wanted:  # frozen TorchScript has none
            switched.append(module)
        if hasattr(module, "active_branch"):
            known: Sequence[str] = getattr(module, "branch_names", (branch,))
            if branch not in known:
                raise HoldfastError(f"the model has no BatchNorm branch {branch!r}: use {' or '.join(known)}")
            branched.append((module, module.active_branch))  # type: ignore[arg-type]  # a str by the protocol above
    if branch != "main" and not branched:
        raise HoldfastError(
            f"the model has no BatchNorm branch {branch!r}: add it with the view transform that needs it"
        )
    try:
        for module in switched:
            module.training = not module.training
        for module, _ in branched:
            module.active_branch = branch  # type: ignore[assignment]  # a plain attribute, not a tensor or a module
        yield
    finally:
        for module in switched:
            module.training = not module.training
        for module, previous in branched:
            module.active_branch = previous  # type: ignore[assignment]  # as above
