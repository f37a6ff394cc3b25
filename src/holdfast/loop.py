"""The training loop: the objects that change, and the order in which they do."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.pgd import PGD
from holdfast.catastrophic_overfitting import OvertakenAttack, response
from holdfast.checks import untrained_weights_told
from holdfast.compilation import compile_in_place
from holdfast.data.images import Images
from holdfast.data.loader import Loader
from holdfast.evaluation.accuracy import Evaluation, accuracies
from holdfast.forward import Batch, View
from holdfast.interruption import Interrupted, Interruption
from holdfast.keyed_random import Key
from holdfast.loop_reestimation import reestimate
from holdfast.loop_resume import take_up
from holdfast.loop_stop import CONFER_EVERY, asked_anywhere, at_each_batch, pause
from holdfast.loop_watch import watch
from holdfast.models.extra_state import with_extra
from holdfast.models.modes import flagged
from holdfast.models.outputs import tell_in_training
from holdfast.progress_display import Display
from holdfast.recipe import Recipe
from holdfast.runs.checkpoint import save_checkpoint
from holdfast.runs.export import load_model, read_description, save_model
from holdfast.runs.folder import RunFolder
from holdfast.runs.state import epoch_state
from holdfast.schedule import Progress, value_at
from holdfast.setup import Setup
from holdfast.step import AdversarialStep, Step, not_finite

LOOK_EVERY = 20  # steps between looks at the sums on an accelerator: each look makes it wait


class Loop:
    """One run in progress: the objects that change, and the order in which they do."""

    def __init__(self, setup: Setup, folder: RunFolder, display: Display, interruption: Interruption) -> None:
        self.setup, self.recipe, self.settings = setup, setup.recipe, setup.settings
        self.folder, self.display, self.interruption = folder, display, interruption
        self.loader: Loader = setup.loader
        self.evaluated = copy.deepcopy(setup.model)  # plain: validation runs here, eagerly, in evaluation mode
        flagged(self.evaluated, training=False).requires_grad_(False)  # `eval()` may merge adapters into weights
        self.model = setup.model
        make = self.recipe.step or AdversarialStep
        with torch.random.fork_rng(devices=[]):  # a step may own a network
            torch.manual_seed(Key(setup.seed).fold("step's initial weights").torch_seed)
            self.step: Step = make(
                self.recipe,
                self.model,
                precision=setup.precision,
                check_finite=setup.device.type == "cpu",
            )
        for transform in self.recipe.views:
            for note in transform.notes:
                display.say(note)
        kept = sorted(getattr(self.step, "in_evaluation", {}).get("", ()))
        if kept:
            named = f"{', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}"
            display.say(f"evaluation mode is kept in training, as the model has it: {named} ({len(kept)} in all)")
        self.module: nn.Module = self.step  # type: ignore[assignment]  # a step is a module; the protocol cannot say so
        self.module.to(setup.device)
        self.optimizers = list(self.step.optimizers())
        self.reestimated: nn.Module | None = None  # with the branches that the step has added, and never compiled
        if any(average.reestimate is not None for average in self.recipe.averages):
            self.reestimated = flagged(copy.deepcopy(self.model), training=False).requires_grad_(False)
        if self.settings.compile:
            compile_in_place(self.model, "inductor" if self.settings.compile is True else self.settings.compile)
        self.run_step = self._distributed() if distributed.active() else self.step
        self.steps_per_epoch = len(self.loader) * self.step.replays
        self.warmup_steps = round(self.recipe.warmup * self.recipe.epochs * self.steps_per_epoch)
        self.epoch = self.position = self.lines = 0
        self.averaged = False  # an epoch's steps are made and its averages too, but it is not validated yet
        self.told_untrained = False
        self.guard = OvertakenAttack()
        self.response = response(self.settings.catastrophic_overfitting, self.recipe.attack or self.recipe.step)
        self.stopped = False  # before the last epoch, because of what the guard found
        self.sums: dict[str, list[Any]] = {}
        self.measured: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.seconds = self.epoch_began = 0.0
        self.clock = self.saved_at = self.conferred_at = time.monotonic()
        self.confer_every = CONFER_EVERY
        self.passed_over: Sequence[Path] = ()  # damaged checkpoints, which go when the next one is whole

    def _distributed(self) -> Step:
        parts = (getattr(self.module, part, nn.Module()) for part in ("objective", "networks", "strategy"))
        unused = any(True for part in parts for _ in part.parameters())
        unused = unused or bool(getattr(self.step, "branches", {}))  # a clean warm-up leaves the auxiliary one alone
        unused = unused or self.setup.leaves_weights_out  # auxiliary classifiers, for example
        return nn.parallel.DistributedDataParallel(  # type: ignore[return-value]  # called like the step it wraps
            self.module,
            device_ids=[self.setup.device.index] if self.setup.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=unused,
        )

    # ---------------------------------------------------------------- the run

    def run(self) -> dict[str, Any]:
        """All epochs, then the closing evaluation. Returns the summary."""
        if not take_up(self):
            self.folder.restore_metrics([], 0)
            for average in self.recipe.averages:
                average.start(self.model)
        summary = self.folder.whole_summary()
        if self.complete and summary is not None:  # what was damaged is mended by now
            self.display.say(f"{self.folder.path} is already finished")
            return summary
        if not self.settings.compile:  # a hook less would be compiled anew
            tell_in_training(self.model, lambda text: None if text in self.setup.notes else self.display.say(text))
        done = self.progress().step
        self.display.start(self.recipe.epochs * self.steps_per_epoch, done, self.loader.batch_size)
        while not self.complete:
            self.one_epoch()
        self.display.stop()
        return self.close()

    @property
    def complete(self) -> bool:
        """Whether all training is done, the last epoch's validation included."""
        return (self.epoch == self.recipe.epochs or self.stopped) and not self.averaged

    def progress(self, replay: int = 0) -> Progress:
        """Where the run stands."""
        step = self.epoch * self.steps_per_epoch + self.position * self.step.replays + replay
        here = Progress(
            epoch=self.epoch,
            step=step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.recipe.epochs,
            warmup_steps=self.warmup_steps,
            replay=replay,
            measured=self.measured,
            seed=self.setup.seed,
        )
        return replace(here, stage=self.recipe.schedule.stage(here.fraction))

    def one_epoch(self) -> None:
        """The rest of the current epoch, from wherever the last checkpoint left it."""
        if self.position == 0:
            self.sums = {}
            self.epoch_began = self.seconds
            self.measured = self.measure()
        for batch in () if self.averaged else self.loader.batches(self.epoch, self.position):
            for replay in range(self.step.replays):
                self.one_step(batch, self.progress(replay))
            self.position += 1
            watch(self)
            if self.stopped:
                break
            pause(self)
        self.end_epoch()

    def one_step(self, batch: Batch, progress: Progress) -> None:
        """Forward, backward, optimisers, averages."""
        set_hyperparameters(self.optimizers, self.recipe, progress)
        terms = self.run_step(batch, progress)
        terms["loss"].backward()
        if not self.told_untrained and not progress.warming_up:  # a clean warm-up leaves an auxiliary branch alone
            self.told_untrained = True
            untrained_weights_told(self.model, self.display.say)
        self.step.after_backward(progress)
        if self.recipe.gradient_clip is not None:
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            trained = [p for group in groups if not group.get("own_schedule") for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.recipe.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for average in self.recipe.averages:
            average.after_step(self.model, progress)
        for name, term in terms.items():
            total = self.sums.setdefault(name, [torch.zeros((), dtype=torch.float64, device=term.device), 0])
            total[0] += term.detach()
            total[1] += 1
        look = self.setup.device.type == "cpu" or progress.step % LOOK_EVERY == 0
        self.display.step(self.epoch + 1, self.look(terms) if look else None)

    def look(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """The terms as numbers. Sums keep a NaN, so a look now and then misses none."""
        for name, (total, _) in self.sums.items():
            if not math.isfinite(float(total)):
                raise not_finite(name)
        return {name: float(term.detach()) for name, term in terms.items()}

    def check_weights(self) -> None:
        """Refuse to keep weights that a step with a finite loss has made NaN or infinite.

        Raises:
            NonFiniteLoss: what was saved before is left as it is.
        """
        # a frozen mask may be infinite
        trained = [weight for weight in self.module.parameters() if weight.requires_grad]
        if not bool(torch.stack([weight.isfinite().all() for weight in trained]).all()):
            raise not_finite("gradient")

    # -------------------------------------------------------- an epoch's end

    def end_epoch(self) -> None:
        """Equal buffers, averages, validation, best, metrics, checkpoint: in this order."""
        self.look({})
        self.check_weights()
        self.position -= 1
        progress = self.progress(self.step.replays - 1)  # of the last step
        self.position += 1
        last = self.epoch + 1 == self.recipe.epochs or self.stopped
        validated = (self.epoch + 1) % self.settings.validate_every == 0 or last
        if not self.averaged:
            self.average(progress, validated=validated)
            self.averaged = True
        line = self.metrics_line(progress)
        if validated:
            self.load_exported()
            found = self.evaluation(self.setup.validation, self.settings.validation_steps, None)
            line["validation"] = found.as_dict()
            self.keep_if_best(found)
        line["seconds_left"] = 0.0 if last else self.time_left()
        with distributed.refused_together():
            self.folder.append_metrics(line)
        self.lines += 1
        self.epoch, self.position, self.averaged = self.epoch + 1, 0, False
        if last:
            self.export("last")
        self.display.epoch(line, self.recipe.epochs)
        self.save()
        asked = asked_anywhere(self)
        if asked and not last:
            raise Interrupted(self.folder.path, asked)

    def average(self, progress: Progress, *, validated: bool) -> None:
        """Make buffers and averages equal on all processes, and let the averages do what they do after an epoch."""
        distributed.average_buffers(self.model)
        if isinstance(self.step, AdversarialStep):
            self.step.after_epoch(progress)
        for average in self.recipe.averages:
            distributed.average_in_place([t for t in (average.exported() or {}).values() if t.is_floating_point()])
            average.after_epoch(self.model, progress)
            if average.reestimate is not None and (validated or average.writes_back):
                reestimate(self, average, progress)

    def metrics_line(self, progress: Progress) -> dict[str, Any]:
        """The epoch's means, over all processes."""
        steps = max((count for _, count in self.sums.values()), default=1)  # where a term was absent, it was 0
        means = {name: (total / steps).reshape(1) for name, (total, _) in self.sums.items()}
        distributed.average_in_place(list(means.values()))
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        spent = self.seconds - self.epoch_began  # what came before a checkpoint inside the epoch included
        images = self.position * self.step.replays * self.loader.batch_size
        line = {
            "epoch": self.epoch + 1,
            "step": progress.step + 1,
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "terms": {name: float(value) for name, value in means.items()},
        }
        if self.measured:
            line["measured"] = dict(self.measured)
        if self.guard.last:
            line["overfitting"] = {**self.guard.last, "found": self.guard.found, "rollbacks": self.guard.rollbacks}
        if hasattr(self.step, "watched"):
            line["watched"] = self.step.watched()  # type: ignore[attr-defined]  # asked above
        return {**line, "seconds": spent, "images_per_second": images / max(spent, 1e-9)}

    def time_left(self) -> float:
        """Seconds that the remaining epochs will take, validation included, if they take as long as those so far."""
        per_epoch = (self.seconds + time.monotonic() - self.clock) / (self.epoch + 1)
        return per_epoch * (self.recipe.epochs - self.epoch - 1)

    def keep_if_best(self, found: Evaluation) -> None:
        """Keep the exported weights if they are the best by robust, then clean accuracy; ties keep the first."""
        attacked = self.recipe.attack is not None or self.recipe.step is not None
        robust = found.robust if attacked else None  # standard training is not chosen by noise
        count = [found.clean if robust is None else robust, found.clean]
        if self.best is None or count > self.best["count"]:
            self.best = {"epoch": self.epoch + 1, "count": count, "validation": found.as_dict()}
            self.export("model")

    def save(self) -> None:
        """Write a checkpoint."""
        self.seconds += time.monotonic() - self.clock
        self.clock = time.monotonic()
        state = epoch_state(self)
        with distributed.refused_together():
            self.folder.check()
            if distributed.rank() == 0:
                step = self.epoch * self.steps_per_epoch + self.position * self.step.replays
                save_checkpoint(
                    self.folder.path, step, state, keep=self.settings.keep_checkpoints, damaged=self.passed_over
                )
                self.passed_over = ()
        self.saved_at = time.monotonic()

    # ----------------------------------------------- measuring and exporting

    def measure(self) -> dict[str, float]:
        """What the objective wants to know at the epoch's start; the same on every process."""
        objective = getattr(self.step, "objective", None)
        measures = getattr(objective, "measures", ())
        branches = getattr(self.step, "branches", {})
        whole = replace(self.loader, rank=0, world=1)
        found = {}
        for measure in measures:
            wanted = math.ceil(measure.images / self.loader.batch_size)
            batches = (batch for _, batch in zip(range(wanted), whole.batches(self.epoch), strict=False))
            view = View(self.model, branch=branches.get(measure.side, "main"))
            found[measure.name] = float(measure.measure(view, batches))
        return found

    def exported(self) -> Mapping[str, Any]:
        """The weights of the last average that exports any, else the model's own, without auxiliary branches.

        What a module keeps beside its tensors (`get_extra_state`) is not averaged: it is the model's own.
        """
        states = (average.exported() for average in reversed(self.recipe.averages))
        state = next((state for state in states if state is not None), None) or self.model.state_dict()
        state = with_extra(state, self.model)
        return {name: state[name] for name in self.evaluated.state_dict()}

    def load_exported(self) -> None:
        self.evaluated.load_state_dict(dict(self.exported()))

    def evaluation(self, images: Images, steps: int, n: int | None) -> Evaluation:
        """Clean accuracy and PGD of the weights that are loaded for evaluation."""
        closing = images is not self.setup.validation
        return accuracies(
            self.evaluated,
            images,
            threat=self.recipe.threat,
            attack=PGD(steps=steps, early_stop=0) if steps else None,
            n=n,
            batch_size=self.settings.evaluation_batch,
            autocast="fp32" if closing else self.setup.precision,
            tick=at_each_batch(self, len(images) if n is None else n, closing=closing),
        )

    def export(self, name: str) -> None:
        """Write the exported weights as a model folder."""
        validation = self.best["validation"] if name == "model" and self.best else None
        epoch = self.best["epoch"] if name == "model" and self.best else self.epoch
        with distributed.refused_together():
            self.folder.check()
            if distributed.rank() == 0:
                description = {**self.setup.description, "epoch": epoch, "validation": validation}
                code = self.setup.code.get("model")
                save_model(self.folder.path / name, self.exported(), description, code=code)

    def close(self) -> dict[str, Any]:
        """Evaluate best and last on the test set, which has chosen nothing, and write the summary."""
        assert self.best is not None  # the last epoch is always validated
        results: dict[str, Any] = {}
        for name, epoch in (("best", self.best["epoch"]), ("last", self.epoch)):
            if name == "last" and epoch == self.best["epoch"]:
                results[name] = dict(results["best"])
                continue
            folder = self.folder.path / ("model" if name == "best" else "last")
            trained = load_model(folder, model=self.evaluated)
            self.evaluated = trained.to(self.setup.device)
            n = min(self.settings.test_images or len(self.setup.data.test), len(self.setup.data.test))
            self.display.work(f"evaluating {name} (PGD-{self.settings.test_steps})", n)
            found = self.evaluation(self.setup.test, self.settings.test_steps, n)
            results[name] = {"epoch": read_description(folder).get("epoch", epoch), **found.as_dict()}
        self.display.stop()
        summary = self.setup.summary(results, round(self.seconds, 1))
        if self.stopped:
            summary["stopped"] = self.guard.message(self.epoch)
        with distributed.refused_together():
            self.folder.write_summary(summary)
        return summary


def set_hyperparameters(optimizers: Sequence[torch.optim.Optimizer], recipe: Recipe, progress: Progress) -> None:
    """Give the optimisers the learning rate, momentum and weight decay of this step."""
    settings = recipe.optimizer
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("own_schedule"):
                continue  # the step sets it itself
            group["lr"] = settings.learning_rate * recipe.schedule(progress)
            if "momentum" in group:
                group["momentum"] = value_at(settings.momentum, progress)
            group["weight_decay"] = value_at(settings.weight_decay, progress)
