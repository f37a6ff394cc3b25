"""The networks of a run: the classifier with its initial weights, and what a method trains or learns from beside it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from holdfast.data.images import Dataset, Images
from holdfast.data.loader import to_pixels
from holdfast.errors import HoldfastError
from holdfast.forward import View
from holdfast.keyed_random import Key
from holdfast.models.adapted import (
    for_training,
    initialise,
    own_copy,
    require_initialised,
    require_trainable,
    unwrapped,
    wrapper_notes,
)
from holdfast.models.extra_state import require_savable
from holdfast.models.factory import accepted, build
from holdfast.models.modes import in_training_form
from holdfast.models.own_file import OwnCode, names_code
from holdfast.recipe import Recipe
from holdfast.runs.export import load_model, model_description, model_folder
from holdfast.runs.foreign_weights import load_foreign, names_weights

DERIVED = ("num_classes", "channels", "image_size", "mean", "std")  # of a model's arguments: known from the data


def own_code(recipe: Recipe, model: str | nn.Module | OwnCode, configured: Mapping[str, OwnCode]) -> dict[str, OwnCode]:
    """Return the user's own code that a run needs, by part: "model", or "networks/" and the network's name.

    Args:
        recipe: Whose further networks may be made by own files.
        model: The classifier, as `fit` takes it.
        configured: Code that a configuration names. All other code was named by the person who calls.

    Raises:
        HoldfastError: a file is missing, or does not define its function.
    """
    found = dict(configured)
    named: dict[str, Any] = {"model": model}
    named |= {f"networks/{name}": getattr(network, "model", None) for name, network in recipe.networks.items()}
    for part, name in named.items():
        if isinstance(name, OwnCode):
            found[part] = name
        elif part not in found and names_code(name):
            found[part] = OwnCode.named(name)
    return found


class Built(NamedTuple):
    """A network with its initial weights, what is needed to rebuild it, and what the person should be told of it."""

    network: nn.Module
    spec: dict[str, Any]
    notes: tuple[str, ...] = ()


def build_model(
    model: str | nn.Module | OwnCode, dataset: Dataset, training: Images, seed: int, options: Mapping[str, Any]
) -> Built:
    """Return the network to train; one from Python is copied.

    Raises:
        HoldfastError: it cannot be built, copied, trained or saved.
    """
    if isinstance(model, nn.Module):
        require_trainable(model)
        network, spec, notes = own_copy(model), model_description(None, unwrapped(model)), wrapper_notes(model)
    else:
        network, spec = _named_model(model, dataset, training, seed, options)
        require_trainable(network)
        if isinstance(model, OwnCode) or names_code(model):
            network = own_copy(network)  # a run takes further copies of it
        notes = ()
    weights = Key(seed).fold("lazy layers' initial weights").torch_seed
    notes += initialise(network, to_pixels(training.pixels[:2].cpu()), weights)
    require_savable(network)
    return Built(in_training_form(for_training(network)), spec, notes)


def _named_model(
    model: str | OwnCode, dataset: Dataset, training: Images, seed: int, options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """A network by its name or from the user's own file, with its initial weights, and its options."""
    pixels = training.pixels.flatten(0, 2).double() / 255
    statistics = {
        "mean": [round(value, 4) for value in pixels.mean(0).tolist()],
        "std": [round(max(value, 1e-3), 4) for value in pixels.std(0).tolist()],
    }
    spec = {
        "name": model.spec if isinstance(model, OwnCode) else model,
        "num_classes": dataset.num_classes,
        "channels": dataset.channels,
        "image_size": list(dataset.image_size),
        **accepted(model, statistics),
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key(seed).fold("initial weights").torch_seed)
        network = build(model, **{key: value for key, value in spec.items() if key != "name"})
    return network, spec


def load_initial(network: nn.Module, init: str | Path) -> tuple[str, ...]:
    """Begin from the weights of a run, a model folder or a file, and return what should be told."""
    source = init if names_weights(init) or os.path.isdir(init) else model_folder(Path(init))  # refused: nothing there
    return load_foreign(network, source)


def further_networks(
    recipe: Recipe,
    classifier: nn.Module,
    spec: Mapping[str, Any],
    dataset: Dataset,
    training: Images,
    seed: int,
    *,
    started: bool,
    code: Mapping[str, OwnCode],
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, nn.Module]:
    """The method's further networks, built and loaded; those that are not trained stand still.

    Args:
        recipe: Which networks.
        classifier: The network that is trained.
        spec: What rebuilds it: a network without a model of its own is of the same kind.
        dataset: Its classes and image size.
        training: Its training images.
        seed: Of the initial weights.
        started: Whether the run takes its weights from a checkpoint.
        code: The user's own code by part; see `own_code`.
        say: Gets what the person should be told about the weights.

    Raises:
        HoldfastError: a network has no weights though it is not trained, or its description is wrong.
    """
    built: dict[str, nn.Module] = {}
    for name, wanted in recipe.networks.items():
        if isinstance(wanted, nn.Module):
            built[name] = further_copy(wanted)
            continue
        folder = None if wanted.init is None or names_weights(wanted.init) else Path(wanted.init)
        if not wanted.trained and wanted.init is None:
            raise HoldfastError(
                f"{recipe.name} learns from the trained network {name!r}: say where it lies, --networks.{name}.init RUN"
            )
        if folder is not None and not wanted.model:
            module = load_model(folder)
        else:
            options = {key: spec[key] for key in spec if key not in DERIVED} if not wanted.model else {}
            named = code.get(f"networks/{name}") or wanted.model
            kind = named or code.get("model") or str(spec.get("name") or "")
            options.pop("name", None)
            if kind:
                module = build_model(kind, dataset, training, Key(seed).fold(name).torch_seed, options).network
            else:  # a classifier given from Python
                module = anew(classifier, Key(seed).fold(name).torch_seed)
            if wanted.init is not None and not started:
                for note in load_initial(module, wanted.init):
                    say(note)
        built[name] = module.requires_grad_(wanted.trained)
        same_classes(name, built[name], classifier, training)
    return built


def further_copy(network: nn.Module) -> nn.Module:
    """A copy of a further network given from Python. One that is TorchScript can only stand still.

    Raises:
        HoldfastError: it cannot be copied, trained where it wants to be, or saved with the run's state.
    """
    if any(parameter.requires_grad for parameter in network.parameters()):
        require_trainable(network)
    require_initialised(network)
    copied = own_copy(network)
    require_savable(copied)
    return copied


def anew(network: nn.Module, seed: int) -> nn.Module:
    """A copy whose layers have drawn new weights, where they know how to."""
    copied = copy.deepcopy(network).train()  # what was frozen there has nothing to keep here
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in copied.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return copied


def same_classes(name: str, network: nn.Module, classifier: nn.Module, training: Images) -> None:
    """Refuse a further network that cannot look at the images or gives other logits than the classifier's kind."""
    sample = to_pixels(training.pixels[:2].cpu())
    try:
        with torch.no_grad():
            found = View(network)(sample).logits.shape
            expected = View(copy.deepcopy(classifier).float().cpu())(sample).logits.shape
    except RuntimeError as error:
        raise HoldfastError(f"the network {name!r} cannot look at these images: {str(error).splitlines()[0]}") from None
    if found != expected:
        raise HoldfastError(
            f"the network {name!r} tells {found[1]} classes apart and the classifier {expected[1]}: give one trained on"
            " the same classes"
        )
