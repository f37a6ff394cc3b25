"""What a person sees while a run goes on: one live line, and a lasting line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from holdfast.streams import Lasting

NOTE_EVERY = 60  # seconds between two lines of a log about work that goes on


class Display:
    """Tells nothing. What the loop calls; replace it to show progress elsewhere.

    All methods are called on rank 0 only.
    """

    def say(self, text: str) -> None:
        """A message that lasts."""

    def start(self, total_steps: int, done: int, images_per_step: int) -> None:
        """The run begins, or goes on after so many steps."""

    def step(self, epoch: int, terms: Mapping[str, float] | None) -> None:
        """A step is finished; terms now and then, None where they were not looked at."""

    def epoch(self, line: Mapping[str, Any], epochs: int) -> None:
        """An epoch is finished; `line` is what went into metrics.jsonl."""

    def work(self, text: str, total: int) -> None:
        """Something other than training begins, such as the evaluation."""

    def advance(self, count: int) -> None:
        """So many more images of that work are done."""

    def note(self, text: str, seconds_left: float | None) -> None:
        """What is going on within that work, and how long it may still take."""

    def stop(self) -> None:
        """Nothing more will be shown."""


class LiveDisplay(Display):
    """A live line on a terminal, plain lines in a log; always on standard error."""

    def __init__(self) -> None:
        self.console = Console(file=Lasting(sys.stderr), highlight=False, soft_wrap=True)  # type: ignore[arg-type]  # text
        self.live: Progress | None = None
        self.task: Any = None
        self.images_per_step = 0
        self.since = time.monotonic()
        self.steps = 0
        self.noted = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _begin(self, text: str, total: int, done: int) -> None:
        self.stop()
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self.live.start()
            self.task = self.live.add_task(text, total=total, completed=done)

    def start(self, total_steps: int, done: int, images_per_step: int) -> None:
        self.images_per_step, self.since, self.steps = images_per_step, time.monotonic(), 0
        self._begin("training", total_steps, done)

    def step(self, epoch: int, terms: Mapping[str, float] | None) -> None:
        self.steps += 1
        if self.live is None:
            return
        self.live.update(self.task, advance=1)
        if terms is not None:
            rate = self.images_per_step * self.steps / max(1e-9, time.monotonic() - self.since)
            told = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            self.live.update(self.task, description=f"epoch {epoch}  {told}  {rate:.0f} images/s")

    def epoch(self, line: Mapping[str, Any], epochs: int) -> None:
        self.say(epoch_line(line, epochs))

    def work(self, text: str, total: int) -> None:
        self._begin(text, total, 0)
        if self.live is None:
            self.say(f"{text}, {total} images …")

    def advance(self, count: int) -> None:
        if self.live is not None:
            self.live.update(self.task, advance=count)

    def note(self, text: str, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        if self.live is not None:
            self.live.update(self.task, description=text + left)
        elif time.monotonic() - self.noted > NOTE_EVERY:
            self.noted = time.monotonic()
            self.say(f"{text}{left}")

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def epoch_line(line: Mapping[str, Any], epochs: int) -> str:
    """An epoch in one line of text."""
    parts = [f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}"]
    parts += [f"{name} {value:.4f}" for name, value in line["terms"].items()]
    validation = line.get("validation")
    if validation:
        parts.append(f"validation clean {validation['clean_accuracy']:.1%}")
        if "robust_accuracy" in validation:
            parts.append(f"robust {validation['robust_accuracy']:.1%} ({validation['attack']}, n={validation['n']})")
    if line.get("overfitting", {}).get("found"):
        parts.append("CATASTROPHIC OVERFITTING")
    parts.append(f"{line['images_per_second']:.0f} images/s")
    if line.get("seconds_left") is not None and line["epoch"] < epochs:
        parts.append(f"{duration(line['seconds_left'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(42), duration(200), duration(7300)
        ('42 s', '3 min 20 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
