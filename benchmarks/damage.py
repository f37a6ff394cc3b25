"""What becomes of a run and of an evaluation when one of their files is damaged.

A tiny finished run, one that was stopped inside an epoch, a finished and an unfinished evaluation with examples are
made. Then each of their files, one at a time, is halved, emptied, removed, and one byte of it is flipped at five places
(the first and the last among them), and the commands that a person would give next are run in this process: `train
--resume`, `evaluate`, `verify`, `compare`. What comes out is one of

    same      exit code 0, and weights, metrics, summary, ledger, examples and printed verdict are those of an undamaged
              folder, bit for bit but for times
    refused   exit code 2 and one line
    harmless  as same, and the file decides nothing (see HARMLESS)
    WRONG     anything else

    python benchmarks/damage.py [--flips 5] [--only PART_OF_A_PATH]

prints a table and what went wrong, and writes benchmarks/results/damage.json. It takes five minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml

from holdfast.cli.main import main as holdfast
from holdfast.evaluation.ledger import Ledger
from holdfast.loop import Loop
from holdfast.runs.environment import environment
from holdfast.runs.files import read_json

HARMLESS = {
    "environment.json": "tells with what a run was made; it is begun anew",
    "log.txt": "made from the ledger for people; written anew by every `evaluate`",
    "images.csv": "made from the ledger for spreadsheets; written anew by every `evaluate`",
    ".lock": "empty; only that it is locked counts",
}
"""Files that decide nothing, and why."""

TIMES = ("seconds", "images_per_second", "seconds_left")
NET = """
from torch import nn

def make(num_classes, channels, width):
    layers = [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, num_classes))
"""
"""A user's own file: runs and models take copies of it along."""

FLIPS = (0x01, 0xFF)  # in turn: the first leaves text readable, the second makes it no UTF-8


@dataclass(frozen=True)
class Outcome:
    """What a command did to a damaged folder."""

    subject: str
    file: str
    damage: str
    command: str
    found: str
    said: bool
    detail: str = ""


@dataclass(frozen=True)
class Subject:
    """A folder to be damaged, and what is done with it next.

    Args:
        folder: Its name below the working folder.
        commands: Words of `holdfast` by what they are called here; "{work}" stands for the working folder.
        signature: What must come out the same, of the working folder.
    """

    folder: str
    commands: dict[str, list[str]]
    signature: Callable[[Path, str], Any]


# ------------------------------------------------------------------------------------------------- what is damaged


def write_data(path: Path) -> None:
    """Four classes of grey 8x8 images: the bright quadrant."""
    arrays = {}
    for split, count, seed in (("train", 72, 0), ("test", 24, 1)):
        generator = np.random.default_rng(seed)
        labels = np.arange(count) % 4
        pixels = generator.integers(0, 90, (count, 8, 8))
        for image, label in zip(pixels, labels, strict=True):
            image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 60
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)


def train_words(work: Path, out: str) -> list[str]:
    """`holdfast train` with everything small, an average among it."""
    words = f"train piat_nmse --data {work}/data.npz --threat.epsilon 0.1 --epochs 4 --batch-size 16"
    words += f" --model {work}/net.py:make --model.width 4"
    words += " --precision fp32 --training.device cpu --training.validation_steps 2 --training.test_steps 2"
    return f"{words} --attack.steps 2 --averages.ema.decay 0.9 --out {work}/{out}".split()


def evaluate_words(work: Path, run: str, out: str) -> list[str]:
    """`holdfast evaluate` in three units."""
    words = f"evaluate {work}/{run} --attack pgd --steps 5 --precision fp32 --device cpu --unit 10 --out {work}/{out}"
    return words.split()


@contextlib.contextmanager
def stopped_after(owner: type, name: str, calls: int, stop: Callable[..., None]) -> Iterator[None]:
    """Do something right after a method has been called so many times."""
    before, count = getattr(owner, name), 0

    def counted(self: Any, *arguments: Any) -> None:
        nonlocal count
        before(self, *arguments)
        count += 1
        if count == calls:
            stop(self)

    with patch.object(owner, name, counted):
        yield


def ask(loop: Loop) -> None:
    """Stop a run as Ctrl-C does."""
    loop.interruption.asked = True


def interrupt(ledger: Ledger) -> None:
    """Stop an evaluation as Ctrl-C does."""
    raise KeyboardInterrupt


def make(work: Path) -> None:
    """All folders, undamaged."""
    work.mkdir(parents=True)
    write_data(work / "data.npz")
    (work / "net.py").write_text(NET)
    assert run_command(train_words(work, "finished"))[0] == 0
    with stopped_after(Loop, "one_step", 14, ask):  # in the fourth epoch of four steps each
        assert run_command(train_words(work, "interrupted"))[0] == 130
    assert run_command([*evaluate_words(work, "finished", "evaluated"), "--save-examples"])[0] == 0
    assert run_command([*evaluate_words(work, "finished", "other"), "--checkpoint", "last"])[0] == 0
    with stopped_after(Ledger, "write", 2, interrupt):
        assert run_command([*evaluate_words(work, "finished", "partly"), "--save-examples"])[0] == 130


def subjects(work: Path) -> list[Subject]:
    """What is damaged, with the commands that follow."""
    again = [*evaluate_words(work, "finished", "evaluated"), "--save-examples"]
    model = ["--model", f"{work}/finished"]
    return [
        Subject("finished", run_commands(work, "finished"), run_signature),
        Subject("interrupted", run_commands(work, "interrupted"), run_signature),
        Subject(
            "evaluated",
            {
                "evaluate": again,
                "evaluate without examples": again[:-1],
                "verify": ["verify", f"{work}/evaluated", *model],
                "compare": ["compare", f"{work}/evaluated", f"{work}/other"],
            },
            evaluation_signature,
        ),
        Subject(
            "partly",
            {"evaluate": [*evaluate_words(work, "finished", "partly"), "--save-examples"]},
            evaluation_signature,
        ),
    ]


def run_commands(work: Path, run: str) -> dict[str, list[str]]:
    """What is done with a run next."""
    evaluate = evaluate_words(work, run, "new")
    found = {"train --resume": ["train", "--resume", "--out", f"{work}/{run}"], "evaluate RUN": evaluate}
    if run == "finished":
        found["evaluate RUN --checkpoint last"] = [*evaluate, "--checkpoint", "last"]
    return found


# ------------------------------------------------------------------------------------------- what must be the same


def run_signature(work: Path, folder: str) -> dict[str, Any]:
    """A run as a command has left it, without its times; and the evaluation that a command has made of it."""
    run, found = work / folder, {}
    for name in ("model", "last"):
        file = run / name / "model.safetensors"
        if file.is_file():
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest(), read_json(run / name / "config.json")
    if (run / "summary.json").is_file():
        found["summary"] = without_times(read_json(run / "summary.json"))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found["metrics"] = [without_times(json.loads(line)) for line in lines]
        found["config"] = yaml.safe_load((run / "config.yaml").read_text())
    return found


def evaluation_signature(work: Path, folder: str) -> dict[str, Any]:
    """An evaluation as a command has left it, without its times."""
    out = work / folder
    lines = (out / "ledger.jsonl").read_text().splitlines()
    examples = {file.name: file.read_bytes() for file in sorted((out / "examples").glob("*.safetensors"))}
    return {
        "ledger": [without_times(json.loads(line)) for line in lines],
        "summary": without_times(read_json(out / "summary.json")),
        "flags": read_json(out / "flags.json"),
        "examples": hashlib.sha256(b"".join(examples.values())).hexdigest(),
    }


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    """What the clock does not decide."""
    return {key: item for key, item in value.items() if key not in TIMES}


def verdict(printed: str) -> str:
    """Standard output without its times."""
    return re.sub(r"; [\d,]+ s$", "", printed, flags=re.MULTILINE)


def outcome_of(subject: Subject, work: Path, name: str) -> tuple[int, Any, str]:
    """Give a command to a working folder: exit code, what came out, what was said on standard error."""
    code, printed, said = run_command(subject.commands[name])
    if code != 0:
        return code, None, said
    made = "new" if name.startswith("evaluate RUN") else ""
    reads_only = name in ("verify", "compare")  # what these leave alone need not be whole afterwards
    left: Any = None
    if made:
        left = evaluation_signature(work, made)
    elif not reads_only:
        left = subject.signature(work, subject.folder)
        if name == "evaluate without examples":
            left.pop("examples")  # said to be damaged, and left so
    return code, (verdict(printed), left), said


def run_command(words: Sequence[str]) -> tuple[int, str, str]:
    """`holdfast` in this process: its exit code (1 where it raises), standard output, standard error."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = holdfast(list(words))
        except Exception:
            traceback.print_exc()
            code = 1
    return code, printed.getvalue(), said.getvalue()


# ------------------------------------------------------------------------------------------------------ the damage


def damages(file: Path, flips: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of damage to a file, and how it is done: nothing is done yet."""
    data = file.read_bytes()
    yield "removed", file.unlink
    if not data:
        return
    yield "emptied", lambda: file.write_bytes(b"")
    if len(data) > 1:
        yield "halved", lambda: file.write_bytes(data[: len(data) // 2])
    shares = np.linspace(0, 1, flips) if flips > 1 else (0.5,)
    places = sorted({round(share * (len(data) - 1)) for share in shares})
    for number, place in enumerate(places):
        flipped = bytearray(data)
        flipped[place] ^= FLIPS[number % 2]
        yield f"flipped at {place}", lambda flipped=flipped: file.write_bytes(flipped)


def classify(subject: Subject, work: Path, file: str, damage: str, name: str, expected: Any) -> Outcome:
    """Run one command on a folder that is damaged, and say what it made of that."""
    try:
        code, left, said = outcome_of(subject, work, name)
    except Exception as error:  # the command was content, but what it left cannot be read
        return Outcome(subject.folder, file, damage, name, "WRONG", False, f"{type(error).__name__}: {error}")
    lines = said.strip().splitlines() or [""]
    named = Path(file).name.removesuffix(".sha256") in said or Path(file).parts[0] in said.split(subject.folder)[-1]
    if code == 2 and lines[-1].startswith("holdfast: ") and "Traceback" not in said:
        found, detail = "refused", lines[-1]
    elif code == 0 and left == expected:
        found, detail = ("harmless" if Path(file).name in HARMLESS else "same"), ""
    else:
        found, detail = "WRONG", f"exit code {code}: {lines[-1]}"
    return Outcome(subject.folder, file, damage, name, found, named, detail.replace(str(work), "WORK"))


def measure(root: Path, *, flips: int, wanted: Callable[[str, str], bool]) -> list[Outcome]:
    """Damage files one at a time, and give every command to each.

    Args:
        root: An empty folder.
        flips: At how many places a byte is flipped; one alone is in the middle.
        wanted: Whether a file, by its path from the folder of all subjects, is to have a damage, by its name.
    """
    store, work = root / "store", root / "work"
    make(work)
    work.rename(store)
    outcomes = []
    for subject in subjects(work):
        expected = {}
        for name in subject.commands:
            shutil.copytree(store, work)
            code, expected[name], said = outcome_of(subject, work, name)
            assert code == 0, said
            shutil.rmtree(work)
        files = sorted(path for path in (store / subject.folder).rglob("*") if path.is_file())
        for file in (str(path.relative_to(store / subject.folder)) for path in files):
            for damage in [name for name, _ in damages(store / subject.folder / file, flips)]:
                if not wanted(f"{subject.folder}/{file}", damage):
                    continue
                for name in expected:
                    shutil.copytree(store, work)
                    dict(damages(work / subject.folder / file, flips))[damage]()
                    outcomes.append(classify(subject, work, file, damage, name, expected[name]))
                    shutil.rmtree(work)
    return outcomes


# ------------------------------------------------------------------------------------------------------- the table


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each file of each folder."""
    words = ("same", "refused", "harmless", "WRONG")
    lines = [f"{'folder':<12} {'file':<46} " + " ".join(f"{word:>8}" for word in words)]
    keys = list(dict.fromkeys((each.subject, each.file) for each in outcomes))
    for subject, file in keys:
        count = Counter(each.found for each in outcomes if (each.subject, each.file) == (subject, file))
        lines.append(f"{subject:<12} {file:<46} " + " ".join(f"{count[word]:>8}" for word in words))
    count = Counter(each.found for each in outcomes)
    return [*lines, f"{'all':<59} " + " ".join(f"{count[word]:>8}" for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=5)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    root = Path(tempfile.mkdtemp())
    os.environ["HOLDFAST_STATE_DIR"] = str(root / "state")  # trust in the copies of net.py
    try:
        outcomes = measure(root, flips=asked.flips, wanted=lambda file, damage: asked.only in file)
    finally:
        shutil.rmtree(root)
    print("\n".join(table(outcomes)))
    wrong = [each for each in outcomes if each.found == "WRONG"]
    for each in wrong:
        print(f"WRONG  {each.subject}/{each.file} {each.damage}, {each.command}: {each.detail}")
    if asked.only:
        return
    result = {
        "command": f"python benchmarks/damage.py --flips {asked.flips}",
        "cases": len(outcomes),
        "counts": dict(Counter(each.found for each in outcomes)),
        "harmless": HARMLESS,
        "seconds": round(time.monotonic() - began),
        "environment": environment(),
        "files": [
            {
                "folder": subject,
                "file": file,
                **Counter(e.found for e in outcomes if (e.subject, e.file) == (subject, file)),
            }
            for subject, file in dict.fromkeys((each.subject, each.file) for each in outcomes)
        ],
        "wrong": [vars(each) for each in wrong],
    }
    path = Path(__file__).parent / "results" / "damage.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
