"""What an evaluation is about, as hashes: the same ones mean the same network and the same images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from holdfast.attacks.stepwise import StepwiseAttack


def of_model(model: nn.Module) -> str:
    """The SHA-256 of a network's structure, as it prints itself, and of all its parameters and buffers.

    Example:
        >>> of_model(nn.Linear(2, 2)) == of_model(nn.Linear(2, 2))
        False
    """
    found = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return found.hexdigest()


def of_images(x: Tensor, y: Tensor) -> str:
    """The SHA-256 of images and labels."""
    found = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    for part in x.split(1024):
        found.update(_bytes(part))
    found.update(_bytes(y))
    return found.hexdigest()


def of_attack(attack: StepwiseAttack) -> str:
    """Return an attack with all its settings; of another network that it uses, the SHA-256."""
    source = getattr(attack, "source", None)
    return repr(attack) + (f" of weights {of_model(source)}" if isinstance(source, nn.Module) else "")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
