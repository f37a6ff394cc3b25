"""The data of a run: what is held out, what is added, and this process's batches."""

from __future__ import annotations

import torch

from holdfast import distributed
from holdfast.data.extra import GIVEN, Extra, read_extra
from holdfast.data.images import Dataset, Images
from holdfast.data.loader import Loader
from holdfast.data.split import stratified_split
from holdfast.errors import HoldfastError
from holdfast.evaluation import fingerprint
from holdfast.recipe import Recipe
from holdfast.settings import Settings


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


def data_digests(training: Images, validation: Images, test: Images, extra: Extra | None) -> dict[str, str]:
    """Return the SHA-256 of the images and labels of each part, on rank 0: only that process compares them.

    Labels that a trained model gave to extra images are left out: another machine may round a near tie otherwise. The
    configuration holds the digest of that model's weights.
    """
    if distributed.rank() != 0:
        return {}
    parts = {"training images": training, "validation images": validation, "test images": test}
    found = {name: fingerprint.of_images(part.pixels, part.labels) for name, part in parts.items()}
    if extra is not None:
        labels = extra.images.labels if extra.labelled_by is None else torch.empty(0, dtype=torch.int64)
        found["extra images"] = fingerprint.of_images(extra.images.pixels, labels)
    return found


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
