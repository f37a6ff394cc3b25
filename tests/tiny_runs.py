"""Small data, a small network and short recipes for the tests of the loop, the run folder and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast import fit
from holdfast.attacks.pgd import PGD
from holdfast.cli.main import main
from holdfast.data.images import Dataset, Images
from holdfast.forward import Batch
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.progress_display import Display
from holdfast.recipe import SGD, Recipe
from holdfast.runs.files import read_json
from holdfast.setup import Settings
from holdfast.threat import Linf

torch.set_num_threads(1)

FP32 = Settings(precision="fp32", device="cpu", validation_steps=2, test_steps=2)
FP64 = replace(FP32, precision="fp64")
TIMES = ("seconds", "images_per_second", "seconds_left")

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """Convolution, BatchNorm, dropout, linear."""

    def __init__(self, num_classes, channels, width=6):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
            nn.Flatten(), nn.Linear(16 * width, num_classes),
        )

    def forward(self, x):
        return self.body(x - 0.5)

def make(num_classes, channels, width=6):
    return Net(num_classes, channels, width)
'''
"""A user's own file; images are 8x8."""


def quadrants(count: int, seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8x8 images whose class is the bright quadrant, with noise that makes it hard enough."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = generator.integers(0, 90, (count, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[top : top + 4, left : left + 4] += 60
    return pixels.astype(np.uint8), labels


def toy(count: int = 72, test: int = 24) -> Dataset:
    """Four classes of quadrants."""
    splits = []
    for seed, number in enumerate((count, test)):
        pixels, labels = quadrants(number, seed)
        splits.append(Images(torch.from_numpy(pixels).unsqueeze(-1), torch.from_numpy(labels).long()))
    return Dataset("toy", *splits, classes=tuple("abcd"))


def write_toy(path: Path, count: int = 72, test: int = 24) -> Path:
    """The same as an archive that the command reads."""
    (x, y), (x_test, y_test) = quadrants(count, 0), quadrants(test, 1)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return path


def tiny_net(*, norm: bool = True, dropout: float = 0.0, width: int = 6, seed: int = 0) -> nn.Sequential:
    """Convolution, BatchNorm or not, ReLU, dropout, linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(16 * width, 4),
        )


def tiny_recipe(**changes: Any) -> Recipe:
    """PGD-AT with two steps, for a few epochs."""
    recipe = Recipe(
        name="tiny",
        threat=Linf(0.1),
        attack=PGD(steps=2, step_size=0.05),
        objective=AdversarialTraining(),
        optimizer=SGD(learning_rate=0.05, momentum=0.9, weight_decay=1e-3),
        epochs=2,
        batch_size=16,
    )
    return replace(recipe, **changes)


def weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    """The exported tensors of a run."""
    return load_file(run / name / "model.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def newest_checkpoint(run: Path) -> dict[str, Any]:
    """The newest checkpoint's content, without what the clock decides and what other files of the run hold."""
    path = max((run / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    left_out = ("seconds", "epoch_began", "metrics", "config")
    return {key: value for key, value in state.items() if key not in left_out}


def summary(run: Path) -> dict[str, Any]:
    """summary.json without what the clock decides."""
    return {key: value for key, value in read_json(run / "summary.json").items() if key != "seconds"}


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Nested values are equal, and tensors bit for bit."""
    assert type(one) is type(other), at
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, at
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{at}[{place}]")
    else:
        assert one == other, at


def assert_same_run(one: Path, other: Path) -> None:
    """Two finished runs are the same but for the time they took."""
    for name in ("model", "last"):
        assert_same(weights(one, name), weights(other, name), name)
        assert (one / name / "config.json").read_text() == (other / name / "config.json").read_text()
    assert_same(metrics(one), metrics(other), "metrics")
    assert_same(newest_checkpoint(one), newest_checkpoint(other), "checkpoint")
    assert_same(summary(one), summary(other), "summary")


def command(*words: object) -> int:
    """`holdfast` in this process; its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:  # argparse's --help
        return int(stop.code or 0)


def refused(capsys: Any, *words: object) -> str:
    """The one line of standard error with which the command refuses, after checking that it does just that."""
    capsys.readouterr()
    code = command(*words)
    told = capsys.readouterr()
    lines = told.err.strip().splitlines()
    assert code == 2, (code, told.err)
    assert lines[-1].startswith("holdfast: "), lines
    assert not any("Traceback" in line for line in lines)
    assert told.out == ""
    return lines[-1]


def train(data: Path | str, out: Path | None, *more: object, recipe: str = "pgd_at", epochs: int = 2) -> int:
    """`holdfast train` with everything small."""
    words = ["train", recipe, "--data", data, "--threat.epsilon", 0.1, "--model.width", 4, "--epochs", epochs]
    words += ["--batch-size", 16, "--precision", "fp32", "--training.device", "cpu", "--training.validation_steps", 2]
    words += ["--training.test_steps", 2, *([] if out is None else ["--out", out]), *more]
    if recipe != "standard":
        words += ["--attack.steps", 2]
    return command(*words)


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class Said(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run but those that a resumption may add to."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "environment.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def stopped_run(out: Path, settings: Settings = FP32) -> Path:
    """A run that was stopped in its third epoch, with the checkpoints of steps 8 and 10."""
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Any) -> None:
        before(self, batch, progress)
        self.interruption.asked = progress.step == 9

    with patch.object(Loop, "one_step", one_step), pytest.raises(Interrupted):
        fit(tiny_recipe(epochs=4), toy(), tiny_net(), out=out, settings=settings)
    return out


def resumed(out: Path, said: Said | None = None, settings: Settings = FP32) -> Path:
    """The run of `stopped_run`, gone on with to its end."""
    run = fit(tiny_recipe(epochs=4), toy(), tiny_net(), out=out, settings=settings, resume=True, display=said)
    return run.path


class Killed(BaseException):
    """What a kill looks like from inside."""


@contextmanager
def killed_at(number: int, *, after: bool) -> Iterator[list[str]]:
    """A kill right before or after the n-th rename; yields the names that were renamed so far."""
    replace, renamed = Path.replace, []

    def counted(path: Path, target: Path) -> Any:
        if len(renamed) == number and not after:
            raise Killed
        replace(path, target)
        renamed.append(Path(target).name)
        if len(renamed) == number + 1 and after:
            raise Killed

    with patch.object(Path, "replace", counted):
        yield renamed
