"""From what a person asked for to what the loop needs: data split, model, device, precision, resolved configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast import __version__, checks, distributed
from holdfast.attacks.base import AttackWithMemory, require_steepest
from holdfast.compilation import require_backend
from holdfast.configuration import recipe_config
from holdfast.data.augment import default_padding
from holdfast.data.extra import Extra
from holdfast.data.idbh import IDBH
from holdfast.data.images import Dataset, Images
from holdfast.data.loader import Loader, to_pixels
from holdfast.data.sources import load
from holdfast.errors import HoldfastError
from holdfast.forward import Batch
from holdfast.keyed_random import Key
from holdfast.models import trust
from holdfast.models.own_file import OwnCode
from holdfast.recipe import Recipe
from holdfast.run_data import data_digests, extra_part, hold_out, make_loader, refuse_extra_mismatch
from holdfast.run_models import DERIVED, build_model, further_networks, load_initial, own_code
from holdfast.runs.environment import supports_bf16
from holdfast.runs.own_code import with_copies_named
from holdfast.schedule import Progress
from holdfast.settings import Settings as Settings
from holdfast.threat import readable


@dataclass(frozen=True)
class Setup:
    """All that a loop needs, resolved."""

    recipe: Recipe
    settings: Settings
    data: Dataset
    loader: Loader
    validation: Images
    test: Images
    model: nn.Module
    device: torch.device
    precision: str
    seed: int
    config: dict[str, Any]
    description: dict[str, Any]
    notes: tuple[str, ...]
    code: Mapping[str, OwnCode] = field(default_factory=dict)
    """The person's own code that the run needs, by part."""
    data_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the images and labels, by what they are for; empty on all processes but the first."""
    leaves_weights_out: bool = False
    """Under torchrun: some trained weights of the network get no gradient, as those of auxiliary classifiers."""

    @property
    def code_digests(self) -> dict[str, str]:
        """SHA-256 of the person's own code, by part."""
        return {part: own.sha256 for part, own in self.code.items()}

    def summary(self, results: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What summary.json holds. Accuracies are fractions, on the test set."""
        best = results["best"]
        return {
            "recipe": self.recipe.name,
            "data": self.data.name,
            "model": self.description["model"].get("name") or self.description["model"].get("class"),
            "threat": self.recipe.threat.norm,
            "epsilon": self.recipe.threat.epsilon,
            "seed": self.seed,
            "clean_accuracy": best["clean_accuracy"],
            "robust_accuracy": best.get("robust_accuracy"),
            "interval": best.get("interval"),
            "attack": best["attack"],
            "n": best["n"],
            "seconds": seconds,
            "best": best,
            "last": results["last"],
            "version": __version__,
        }


def prepare(
    recipe: Recipe,
    data: str | Dataset,
    model: str | nn.Module | OwnCode,
    *,
    seed: int,
    settings: Settings,
    init: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    started: bool = False,
    code: Mapping[str, OwnCode] | None = None,
) -> Setup:
    """Load, split, build and check everything before the first step.

    `code` is what a configuration names, by part (`holdfast.runs.own_code`); other code is the caller's own.
    A run that has `started` takes its weights from its checkpoint: `init` is then only remembered.

    Raises:
        HoldfastError: bad input; the message says what to do.
    """
    require_steepest(recipe.threat, "PGD")  # validation and the closing evaluation run it
    refuse_extra_mismatch(recipe, settings)
    if isinstance(settings.compile, str):
        require_backend(settings.compile)
    codes = own_code(recipe, model, code or {})
    trusted = [  # before anything that takes long
        f"{part} is made by {own.path}, {trust.in_words(trust.require(own))} (SHA-256 {own.sha256})"
        for part, own in codes.items()
    ]
    dataset = load(data, image_size=settings.image_size) if isinstance(data, str) else data
    device = choose_device(settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(device) else "fp32"
    dtype = torch.float64 if precision == "fp64" else torch.float32
    parts = {name: getattr(recipe, name) for name in ("attack", "objective", "views", "averages")}
    recipe = replace(recipe, **copy.deepcopy(parts))  # the caller's own stay as they are; networks are copied below
    training, validation = hold_out(dataset, settings, seed)
    batch_size = min(recipe.batch_size, len(training))
    flip = dataset.flip if settings.flip is None else settings.flip
    padding = settings.padding
    if padding is None:
        padding = default_padding(*dataset.image_size) if dataset.crop else 0
    settings = replace(settings, flip=flip, padding=padding, precision=precision)  # type: ignore[arg-type]  # a resolved word
    if isinstance(recipe.augmentation, IDBH) and recipe.augmentation.flip is None:
        recipe = replace(recipe, augmentation=replace(recipe.augmentation, flip=flip))
    extra = extra_part(recipe, dataset, settings, device, batch_size, started=started)
    loader = make_loader(recipe, dataset, training.to(device), extra, settings, batch_size, seed, dtype)
    if batch_size < distributed.world_size():
        raise HoldfastError(f"a batch of {batch_size} cannot be split over {distributed.world_size()} processes")
    network, spec, notes = build_model(codes.get("model", model), dataset, training, seed, options or {})
    told_of_weights: list[str] = []
    if init is not None and not started:
        told_of_weights += load_initial(network, init)
    further = further_networks(
        recipe, network, spec, dataset, training, seed, started=started, code=codes, say=told_of_weights.append
    )
    network = network.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    first = torch.arange(min(8, len(training)), device=device)
    sample = to_pixels(loader.images.pixels[first], dtype)
    checks.check_batch(Batch(sample, loader.images.labels), dataset.num_classes)
    output = checks.check_model(network, sample, dataset.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key(seed).fold("objective's initial weights").torch_seed)
        recipe.objective.prepare(network, sample, loader.positions)
        if isinstance(recipe.attack, AttackWithMemory):
            recipe.attack.prepare(network, sample, loader.positions)
    config = run_config(recipe, dataset, spec, settings, seed, init, len(loader), extra)
    for module in further.values():
        module.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return Setup(
        recipe=replace(recipe, networks=further),
        settings=settings,
        data=dataset,
        loader=loader,
        validation=validation.to(device),
        test=dataset.test.to(device),
        model=network,
        device=device,
        precision=precision,
        seed=seed,
        config=config,
        description=description(recipe, dataset, spec),
        notes=(
            *dataset.notes,
            *told(recipe, dataset, settings, device, batch_size, training, validation, extra),
            *recipe_notes(recipe, init),
            *notes,
            *([output] if output else []),
            *told_of_weights,
            *recipe.objective.notes,
            *trusted,
        ),
        code=codes,
        data_digests=data_digests(training, validation, dataset.test, extra),
        leaves_weights_out=distributed.active() and checks.leaves_weights_out(network, sample),
    )


def told(
    recipe: Recipe,
    dataset: Dataset,
    settings: Settings,
    device: torch.device,
    batch_size: int,
    training: Images,
    validation: Images,
    extra: Extra | None,
) -> list[str]:
    """What the person is told before training begins."""
    height, width = dataset.image_size
    how = f"{recipe.epochs} epochs, batch {batch_size}, {settings.precision} on {device}"
    notes = [
        f"{recipe.name} on {dataset.name}: {len(training)} training, {len(validation)} validation, {len(dataset.test)}"
        f" test images of {height}x{width}, {dataset.num_classes} classes; {recipe.threat.norm} at"
        f" {readable(recipe.threat.epsilon)}; {how}"
    ]
    if extra is not None:
        rows = round(recipe.extra_share * batch_size)
        notes += extra.notes
        notes.append(
            f"{rows} images of every {batch_size} (extra_share {recipe.extra_share:g}) come from the"
            f" {len(extra.images)} extra images of {settings.extra_data}"
        )
    if batch_size < recipe.batch_size:
        notes.append(f"batch size lowered from {recipe.batch_size} to {batch_size}: there are no more training images")
    if recipe.objective.couples_batch and distributed.active():
        notes.append("a loss term compares the rows of a batch: each process compares its own share only")
    return notes


def recipe_notes(recipe: Recipe, init: str | Path | None) -> list[str]:
    """What is odd about this use of the recipe, though it is allowed."""
    notes = []
    last = Progress(step=999, epochs=1000, stage=recipe.schedule.stage(0.999))
    if recipe.passes(last) < recipe.passes():
        notes.append(
            "a part of the method waits for the learning rate to drop, which this schedule never does: it stays off;"
            " give another --schedule.knots, or a fixed strength"
        )
    for view in recipe.views:
        sides = {
            side for side in recipe.sides_ever() if side.startswith("adv") or side in recipe.objective.needs_others
        }
        left = sorted(sides - {*view.perturbs, "adv_unperturbed"})
        if view.perturbs and left:
            notes.append(
                f"{type(view).__name__} perturbs {', '.join(view.perturbs)}, while {', '.join(left)} runs at the"
                " weights themselves: --views.worst_weights.sides says which"
            )
    if recipe.fine_tuning and init is None:
        notes.append(f"{recipe.name} fine-tunes a trained network, and this one is new: begin from one with --init RUN")
    return notes


def choose_device(word: str) -> torch.device:
    """The device a word stands for; under torchrun each process takes its own accelerator."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(word)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise HoldfastError(f"device {word!r} is unknown: use auto, cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise HoldfastError(
                "device cuda is not available here: use --training.device cpu; `holdfast doctor` tells more"
            )
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def description(recipe: Recipe, dataset: Dataset, spec: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of a model folder says."""
    height, width = dataset.image_size
    return {
        "format": 1,
        "holdfast": __version__,
        "model": dict(spec),
        "classes": list(dataset.classes),
        "input": {"channels": dataset.channels, "height": height, "width": width, "range": [0, 1], "output": "logits"},
        "threat": {"norm": recipe.threat.norm, "epsilon": recipe.threat.epsilon},
        "recipe": recipe.name,
        "data": dataset.name,
    }


def run_config(
    recipe: Recipe,
    dataset: Dataset,
    spec: Mapping[str, Any],
    settings: Settings,
    seed: int,
    init: str | Path | None,
    steps_per_epoch: int,
    extra: Extra | None,
) -> dict[str, Any]:
    """The resolved configuration: what `holdfast train --config` repeats, and, below `resolved`, what came of it."""
    model = {key: value for key, value in spec.items() if key not in DERIVED}
    total = steps_per_epoch * recipe.epochs
    knots = recipe.schedule.knots
    config = {
        **recipe_config(recipe),
        "data": dataset.source or dataset.name,
        "model": model,
        "seed": seed,
        "init": None if init is None else str(init),
        "training": asdict(settings),
        "resolved": {
            "holdfast": __version__,
            "image_size": list(dataset.image_size),
            "steps_per_epoch": steps_per_epoch,
            "steps": total,
            "warmup_steps": round(recipe.warmup * total),
            "schedule_knots_in_steps": [
                [round(position * total) if recipe.schedule.by == "fraction" else position, value]
                for position, value in knots
            ],
            **({} if extra is None else {"extra": {"images": len(extra.images), "labelled_by": extra.labelled_by}}),
        },
    }
    return with_copies_named(config)
