"""Networks by name, or from a function in the user's own file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.adapted import unwrap_in_place, without_inference_tensors
from holdfast.models.classifier import require_at_least
from holdfast.models.own_file import OwnCode, names_code
from holdfast.models.preact_resnet import PreActResNet18
from holdfast.models.resnet import ResNet18
from holdfast.models.size import require_memory, shapes_of
from holdfast.models.small_cnn import SmallCNN
from holdfast.models.table import MODELS
from holdfast.models.vit import SmallViT
from holdfast.models.wide_resnet import WideResNet
from holdfast.setting_types import check_settings, shown

MOST_CHANNELS = 4096

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "resnet18": ResNet18,
    "preact_resnet18": PreActResNet18,
    "wrn_28_10": partial(WideResNet, 28, 10),
    "wrn_32_10": partial(WideResNet, 32, 10),
    "wrn_34_10": partial(WideResNet, 34, 10),
    "small_vit": SmallViT,
}


def build(
    name: str | OwnCode,
    *,
    num_classes: int,
    channels: int = 3,
    image_size: tuple[int, int] = (32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network by its name, with fresh weights drawn from torch's global random number generator.

    Seed that generator first: nothing else decides the weights. A name of the form `path/to/file.py:function` runs
    that file, which is your own code, and calls the function with those of num_classes, channels, image_size, the
    given ones of mean and std, and the options that its signature has.

    Args:
        name: A key of `holdfast.models.table.MODELS`, in any case, with - or _; or `path/to/file.py:function`, which
            is executed because you name it; or code that a configuration names, which is executed where it is trusted.
        num_classes: K, at least 2.
        channels: C.
        image_size: (H, W).
        mean: Per channel; None for 0.
        std: Per channel; None for 1.
        options: What else this network takes, such as width, dropout or patch.
    Shapes:
        The network maps x (B, C, H, W) to logits (B, K) before softmax.
    Units:
        x, mean and std in pixel scale [0, 1].
    Raises:
        HoldfastError: the name, an option, the file or its function is unknown, the function does not return a
            network, or a size is refused. What the user's own code raises comes through as it is.
    Example:
        >>> import torch
        >>> model = build("Small-CNN", num_classes=10, channels=1, image_size=(8, 8), width=8)
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    given, extra = _checked(num_classes, channels, image_size, mean, std, options)
    if isinstance(name, OwnCode):
        return _build_from_file(name, given, extra)
    if names_code(name):
        return _build_from_file(OwnCode.named(name), given, extra)
    key, make = _named(name, given, extra)
    require_memory(shapes_of(make, key), key)
    return make()


def shapes(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    image_size: tuple[int, int] = (32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, torch.Size]:
    """Return the shapes of a named network's parameters and buffers; nothing is allocated, however large it is.

    Args:
        name: A key of `holdfast.models.table.MODELS`.
        num_classes: As `build`.
        channels: As `build`.
        image_size: As `build`.
        mean: As `build`.
        std: As `build`.
        options: As `build`.
    Raises:
        HoldfastError: the name or an option is unknown, or a size is refused.
    Example:
        >>> shapes("resnet18", num_classes=10**6)["fc.weight"]
        torch.Size([1000000, 512])
    """
    given, extra = _checked(num_classes, channels, image_size, mean, std, options)
    key, make = _named(name, given, extra)
    return shapes_of(make, key)


def _checked(
    num_classes: int,
    channels: int,
    image_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what every network is given, and what only some take."""
    require_at_least(2, num_classes=num_classes)
    require_at_least(1, channels=channels)
    if channels > MOST_CHANNELS:
        raise HoldfastError(f"channels must be at most {MOST_CHANNELS}, got {channels}: images have 1 or 3")
    height, width = _two_sides(image_size)
    given: dict[str, Any] = {"num_classes": num_classes, "channels": channels, "image_size": (height, width)}
    statistics = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    return given, {**statistics, **options}


def _named(name: str, given: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[str, Callable[[], nn.Module]]:
    """Return a network's key in the table, and what builds it."""
    key = name.strip().lower().replace("-", "_")
    if key not in _BUILDERS:
        nearest = difflib.get_close_matches(key, MODELS, n=3) or list(MODELS)
        raise HoldfastError(
            f"no network is named {shown(name)}: use {' or '.join(nearest)}, or your own as path/to/file.py:function"
        )
    arguments = _arguments(_BUILDERS[key], key, given, extra)
    check_settings(key, _BUILDERS[key], {option: arguments[option] for option in extra})
    return key, partial(_BUILDERS[key], **arguments)


def accepted(name: str | OwnCode, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a network takes. A function of the user's own may do without what is only offered.

    Args:
        name: As `build` takes it.
        options: Such as mean and std.
    Raises:
        HoldfastError: the file or its function is unknown.
    """
    if not (isinstance(name, OwnCode) or names_code(name)):
        return dict(options)
    with (name if isinstance(name, OwnCode) else OwnCode.named(name)).running() as function:
        parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {key: value for key, value in options.items() if open_ended or key in parameters}


def _two_sides(image_size: Sequence[int]) -> tuple[int, int]:
    sides = tuple(image_size)
    if len(sides) != 2:
        raise HoldfastError(f"image_size must be (height, width), got {image_size!r}")
    require_at_least(1, height=sides[0], width=sides[1])
    return sides[0], sides[1]


def _arguments(
    builder: Callable[..., nn.Module],
    label: str,
    given: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return those of `given` that the builder takes, and all of `extra`, of which nothing may be left over."""
    parameters = inspect.signature(builder).parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    allowed = by_name - {*given, "mean", "std"}
    for option in extra:
        if option not in by_name and not open_ended:
            takes = f"its options are {', '.join(sorted(allowed))}" if allowed else "it has no options"
            raise HoldfastError(f"{label} does not take {option!r}: {takes}")
    arguments = {key: value for key, value in given.items() if key in by_name or open_ended}
    arguments.update(extra)
    return arguments


def _build_from_file(code: OwnCode, given: Mapping[str, Any], extra: Mapping[str, Any]) -> nn.Module:
    name = f"{code.path}:{code.function}"
    with code.running() as function:
        arguments = _arguments(function, name, given, extra)
        parameters = inspect.signature(function).parameters.values()
        optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
        missing = [parameter for parameter in needed if parameter not in arguments]
        if missing:
            raise HoldfastError(f"{name} needs {', '.join(missing)}: pass them as options or give them defaults")
        try:
            model = function(**arguments)
        except TypeError as error:
            told = ", ".join(f"{key}={value!r}" for key, value in extra.items()) or "no options"
            raise HoldfastError(f"{name} cannot be called with {told} ({error}): give options that it takes") from error
    if not isinstance(model, nn.Module):
        raise HoldfastError(f"{name} returned {type(model).__name__}: it must return a torch.nn.Module")
    return without_inference_tensors(unwrap_in_place(model))
