"""Recounting an evaluation's verdict from its saved images alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.evaluation import fingerprint
from holdfast.evaluation.ledger import EXAMPLES, LEDGER, PROTOCOL, Ledger, read_rows
from holdfast.evaluation.networks import Deciding
from holdfast.evaluation.statistics import wilson_interval
from holdfast.evaluation.unit import BROKEN, ROBUST, WRONG
from holdfast.functional import misclassified
from holdfast.runs.digests import tell_unchecked
from holdfast.runs.files import read_json
from holdfast.threat import build_threat

BATCH_SIZES = (1, 17, 250)
VERDICTS = (ROBUST, BROKEN, WRONG)


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
    protocol = read_json(folder / PROTOCOL, advice=f"restore it from a copy, or delete {folder} and evaluate again")
    lacking = [key for key in ("model", "threat", "epsilon", "unit", "attack", "images") if key not in protocol]
    if lacking:
        raise HoldfastError(f"{folder / PROTOCOL} is damaged, it lacks {lacking[0]}: restore it or evaluate again")
    rows = read_rows(folder / LEDGER)
    if not rows:
        raise HoldfastError(f"{folder / LEDGER} is empty: restore it, or delete the folder and evaluate again")
    if fingerprint.of_model(model) != protocol.get("model"):
        raise HoldfastError(f"{folder} is an evaluation of another network: give --model with the one it was made for")
    threat = build_threat(str(protocol["threat"]), f"{protocol['epsilon']:.17f}/1")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    deciding = Deciding(model, max(batch_sizes))
    count = -(-len(rows) // int(protocol["unit"]))
    parts = [_part(folder, protocol, number) for number in range(count)]
    x, x_adv, y, index = (torch.cat([part[name] for part in parts]) for name in ("x", "x_adv", "y", "index"))
    _check_identity(folder, protocol, rows, x, y, index)
    inside = threat.contains(x_adv, x)
    said = torch.tensor([VERDICTS.index(row["verdict"]) for row in rows])
    found: dict[int, Tensor] = {}
    for size in batch_sizes:
        wrong = misclassified(deciding(x.to(device), size).cpu(), y)
        broken = misclassified(deciding(x_adv.to(device), size).cpu(), y) & inside
        found[size] = torch.where(wrong, VERDICTS.index(WRONG), torch.where(broken, VERDICTS.index(BROKEN), 0))
    votes = torch.stack(list(found.values()))
    distance = threat.length(x_adv - x)
    broken = said == VERDICTS.index(BROKEN)
    told = torch.tensor([row["distance"] if row["verdict"] == BROKEN else 0.0 for row in rows])
    far = broken & ((distance - told).abs() > 1e-5 * (1 + threat.epsilon))
    return {
        "n": len(rows),
        "robust": {str(size): int((verdict == 0).sum()) for size, verdict in found.items()},
        "clean": {str(size): int((verdict != VERDICTS.index(WRONG)).sum()) for size, verdict in found.items()},
        "ledger": int((said == 0).sum()),
        "robust_accuracy": int((said == 0).sum()) / len(rows),
        "interval": list(wilson_interval(int((said == 0).sum()), len(rows))),
        "differing": index[(votes != said).any(0) | far].tolist(),
        "unstable": index[(votes != votes[0]).any(0)].tolist(),
        "largest_distance": float(distance[broken].max()) if bool(broken.any()) else 0.0,
        "threat": str(threat),
        "attack": protocol["attack"],
    }


def _part(folder: Path, protocol: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """One unit's saved images."""
    ledger = Ledger(folder, protocol)
    part = ledger.examples_of(number)
    if ledger.unchecked:
        tell_unchecked(ledger.unchecked[0])
    if part is None and (folder / EXAMPLES).is_dir():
        raise HoldfastError(
            f"{ledger.examples_file(number)} is missing: restore it, or delete {folder} and evaluate again with"
            " --save-examples"
        )
    if part is None:
        raise HoldfastError(f"{folder} keeps no images: evaluate with --save-examples to be able to recount")
    return part


def _check_identity(
    folder: Path, protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], x: Tensor, y: Tensor, index: Tensor
) -> None:
    """Refuse saved clean images and labels that are not those that were evaluated."""
    kept = (x * 255).round().to(torch.uint8) if protocol["images"]["as"] == "uint8" else x
    same = fingerprint.of_images(kept, y) == protocol["images"]["sha256"]
    if not same or index.tolist() != [row["index"] for row in rows] or y.tolist() != [row["label"] for row in rows]:
        raise HoldfastError(f"the images in {folder} are not those of its ledger: restore them or evaluate again")


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
