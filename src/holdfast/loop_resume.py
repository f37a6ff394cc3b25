"""Going on with a run: which checkpoint is whole, whether it is the same run, and what damage can be mended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import distributed
from holdfast.errors import Damaged, HoldfastError
from holdfast.runs.checkpoint import Found, checkpoint_path, load_checkpoint, newest_whole
from holdfast.runs.export import DESCRIPTION, WEIGHTS, own_code_of, read_description, read_weights
from holdfast.runs.folder import METRICS, SUMMARY, RunFolder
from holdfast.runs.state import problem, refuse_another_run, restore
from holdfast.setup import Setup

if TYPE_CHECKING:
    from holdfast.loop import Loop


def take_up(loop: Loop) -> bool:
    """Put the newest checkpoint that is whole into a loop, and mend what it holds of the run's other files.

    Rank 0 chooses; the others follow. Returns False where the run has no checkpoint yet.

    Raises:
        HoldfastError: all checkpoints are damaged, it is another run, or something is damaged that no checkpoint holds.
    """
    run, chosen = loop.folder.path, _Chosen(loop)
    path = distributed.decided_by_first(chosen.look)
    if path is None:
        _refuse_lost_checkpoints(loop.folder)
        return False
    state = chosen.state or load_checkpoint(path, check=False)
    restore(loop, state)
    for name, epoch, there in (
        ("model", loop.best["epoch"] if loop.best else 0, loop.best is not None),
        ("last", loop.epoch, loop.complete),
    ):
        wrong = partial(model_problem, run / name, epoch=epoch, now=loop.epoch)
        reason = distributed.decided_by_first(wrong) if there else None
        if reason is not None:
            _export_again(loop, name, epoch, state, reason)
    loop.folder.restore_metrics(state.get("metrics"), loop.lines)
    loop.lines = len(loop.folder.lines)
    loop.display.say(f"going on after epoch {loop.epoch}, step {loop.position} of {len(loop.loader)}")
    return True


class _Chosen:
    """The checkpoint that rank 0 chooses, read once."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.state: dict[str, Any] | None = None

    def look(self) -> Path | None:
        """Choose a checkpoint, say what is passed over, and refuse that of another run."""
        loop, run = self.loop, self.loop.folder.path
        found = _newest(loop.setup, run)
        if found is None:
            return None
        for told in found.told:
            loop.display.say(f"{told}: passed over for {found.path.name}")
        refuse_another_run(loop.setup, found.state, run)
        loop.passed_over = found.passed_over
        self.state = found.state
        return found.path


def _newest(setup: Setup, run: Path) -> Found | None:
    return newest_whole(run, partial(problem, epochs=setup.recipe.epochs, batches=len(setup.loader)))


def _refuse_lost_checkpoints(folder: RunFolder) -> None:
    """Refuse to begin anew where a run has come further than its first checkpoint.

    Raises:
        HoldfastError: metrics.jsonl has two lines or more, and one line at most is written before a checkpoint is.
    """
    lines = folder.metrics_content().count(b"\n")
    if lines > 1:
        raise HoldfastError(
            f"{folder.path} has trained {lines} epochs, but no checkpoint is left: restore one from a copy, or train"
            " anew in another --out"
        )


def model_problem(folder: Path, *, epoch: int, now: int) -> str | None:
    """Return what is wrong with a model folder of a run, or None.

    Args:
        folder: Where it lies.
        epoch: The epoch whose weights it should hold.
        now: Epochs that the checkpoint knows of; a model of a later one was written just before a kill.
    """
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    try:
        description = read_description(folder)
        read_weights(folder / WEIGHTS)
        own_code_of(description, folder)  # a copy of it lies beside the weights
    except Damaged as error:
        return error.what
    except HoldfastError as error:  # a file that cannot be read, or code that is not what it was
        return str(error)
    found = description.get("epoch")
    if found != epoch and not (isinstance(found, int) and found > now):
        return f"{folder} holds the weights of epoch {found}, not of epoch {epoch}"
    return None


def _export_again(loop: Loop, name: str, epoch: int, state: dict[str, Any], reason: str) -> None:
    """Write a model folder anew from the checkpoint at the end of its epoch.

    Raises:
        HoldfastError: no checkpoint holds its weights any more.
    """
    if (loop.epoch, loop.position) != (epoch, 0):
        path = checkpoint_path(loop.folder.path, epoch * loop.steps_per_epoch)
        at_its_end = distributed.decided_by_first(partial(_holds, path, epoch, loop.setup))
        if not at_its_end:
            raise HoldfastError(
                f"{reason}, and no checkpoint holds these weights any more: restore it from a copy, or train anew in"
                " another --out"
            )
        restore(loop, load_checkpoint(path, check=False))
        loop.export(name)
        restore(loop, state)
    else:
        loop.export(name)
    loop.display.say(f"{reason}: {loop.folder.path / name} is written anew from a checkpoint")


def _holds(path: Path, epoch: int, setup: Setup) -> bool:
    """Whether a checkpoint was written when the epoch with the best weights so far had just ended."""
    try:
        state = load_checkpoint(path)
    except Damaged:
        return False
    if problem(state, epochs=setup.recipe.epochs, batches=len(setup.loader)) is not None:
        return False
    return (state["epoch"], state["position"], (state["best"] or {}).get("epoch")) == (epoch, 0, epoch)


def finished_summary(setup: Setup, folder: RunFolder, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the summary of a run that is finished and whole; None where the loop has something to do or to mend.

    Raises:
        HoldfastError: something is damaged, and no checkpoint is left to mend it from.
    """
    if not distributed.decided_by_first(lambda: (folder.path / SUMMARY).exists()):
        return None
    return distributed.decided_by_first(lambda: _look_at_finished(setup, folder, say))


def _look_at_finished(setup: Setup, folder: RunFolder, say: Callable[[str], None]) -> dict[str, Any] | None:
    """See `finished_summary`. Only rank 0 looks; what `take_up` will mend is said there."""
    found, told, wrong = None, (), []
    try:
        found = _newest(setup, folder.path)
        told = () if found is None else found.told
    except HoldfastError as error:  # a finished run needs no checkpoint, as long as nothing else is damaged
        told = (str(error),)
    try:
        summary = folder.summary()
        assert summary is not None  # the file is there
        ends = summary["last"]["epoch"]
        for name, epoch in (("model", summary["best"]["epoch"]), ("last", ends)):
            reason = model_problem(folder.path / name, epoch=epoch, now=ends)
            wrong += [] if reason is None else [reason]
        wrong += _metrics_problem(folder, found, ends)
    except Damaged as error:
        say(f"{error.what}: the best and the last weights are evaluated again")
        wrong.append(error.what)
    if not wrong:
        for text in (*told, f"{folder.path} is already finished"):
            say(text)
        return summary
    if found is None:
        raise HoldfastError(
            f"{wrong[0]}, and no checkpoint is left to write it anew from: restore it from a copy, or train anew in"
            " another --out"
        )
    return None


def _metrics_problem(folder: RunFolder, found: Found | None, epochs: int) -> list[str]:
    """What is wrong with the metrics of a finished run, as far as the checkpoint that was found knows."""
    try:
        count = len(folder.metrics())
    except Damaged as error:
        return [error.what]
    known = None if found is None else found.state.get("metrics")
    if found is None or known is None:
        right = count == epochs
    else:
        right = folder.metrics_content().startswith("".join(known).encode())
        right = right and count == epochs - found.state["epoch"] + len(known)
    return [] if right else [f"{folder.path / METRICS} was changed or damaged"]
