"""`fit`: train a classifier by a recipe and keep everything in a run folder. The loop itself is in loop.py."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast import distributed
from holdfast.data.images import Dataset
from holdfast.interruption import Interrupted, Interruption, Stopped
from holdfast.loop import Loop
from holdfast.loop_resume import finished_summary
from holdfast.models.own_file import OwnCode
from holdfast.models.trust import trusting
from holdfast.progress_display import Display
from holdfast.recipe import Recipe
from holdfast.runs.environment import environment
from holdfast.runs.export import load_model
from holdfast.runs.folder import CONFIG, RunFolder
from holdfast.runs.lock import FolderLock, locked
from holdfast.runs.own_code import keep_code
from holdfast.setup import Settings, Setup, prepare


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: where it lies and what came out."""

    path: Path
    summary: dict[str, Any]
    architecture: nn.Module | None = field(default=None, repr=False, compare=False)
    """Of a run that was given an `nn.Module`: its network, whose weights say nothing."""

    def model(self, checkpoint: str = "best") -> nn.Module:
        """The trained network: pixels in [0, 1] to logits, in evaluation mode. Every call returns another copy.

        Args:
            checkpoint: ``"best"`` by validation, or ``"last"``.
        """
        return load_model(self.path, checkpoint=checkpoint, model=copy.deepcopy(self.architecture))


def fit(
    recipe: Recipe,
    data: str | Dataset,
    model: str | nn.Module | OwnCode = "small_cnn",
    *,
    out: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    resume: bool = False,
    init: str | Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    display: Display | None = None,
    code: Mapping[str, OwnCode] | None = None,
    trust_code: bool | str | None = None,
) -> FinishedRun:
    """Train a classifier by a recipe, keep everything in a run folder, and evaluate the best weights.

    Args:
        recipe: The method; see `holdfast.recipes`.
        data: A source such as ``"digits"`` or a path, or a loaded data set.
        model: A name of `holdfast.models`, ``file.py:function``, or any module from pixels in [0, 1] to logits. A
            module is copied, not changed.
        out: The run folder; ``runs/<time>-<recipe>-<data>`` by default.
        seed: Of the weights, the order, the augmentation and the attacks.
        settings: Everything that is not the method: precision, validation, compilation …
        resume: Go on in a folder that exists, bit for bit as if it had never stopped (CPU, same versions and threads).
        init: Start from these weights: a run folder, a model folder or a file (`.safetensors`, `.pt` …), as `--init`.
        model_options: Further arguments of a model built by name.
        display: Where progress is shown; nowhere by default.
        code: Code that a configuration names, by part, as `holdfast.runs.own_code.configured_code` reads it. It is
            executed only where it is trusted.
        trust_code: The SHA-256 of code that may be executed though only a file names it, or True for any such code:
            that of a teacher's run, or of the run that labels extra images.

    Raises:
        HoldfastError: bad input, or another process trains in the folder; the message says what to do, and nothing is
            lost.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after the current step, when the state has been saved; after a second
            one, at once. Before the first step `Stopped`, its base class, at once.

    Example:
        Training takes a while, so this is not run as a test::

            run = fit(recipes.piat_nmse(epsilon=0.2), "digits", out="runs/mine")
            print(run.summary["robust_accuracy"])
    """
    started = distributed.start_from_environment()
    shown = display if display is not None and distributed.rank() == 0 else Display()
    try:
        with ExitStack() as stack:
            stack.enter_context(distributed.others_missed())
            stack.enter_context(trusting(trust_code))
            stack.enter_context(torch.inference_mode(False))  # gradients too, where the caller has switched them off
            interruption = stack.enter_context(Interruption())
            path = None if out is None else Path(out)
            lock = None if path is None else stack.enter_context(locked(path, kept_for=CONFIG))
            setup = prepare(
                recipe,
                data,
                model,
                seed=seed,
                settings=settings or Settings(),
                init=init,
                options=model_options,
                started=resume and path is not None and RunFolder(path).latest is not None,
                code=code,
            )
            if path is None or lock is None:
                path = _default_folder(setup)
                lock = stack.enter_context(locked(path, kept_for=CONFIG))
            stack.callback(shown.stop)
            given = _plain_copy(setup.model) if isinstance(model, nn.Module) else None
            return FinishedRun(path, _train(setup, path, lock, shown, interruption, resume=resume), given)
    finally:
        if started:
            distributed.stop(after_error=sys.exc_info()[0] is not None)


def _plain_copy(network: nn.Module) -> nn.Module:
    """A copy on the CPU, laid out as torch does, that what is done to a network in training does not reach."""
    return copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stub lacks it


def _train(
    setup: Setup, path: Path, lock: FolderLock, shown: Display, interruption: Interruption, *, resume: bool
) -> dict[str, Any]:
    """Take up the folder, train, and return the summary."""
    folder = RunFolder.create(
        path, setup.config, resume=resume, writes=distributed.rank() == 0, say=shown.say, lock=lock
    )
    distributed.barrier()
    done = finished_summary(setup, folder, shown.say) if resume else None
    if done is not None:
        return done
    kept: list[str] = []
    with distributed.refused_together():
        folder.write_environment(environment())
        if folder.writes:
            kept = keep_code(path, setup.code)
    for note in (*setup.notes, *kept):
        shown.say(note)
    try:
        with interruption.finishing("this step"):
            summary = Loop(setup, folder, shown, interruption).run()
    except Interrupted:
        raise
    except Stopped as stopped:
        raise Interrupted(path, stopped.number, at_once=True) from None
    with distributed.refused_together():
        folder.check()
    return summary


def _default_folder(setup: Setup) -> Path:
    """The default run folder; rank 0's clock decides."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{setup.recipe.name}-{setup.data.name}"
    return Path("runs") / distributed.gather_objects(name)[0]
