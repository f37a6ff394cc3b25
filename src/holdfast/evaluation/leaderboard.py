"""An evaluation as an entry of RobustBench's leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.evaluation.compared import Finished, evaluations_of, in_brief, read_protocol
from holdfast.evaluation.results import serious, summarize
from holdfast.threat import readable

STANDARD = "AutoAttack-standard"
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000}
BOARDS = {("cifar10", "Linf"), ("cifar10", "L2"), ("cifar100", "Linf"), ("imagenet", "Linf")}
"""Data and norms for which RobustBench keeps a leaderboard of accuracy under AutoAttack."""


def choose_standard(path: Path) -> Path:
    """The evaluation folder that is meant: itself, or a run's only one under AutoAttack-standard.

    Raises:
        HoldfastError: the run has none or several; says which there are.
    """
    found = evaluations_of(path)
    if found == [path]:
        return path
    protocols = {folder: read_protocol(folder) for folder in found}
    standard = [folder for folder in found if protocols[folder]["attack"] == STANDARD]
    if len(standard) == 1:
        return standard[0]
    shown = "; ".join(in_brief(folder, protocols[folder]) for folder in standard or found)
    if standard:
        raise HoldfastError(f"{path} holds several evaluations under {STANDARD}: name one of {shown}")
    raise HoldfastError(f"{path} holds no evaluation under {STANDARD}: run one; there are {shown}")


def robustbench_entry(
    finished: Finished,
    *,
    paper: str,
    authors: str,
    link: str,
    venue: str,
    architecture: str,
    additional_data: bool,
    reported: str | None = None,
    footnote: str = "",
) -> dict[str, Any]:
    """The fields of one of RobustBench's model_info files.

    Args:
        finished: The evaluation.
        paper: Its title.
        authors: Names with commas between them.
        link: Where the paper can be read.
        venue: Such as ``ICML 2024``.
        architecture: Such as ``WideResNet-34-10``.
        additional_data: Whether images beyond the data set's own training set were used.
        reported: The paper's own robust accuracy in percent; None where it is this one.
        footnote: What the board should say of the model; the number of images is added where it is below the full set.

    Raises:
        HoldfastError: the attack is not AutoAttack-standard, a serious flag is raised, or a text is empty or wrong.
    Source: RobustBench, Croce et al., arXiv:2010.09670; fields as in the model_info folder of its repository.
    """
    protocol = finished.protocol
    if protocol["attack"] != STANDARD:
        raise HoldfastError(
            f"{finished.folder} was made under {protocol['attack']}, but a leaderboard takes {STANDARD} only:"
            " run `holdfast evaluate RUN --attack autoattack`"
        )
    forbidden = serious(finished.flags)
    if forbidden:
        raise HoldfastError(
            f"{finished.folder} raises {', '.join(forbidden)}, so its number must not be quoted: read"
            f" docs/flags/{forbidden[0]}.md and mend the model"
        )
    texts = {"paper": paper, "authors": authors, "venue": venue, "architecture": architecture}
    for name, text in texts.items():
        if not text.strip():
            raise HoldfastError(f"--{name} is empty: say what the leaderboard is to show")
    if not link.startswith(("https://", "http://")):
        raise HoldfastError(f"--link {link!r} is no address: give one such as https://arxiv.org/abs/1706.06083")
    summary = summarize(finished.rows, protocol, finished.flags)
    robust = _in_percent(summary["robust_accuracy"])
    entry: dict[str, Any] = {
        "link": link,
        "name": paper.strip(),
        "authors": authors.strip(),
        "additional_data": additional_data,
        "number_forward_passes": 1,
        "dataset": protocol["data_name"],
        "venue": venue.strip(),
        "architecture": architecture.strip(),
        "eps": readable(protocol["epsilon"]),
        "clean_acc": _in_percent(summary["clean_accuracy"]),
        "reported": robust if reported is None else _reported(reported),
        "autoattack_acc": robust,
        "unreliable": False,
    }
    words = " ".join(part for part in (footnote.strip(), _images(summary["n"], protocol["data_name"])) if part)
    return {**entry, "footnote": words} if words else entry


def place(entry: dict[str, Any], norm: str) -> str | None:
    """The folder of RobustBench's repository in which such an entry lies, or None where it keeps no such board."""
    return f"model_info/{entry['dataset']}/{norm}" if (entry["dataset"], norm) in BOARDS else None


def _in_percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _reported(text: str) -> str:
    """The paper's number, in percent."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 < value <= 100:
        raise HoldfastError(f"--reported {text!r} is no accuracy in percent: write it like 56.4")
    return f"{value:.2f}"


def _images(n: int, data_name: str) -> str:
    """What the footnote says of the number of images; nothing where all of the test set were attacked."""
    full = TEST_IMAGES.get(data_name)
    if n == full:
        return ""
    return f"Evaluated on {n} {'' if full is None else f'of the {full} '}test images."
