"""A further network of a method: a guide that is trained beside the classifier, or a trained teacher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FurtherNetwork:
    """Which network stands beside the classifier under a name such as "guide".

    Args:
        model: A name of `holdfast.models` or ``file.py:function``; empty for the classifier's own kind, or, with
            `init`, for the network that lies there.
        init: A run folder, a model folder or a file (``.safetensors``, ``.pt`` …) with its weights; None for new ones.
        trained: Train it with the classifier, in training mode; otherwise it stands still, in evaluation mode.

    Example:
        >>> FurtherNetwork(model="resnet18").trained
        True
    """

    model: str = ""
    init: str | None = None
    trained: bool = True
