"""From what a person asked for to what the loop needs: data split, model, device, precision, resolved configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from holdfast import __version__, checks, distributed
from holdfast.attacks.base import AttackWithMemory, require_steepest
from holdfast.configuration import recipe_config
from holdfast.data.augment import default_padding
from holdfast.data.extra import GIVEN, Extra, read_extra
from holdfast.data.images import Dataset, Images
from holdfast.data.loader import Loader, to_pixels
from holdfast.data.sources import load
from holdfast.data.split import stratified_split
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, View
from holdfast.keyed_random import Key
from holdfast.models.factory import accepted, build
from holdfast.recipe import Recipe
from holdfast.runs.environment import supports_bf16
from holdfast.runs.export import load_model, load_weights, model_description, model_folder, read_weights
from holdfast.schedule import Progress
from holdfast.threat import readable

_DERIVED = ("num_classes", "channels", "image_size", "mean", "std")  # of a model's arguments: known from the data

Precision = Literal["auto", "bf16", "fp32", "fp64"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a run that is not the method.

    Args:
        precision: ``"bf16"`` runs the network under autocast; ``"auto"`` takes it where the device computes in it
            natively, else ``"fp32"``.
        compile: Compile the network with `torch.compile`; a word names the backend. The first steps then take
            up to a minute, so it is off by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        flip: Mirror images at random; None for what suits the data.
        padding: Padding of the random crop in pixels; None for an eighth of the image where the data suits it.
        image_size: Side to which folders and Parquet images are resized; None where they already agree.
        extra_data: Source of extra images to train on, of which only a training split is used; every batch then takes
            the recipe's ``extra_share`` from them. Validation and test never see them.
        extra_labels: ``"given"``, or a run or model folder: its model labels the extra images, in place of their own
            labels if they have any.
        drop_last: Leave out the images that do not fill an epoch's last batch.
        second_view: Give every step a second augmentation of its images.
        validate_every: Epochs between validations.
        validation_images: Size of the held-out part of the training set; at most a tenth of it is taken.
        validation_steps: PGD steps of the validation that chooses the best checkpoint.
        test_images: Images of the closing evaluation; None for all.
        test_steps: PGD steps of the closing evaluation.
        evaluation_batch: Images at a time in any evaluation.
        catastrophic_overfitting: What is done when it is found (`holdfast.catastrophic_overfitting`): ``"off"`` looks
            for nothing, ``"warn"`` tells, ``"stop"`` ends the run, ``"rollback"`` goes back to where it still held, at
            most three times; ``"auto"`` warns where the training attack takes one step.
        overfitting_check: Batches between two looks for it.
        checkpoint_minutes: A checkpoint is also written inside an epoch after so many minutes.
        keep_checkpoints: How many checkpoints are left in the run folder.
    """

    precision: Precision = "auto"
    compile: bool | str = False
    device: str = "auto"
    flip: bool | None = None
    padding: int | None = None
    image_size: int | None = None
    extra_data: str | None = None
    extra_labels: str = GIVEN
    drop_last: bool = True
    second_view: bool = False
    validate_every: int = 1
    validation_images: int = 1000
    validation_steps: int = 10
    test_images: int | None = 2000
    test_steps: int = 20
    evaluation_batch: int = 250
    catastrophic_overfitting: Literal["auto", "off", "warn", "stop", "rollback"] = "auto"
    overfitting_check: int = 100
    checkpoint_minutes: float = 15.0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("extra_data", "extra_labels"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))  # config.yaml holds text
        counts = ("validate_every", "validation_images", "test_images", "test_steps", "evaluation_batch")
        counts += ("keep_checkpoints", "overfitting_check")
        for name, least in (*((name, 1) for name in counts), ("validation_steps", 0), ("padding", 0)):
            value = getattr(self, name)
            if value is None and name in ("test_images", "padding"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HoldfastError(f"{name} is {value!r}: give a whole number of at least {least}")
        if isinstance(self.checkpoint_minutes, bool) or not isinstance(self.checkpoint_minutes, int | float):
            raise HoldfastError(f"checkpoint_minutes is {self.checkpoint_minutes!r}: give a number")
        if self.precision not in ("auto", "bf16", "fp32", "fp64"):
            raise HoldfastError(f"precision {self.precision!r} is unknown: use auto, bf16, fp32 or fp64")


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
    model: str | nn.Module,
    *,
    seed: int,
    settings: Settings,
    init: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    started: bool = False,
) -> Setup:
    """Load, split, build and check everything before the first step.

    A run that has `started` takes its weights from its checkpoint: `init` is then only remembered.

    Raises:
        HoldfastError: bad input; the message says what to do.
    """
    require_steepest(recipe.threat, "PGD")  # validation and the closing evaluation run it
    refuse_extra_mismatch(recipe, settings)
    dataset = load(data, image_size=settings.image_size) if isinstance(data, str) else data
    device = choose_device(settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(device) else "fp32"
    dtype = torch.float64 if precision == "fp64" else torch.float32
    parts = {name: getattr(recipe, name) for name in ("attack", "objective", "views", "averages", "networks")}
    recipe = replace(recipe, **copy.deepcopy(parts))  # the caller's own stay as they are
    training, validation = hold_out(dataset, settings, seed)
    batch_size = min(recipe.batch_size, len(training))
    flip = dataset.flip if settings.flip is None else settings.flip
    padding = settings.padding
    if padding is None:
        padding = default_padding(*dataset.image_size) if dataset.crop else 0
    settings = replace(settings, flip=flip, padding=padding, precision=precision)  # type: ignore[arg-type]  # a resolved word
    extra = extra_part(recipe, dataset, settings, device, batch_size, started=started)
    loader = make_loader(recipe, dataset, training.to(device), extra, settings, batch_size, seed, dtype)
    if batch_size < distributed.world_size():
        raise HoldfastError(f"a batch of {batch_size} cannot be split over {distributed.world_size()} processes")
    network, spec = build_model(model, dataset, training, seed, options or {})
    if init is not None and not started:
        load_initial(network, init)
    further = further_networks(recipe, network, spec, dataset, training, seed, started=started)
    network = network.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    first = torch.arange(min(8, len(training)), device=device)
    sample = to_pixels(loader.images.pixels[first], dtype)
    checks.check_batch(Batch(sample, loader.images.labels), dataset.num_classes)
    checks.check_model(network, sample, dataset.num_classes)
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
        ),
    )


def hold_out(dataset: Dataset, settings: Settings, seed: int) -> tuple[Images, Images]:
    """What is trained on, and the part that chooses the best checkpoint."""
    count = min(settings.validation_images, len(dataset.train) // 10)
    if count < 1:
        raise HoldfastError(
            f"{len(dataset.train)} training images are too few to hold out a validation part: give ten or more"
        )
    kept, held = stratified_split(dataset.train.labels, count, seed)
    return dataset.train.subset(kept), dataset.train.subset(held)


def refuse_extra_mismatch(recipe: Recipe, settings: Settings) -> None:
    """A share of every batch and the images to take it from: both or neither."""
    if recipe.extra_share > 0 and settings.extra_data is None:
        raise HoldfastError(
            f"{recipe.name} takes {recipe.extra_share:g} of every batch from extra images: give some,"
            " --training.extra_data PATH, or do without, --extra-share 0"
        )
    if settings.extra_data is not None and recipe.extra_share == 0:
        raise HoldfastError(
            f"{recipe.name} takes no share of a batch from extra images: give one, --extra-share 0.5, or leave"
            " --training.extra_data out"
        )
    if settings.extra_data is None and settings.extra_labels != GIVEN:
        raise HoldfastError("there are no extra images to label: give --training.extra_data PATH")


def extra_part(
    recipe: Recipe, dataset: Dataset, settings: Settings, device: torch.device, batch_size: int, *, started: bool
) -> Extra | None:
    """The extra images with their labels, if the run has any."""
    if settings.extra_data is None:
        return None
    rows = round(recipe.extra_share * batch_size)
    if not 0 < rows < batch_size:
        raise HoldfastError(
            f"extra_share {recipe.extra_share:g} of a batch of {batch_size} is {rows} images, and the batch needs both"
            " kinds: change --extra-share or --batch-size"
        )
    try:
        return read_extra(
            settings.extra_data,
            settings.extra_labels,
            dataset,
            device=device,
            image_size=settings.image_size,
            batch_size=settings.evaluation_batch,
        )
    except HoldfastError as error:
        if started:
            raise HoldfastError(f"the run needs its extra images, labelled as before, to go on: {error}") from error
        raise


def make_loader(
    recipe: Recipe,
    dataset: Dataset,
    training: Images,
    extra: Extra | None,
    settings: Settings,
    batch_size: int,
    seed: int,
    dtype: torch.dtype,
) -> Loader:
    """This process's batches."""
    assert settings.flip is not None  # both are resolved by now
    assert settings.padding is not None
    return Loader(
        images=training,
        num_classes=dataset.num_classes,
        batch_size=batch_size,
        seed=seed,
        flip=settings.flip,
        padding=settings.padding,
        label_smoothing=recipe.label_smoothing,
        augmentation=recipe.augmentation,
        mixing=recipe.mixing,
        second_view=settings.second_view or any(side.endswith("2") for side in recipe.sides_ever()),
        extra=None if extra is None else extra.images,
        extra_share=recipe.extra_share,
        drop_last=settings.drop_last,
        dtype=dtype,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )


def further_networks(
    recipe: Recipe,
    classifier: nn.Module,
    spec: Mapping[str, Any],
    dataset: Dataset,
    training: Images,
    seed: int,
    *,
    started: bool,
) -> dict[str, nn.Module]:
    """The method's further networks, built and loaded; those that are not trained stand still.

    Raises:
        HoldfastError: a network has no weights though it is not trained, or its description is wrong.
    """
    built: dict[str, nn.Module] = {}
    for name, wanted in recipe.networks.items():
        if isinstance(wanted, nn.Module):
            built[name] = copy.deepcopy(wanted)
            continue
        folder = None if wanted.init is None or wanted.init.endswith(".safetensors") else Path(wanted.init)
        if not wanted.trained and wanted.init is None:
            raise HoldfastError(
                f"{recipe.name} learns from the trained network {name!r}: say where it lies, --networks.{name}.init RUN"
            )
        if folder is not None and not wanted.model:
            module = load_model(folder)
        else:
            options = {key: spec[key] for key in spec if key not in _DERIVED} if not wanted.model else {}
            kind = wanted.model or str(spec.get("name") or "")
            if not kind:
                raise HoldfastError(f"the network {name!r} has no name: give --networks.{name}.model NAME")
            options.pop("name", None)
            module, _ = build_model(kind, dataset, training, Key(seed).fold(name).torch_seed, options)
            if wanted.init is not None and not started:
                load_initial(module, wanted.init)
        built[name] = module.requires_grad_(wanted.trained)
        same_classes(name, built[name], classifier, training)
    return built


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


def load_initial(network: nn.Module, init: str | Path) -> None:
    """Begin from the weights of a run, a model folder or a file."""
    source = Path(init) if str(init).endswith(".safetensors") else model_folder(Path(init)) / "model.safetensors"
    load_weights(network, read_weights(source), source)


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
    if recipe.fine_tuning and init is None:
        notes.append(f"{recipe.name} fine-tunes a trained network, and this one is new: begin from one with --init RUN")
    return notes


def choose_device(word: str) -> torch.device:
    """The device a word stands for; under torchrun each process takes its own accelerator."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(word)
    except RuntimeError:
        raise HoldfastError(f"device {word!r} is unknown: use auto, cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise HoldfastError(
                "device cuda is not available here: use --training.device cpu; `holdfast doctor` tells more"
            )
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def build_model(
    model: str | nn.Module, dataset: Dataset, training: Images, seed: int, options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its initial weights, and what is needed to rebuild it."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model), model_description(None, model)
    pixels = training.pixels.flatten(0, 2).double() / 255
    statistics = {
        "mean": [round(value, 4) for value in pixels.mean(0).tolist()],
        "std": [round(max(value, 1e-3), 4) for value in pixels.std(0).tolist()],
    }
    spec = {
        "name": model,
        "num_classes": dataset.num_classes,
        "channels": dataset.channels,
        "image_size": list(dataset.image_size),
        **accepted(model, statistics),
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key(seed).fold("initial weights").torch_seed)
        network = build(str(spec["name"]), **{key: value for key, value in spec.items() if key != "name"})
    return network, spec


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
    model = {key: value for key, value in spec.items() if key not in _DERIVED}
    total = steps_per_epoch * recipe.epochs
    knots = recipe.schedule.knots
    return {
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
