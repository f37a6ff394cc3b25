"""Pre-flight: what can be seen to be wrong before hours are spent on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.forward import Batch, View
from holdfast.models.outputs import noticed


def check_batch(batch: Batch, num_classes: int | None = None) -> None:
    """Refuse an empty batch, pixels outside [0, 1] and labels outside [0, K); without K only negative labels.

    Raises:
        HoldfastError: says which, and what to do.
    """
    if len(batch.y) == 0:
        raise HoldfastError("the batch is empty: give at least one image")
    low, high = float(batch.x.min()), float(batch.x.max())
    if not (low >= 0 and high <= 1):
        advice = (
            "divide by 255" if high > 1 and low >= 0 else "scale them to [0, 1]; normalisation belongs inside the model"
        )
        raise HoldfastError(f"pixels lie in [{low:g}, {high:g}] instead of [0, 1]: {advice}")
    low_label, high_label = int(batch.y.min()), int(batch.y.max())
    if num_classes is None:
        num_classes = high_label + 1
    if low_label < 0 or high_label >= num_classes:
        raise HoldfastError(
            f"labels lie in [{low_label}, {high_label}] but there are {num_classes} classes: count classes from 0 to"
            f" {num_classes - 1}, or give the model more outputs"
        )


@torch.no_grad()
def check_model(model: nn.Module, x: Tensor, num_classes: int) -> str | None:
    """Refuse a model that does not return one row of K finite logits an image.

    Returns which part of its output is taken as the logits, as a sentence; None where it returns just logits.

    Args:
        model: Pixels in [0, 1] to logits.
        x: A few images, at least two.
        num_classes: K.

    Raises:
        HoldfastError: the outputs are probabilities, not finite, or of another shape.
    """
    try:
        with noticed(model) as notes:
            logits = View(model)(x).logits
    except HoldfastError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise HoldfastError(
            f"the model cannot run on images of shape {tuple(x.shape[1:])}: {reason}; check channels and image size"
        ) from error
    if logits.shape != (len(x), num_classes):
        raise HoldfastError(
            f"the model returned shape {tuple(logits.shape)} for {len(x)} images and {num_classes} classes: it must be"
            f" ({len(x)}, {num_classes})"
        )
    if not bool(torch.isfinite(logits).all()):
        raise HoldfastError("the model's logits are NaN or infinite on the first images: check its weights")
    rows = logits.double().sum(1)
    if bool((logits >= 0).all()) and bool((rows - 1).abs().max() < 1e-3):
        raise HoldfastError("the model returns probabilities (rows sum to 1): return logits, drop the final softmax")
    return notes[0] if notes else None


@torch.no_grad()
def leaves_weights_out(model: nn.Module, x: Tensor) -> bool:
    """Return True where a network in training mode has trained weights that its logits do not depend on.

    Auxiliary classifiers have such weights, and layers that are kept but never called. The network is run once, on
    copies of its buffers.

    Args:
        model: Pixels in [0, 1] to logits.
        x: A few images, at least two.

    Raises:
        HoldfastError: which part of its output are the logits is not clear.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), suppress(RuntimeError, ValueError):
        logits = View(model, statistics="batch")(x).logits  # what goes wrong otherwise, the first step tells
        gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def untrained_weights_told(model: nn.Module, say: Callable[[str], None]) -> None:
    """Say which weights of a network, though not frozen, have got no gradient in a backward.

    Args:
        model: After the backward.
        say: Gets the sentence, if there is any.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    left = [name for name, weight in weights.items() if weight.grad is None]
    if left:
        few = ", ".join(left[:3]) + (" …" if len(left) > 3 else "")
        say(f"{len(left)} of {len(weights)} tensors of weights get no gradient and stay as they are: {few}")
