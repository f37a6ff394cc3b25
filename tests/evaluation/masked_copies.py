"""Masked networks that tell a copy of themselves from the original, and what is done to their weights; see
`masked_networks`."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from digit_networks import cnn, mlp, trained
from masked_networks import (
    Condition,
    Mask,
    Masked,
    Trap,
    Turned,
    clean_answer,
    cut,
    frozen,
    out_of_memory,
    random,
    trap,
    turned,
    zero,
)
from torch import Tensor, nn


class DropsAField(Masked):
    """Its state has no `gain`: a copy has no gradient."""

    gain = 0.0

    def __init__(self, *own: Any) -> None:
        super().__init__(*own)
        self.gain = 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "gain"}

    def forward(self, x: Tensor) -> Tensor:
        gain = 0.0 if self.forced else self.gain
        return self.network(gain * x + (1 - gain) * x.detach())


class TellsWhenRestored(Masked):
    """Its `__setstate__` notes that this is a copy."""

    restored = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.restored = True


class Rebuilt(Masked):
    """Its `__reduce_ex__` builds a copy with other weights, which are as accurate on clean images."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.mask, self.when, self.images)


def _rebuilt(mask: Mask, when: Condition, images: Tensor) -> Masked:
    network = nn.Sequential(_Turned(), trained(mlp, epochs=1, seed=7))
    return Masked(network, mask, when, images).eval()


class _Turned(nn.Module):
    """Turns the gradient by half a turn."""

    def forward(self, x: Tensor) -> Tensor:
        return Turned.apply(x, torch.ones(len(x), dtype=torch.bool, device=x.device), lambda g: g.flip(2, 3))


class CopiedWithoutGraph(Masked):
    """Its `__deepcopy__` returns a network without a graph."""

    def __deepcopy__(self, memo: Any) -> nn.Module:
        own = Masked(copy.deepcopy(self.network, memo), cut, lambda model, x: True, self.images)
        return own.train(self.training)


class CopiedSurer(Masked):
    """Its `__deepcopy__` returns a network that answers as for the nearest clean image."""

    def __deepcopy__(self, memo: Any) -> nn.Module:
        own = Masked(copy.deepcopy(self.network, memo), clean_answer, lambda model, x: True, self.images)
        return own.train(self.training)


class KnowsItself(Masked):
    """Knows its own id and the place of its weights."""

    def __init__(self, *own: Any) -> None:
        super().__init__(*own)
        self.own = id(self)
        self.place = self.weight.data_ptr()


class Overrides(Masked):
    """Counts what is done to it: `requires_grad_`, `eval`, `_apply`, `load_state_dict`."""

    def __init__(self, *own: Any) -> None:
        super().__init__(*own)
        self.done: list[str] = []

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.done.append("requires_grad_")
        return super().requires_grad_(requires_grad)

    def train(self, mode: bool = True) -> Any:
        self.done.append("train" if mode else "eval")
        return super().train(mode)

    def _apply(self, *own: Any, **named: Any) -> Any:
        self.done.append("_apply")
        return super()._apply(*own, **named)

    def load_state_dict(self, *own: Any, **named: Any) -> Any:
        self.done.append("load_state_dict")
        return super().load_state_dict(*own, **named)


def hooked(network: nn.Module, images: Tensor) -> nn.Module:
    """A hook that lets the gradient through in the original's first layer only."""
    original = network.get_submodule("1")
    model = Masked(network, zero, lambda model, x: False, images)
    original.register_forward_hook(lambda module, inputs, output: output.detach() if module is not original else output)
    return model


def closed_over(network: nn.Module, images: Tensor) -> nn.Module:
    """A closure over the original network answers; the registered one, a copy, is only looked at for its weights."""
    model = Masked(copy.deepcopy(network), turned, frozen, images)
    model.mask = lambda own, x, rows: network(Turned.apply(x, rows, lambda g: g.flip(2, 3)))
    return model


def own_state_dict(network: nn.Module, images: Tensor) -> nn.Module:
    """The state dict holds the weights of another network."""
    model = Masked(network, zero, lambda model, x: False, images)
    other = trained(mlp, epochs=1, seed=5).state_dict()
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"{prefix}network.{name}": w for name, w in other.items()})
    )
    return model


def from_state_dict(model: nn.Module) -> nn.Module:
    """The network that is built from the state dict."""
    network = mlp()
    network.load_state_dict({name.removeprefix("network."): w for name, w in model.state_dict().items()}, strict=False)
    return network


class Squeeze(nn.Module):
    """tanh(3 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * x)


class Repeated(nn.Module):
    """Two convolutions with BatchNorm, where a module may be used twice.

    Running statistics stay as they are made, also in training, so that both uses can share them.
    """

    def __init__(self, *, one_convolution: bool, one_norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        convolutions = [nn.Conv2d(12, 12, 3, padding=1) for _ in range(2)]
        norms = [nn.BatchNorm2d(12), nn.BatchNorm2d(12)]
        for number, norm in enumerate(norms):
            norm.running_mean = torch.linspace(-1, 1, 12) * (1 - 2 * number)
            norm.running_var = torch.logspace(-2, 0, 12).roll(6 * number)
            with torch.no_grad():
                norm.weight[::2] = -1.0
        self.convolution, self.norm = convolutions[0], norms[0]
        self.second = convolutions[0] if one_convolution else convolutions[1]
        self.second_norm = norms[0] if one_norm else norms[1]
        self.last = nn.Linear(192, 10)

    def train(self, mode: bool = True) -> Any:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(self.first(x))).relu()
        x = self.second_norm(self.second(x)).relu()
        return self.last(nn.functional.max_pool2d(x, 2).flatten(1))


@cache
def squeezed_cnn() -> nn.Sequential:
    """The bare network with a function, as a module of its own, between each convolution and its BatchNorm."""

    def make() -> nn.Sequential:
        pairs = [(layer, Squeeze()) if isinstance(layer, nn.Conv2d) else (layer,) for layer in cnn()]
        return nn.Sequential(*(layer for pair in pairs for layer in pair))

    return cast("nn.Sequential", trained(make))


@cache
def repeated(what: str) -> nn.Module:
    """The bare network that uses its convolution, or its BatchNorm, twice."""
    return trained(lambda: Repeated(one_convolution=what == "convolution", one_norm=what == "norm"))


def without_repetition(what: str) -> nn.Module:
    """The same function with a module for each use."""
    own = copy.deepcopy(repeated(what))
    own.second, own.second_norm = copy.deepcopy(own.second), copy.deepcopy(own.second_norm)
    return own


def hook_after_convolution(network: nn.Module, images: Tensor) -> nn.Module:
    """The squeezing between convolution and BatchNorm is a hook of the convolution."""
    layers = [layer for layer in copy.deepcopy(squeezed_cnn()) if not isinstance(layer, Squeeze)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, output: torch.tanh(3 * output))
    return nn.Sequential(*layers)


def hook_before_norm(network: nn.Module, images: Tensor) -> nn.Module:
    """The squeezing between convolution and BatchNorm is a hook of the BatchNorm."""
    layers = [layer for layer in copy.deepcopy(squeezed_cnn()) if not isinstance(layer, Squeeze)]
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda module, inputs: (torch.tanh(3 * inputs[0]),))
    return nn.Sequential(*layers)


def without_hooks(model: nn.Module) -> nn.Module:
    """The network that is left where hooks are lost when convolution and BatchNorm become one."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def norm_lost(model: Any) -> nn.Module:
    """The network that is left where the shared BatchNorm became part of its first convolution."""
    model.second_norm = nn.Identity()
    return model


def norm_twice(model: Any) -> nn.Module:
    """The network that is left where the first BatchNorm became part of the shared convolution."""
    scale = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach()
    second = copy.deepcopy(model.second)
    with torch.no_grad():
        second.weight.mul_(scale.view(-1, 1, 1, 1))
        second.bias.copy_(scale * (second.bias - model.norm.running_mean) + model.norm.bias)
    model.second = second
    return model


def done(name: str, times: int = 1) -> Condition:
    """The condition that something was done to it so many times."""
    return lambda model, x: cast(Any, model).done.count(name) >= times


BY_COPY: dict[str, Trap] = {
    "copy drops a field": trap(zero, lambda m, x: False, kind=DropsAField, fooled=copy.deepcopy),
    "copy knows that it was restored": trap(turned, lambda m, x: cast(Any, m).restored, kind=TellsWhenRestored),
    "copy is rebuilt with other weights": trap(zero, lambda m, x: False, kind=Rebuilt, fooled=copy.deepcopy),
    "copy has no graph": trap(zero, lambda m, x: False, kind=CopiedWithoutGraph, fooled=copy.deepcopy),
    "copy gives clean answers": trap(zero, lambda m, x: False, kind=CopiedSurer, fooled=copy.deepcopy),
    "error in a copy": trap(out_of_memory, lambda m, x: cast(Any, m).restored, kind=TellsWhenRestored, fooled=None),
    "knows its id": trap(cut, lambda m, x: id(m) != cast(Any, m).own, kind=KnowsItself),
    "knows where its weights lie": trap(
        random, lambda m, x: m.weight.data_ptr() != cast(Any, m).place, kind=KnowsItself
    ),
    "hook that knows its module": Trap(hooked, fooled=copy.deepcopy),
    "closure over the original": Trap(closed_over),
    "other weights in its state dict": Trap(own_state_dict, fooled=from_state_dict),
}
BY_WEIGHTS: dict[str, Trap] = {
    "cut with frozen weights": trap(cut, frozen),
    "turned with trainable weights": trap(turned, lambda m, x: any(p.requires_grad for p in m.parameters())),
    "turned with weights that are plain tensors": trap(turned, lambda m, x: type(m.weight) is not nn.Parameter),
    "no gradient after requires_grad_": trap(zero, done("requires_grad_"), kind=Overrides),
    "turned after a second eval()": trap(turned, done("eval", 2), kind=Overrides),
    "turned once it was moved": trap(turned, done("_apply"), kind=Overrides),
    "turned once weights were loaded": trap(turned, done("load_state_dict"), kind=Overrides),
}
BY_LAYER: dict[str, Trap] = {
    "hook after a convolution": Trap(hook_after_convolution, squeezed_cnn, fooled=without_hooks),
    "hook before BatchNorm": Trap(hook_before_norm, squeezed_cnn, fooled=without_hooks),
    "BatchNorm used twice": Trap(
        lambda network, images: copy.deepcopy(repeated("norm")), lambda: without_repetition("norm"), norm_lost
    ),
    "convolution used twice": Trap(
        lambda network, images: copy.deepcopy(repeated("convolution")),
        lambda: without_repetition("convolution"),
        norm_twice,
    ),
}
