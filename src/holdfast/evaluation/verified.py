"""Recounting an evaluation's verdict from its saved images alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.evaluation import fingerprint
from holdfast.evaluation.ledger import LEDGER, PROTOCOL, Ledger, read_rows
from holdfast.evaluation.networks import Deciding
from holdfast.evaluation.statistics import wilson_interval
from holdfast.evaluation.unit import BROKEN
from holdfast.runs.files import read_json
from holdfast.threat import ThreatModel, build_threat

BATCH_SIZES = (1, 17, 250)


def recount(folder: Path, model: nn.Module, *, batch_sizes: Sequence[int] = BATCH_SIZES) -> dict[str, Any]:
    """Run the saved images through the model, in float32, uncompiled, in batches of several sizes.

    An image counts as broken where its saved image is misclassified, lies in [0, 1] and within epsilon of the saved
    clean image (tolerance 1e-6). The clean verdict is recounted likewise.

    Args:
        folder: An evaluation made with `save_examples`.
        model: The evaluated network; another one is refused.
        batch_sizes: Each gives a count.

    Returns:
        ``robust`` by batch size, ``ledger`` what the ledger says, ``differing`` positions whose verdict differs from
        the ledger's in any batch size, ``unstable`` those that differ between batch sizes, ``largest_distance``.

    Raises:
        HoldfastError: the folder holds no finished evaluation with images, or one of another network.
    """
    protocol = read_json(folder / PROTOCOL)
    rows = read_rows(folder / LEDGER)
    if fingerprint.of_model(model) != protocol.get("model"):
        raise HoldfastError(f"{folder} is an evaluation of another network: give --model with the one it was made for")
    threat = build_threat(str(protocol["threat"]), f"{protocol['epsilon']:.17f}/1")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    deciding = Deciding(model, max(batch_sizes))
    count = -(-len(rows) // int(protocol["unit"]))
    parts = [_part(folder, protocol, number) for number in range(count)]
    x, x_adv, y, index = (torch.cat([part[name] for part in parts]) for name in ("x", "x_adv", "y", "index"))
    if index.tolist() != [row["index"] for row in rows]:
        raise HoldfastError(f"the images in {folder} are not those of its ledger: restore them or evaluate anew")
    inside = _inside(threat, x_adv, x, protocol)
    found: dict[int, Tensor] = {}
    for size in batch_sizes:
        clean = deciding(x.to(device), size).argmax(1).cpu() == y
        held = deciding(x_adv.to(device), size).argmax(1).cpu() == y
        found[size] = clean & (held | ~inside)
    said = torch.tensor([row["verdict"] == "robust" for row in rows])
    votes = torch.stack(list(found.values()))
    distance = threat.length(x_adv - x)
    broken = torch.tensor([row["verdict"] == BROKEN for row in rows])
    return {
        "n": len(rows),
        "robust": {str(size): int(held.sum()) for size, held in found.items()},
        "ledger": int(said.sum()),
        "robust_accuracy": int(said.sum()) / len(rows),
        "interval": list(wilson_interval(int(said.sum()), len(rows))),
        "differing": index[(votes != said).any(0)].tolist(),
        "unstable": index[(votes != votes[0]).any(0)].tolist(),
        "largest_distance": float(distance[broken].max()) if bool(broken.any()) else 0.0,
        "threat": str(threat),
        "attack": protocol["attack"],
    }


def _part(folder: Path, protocol: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """One unit's saved images."""
    part = Ledger(folder, protocol).examples_of(number)
    if part is None:
        raise HoldfastError(f"{folder} keeps no images: evaluate with --save-examples to be able to recount")
    return part


def _inside(threat: ThreatModel, x_adv: Tensor, x: Tensor, protocol: Mapping[str, Any]) -> Tensor:
    """Which images lie in the bounds and, unless nearest examples were wanted, in the ball."""
    if "nearest examples" in str(protocol["attack"]):
        threat = threat.with_epsilon(float("inf"))
    return threat.contains(x_adv, x)


def in_words(found: Mapping[str, Any]) -> str:
    """A recount as two or three lines."""
    counts = ", ".join(f"{robust} in batches of {size}" for size, robust in found["robust"].items())
    lines = [
        f"{found['attack']}, {found['threat']}, n = {found['n']}",
        f"robust by the ledger: {found['ledger']}; recounted in float32 from the saved images: {counts}",
        f"largest distance of an example: {found['largest_distance']:.6g}",
    ]
    if found["unstable"]:
        lines.append(f"unstable, by batch size: images {', '.join(map(str, found['unstable']))}")
    if found["differing"]:
        lines.append(f"DIFFERENT from the ledger: images {', '.join(map(str, found['differing']))}")
    else:
        lines.append("every verdict of the ledger is confirmed")
    return "\n".join(lines)
