"""Does a killed run or evaluation go on as if nobody had killed it? SIGKILL at random moments and inside file writes.

    python benchmarks/kills.py [--random 20] [--writes 20] [--evaluation 5] [--seed 0] [--out FILE]

Trains a tiny network on the built-in digits by the command line, with a checkpoint after every step, and evaluates it.
The same commands are then killed: at moments drawn from the whole length of the process, and inside file writes, where
a driver in the same process kills itself before or after the N-th call of fsync, replace or unlink (before an fsync
also with the new bytes cut in half, as a crash of the machine may leave them). Every killed process is started again,
sometimes to be killed again, until it has finished. Weights, metrics without times, summary and last checkpoint, or
ledger and summary, must then be bit for bit those of the undisturbed one.

Prints a line for each kill and a table, and writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMES = ("seconds", "images_per_second", "seconds_left", "epoch_began", "metrics", "sha256")
"""What the clock decides: times, the checkpoint's copy of metrics.jsonl, and the digest of a file with times."""
TRAIN = ["train", "piat_nmse", "--data", "digits", "--model.width", "4", "--epochs", "3", "--precision", "fp32"]
TRAIN += ["--training.device", "cpu", "--training.checkpoint_minutes", "0", "--attack.steps", "2"]
TRAIN += ["--training.validation_steps", "2", "--training.test_steps", "5", "--averages.ema.decay", "0.9"]
EVALUATE = ["--attack", "apgd-ce,fab-t", "--n", "120", "--unit", "8", "--save-examples", "--device", "cpu"]


# ---------------------------------------------------------------------------------- inside the process that is killed


class Killer:
    """Counts the calls by which files are written, and kills the process at one of them.

    Args:
        wanted: The number of the moment to die at; 0 for none.
        report: Where the count, or what was being done, is written.
        seed: Of the choice whether bytes are lost.
    """

    def __init__(self, wanted: int, report: Path, seed: int) -> None:
        self.wanted, self.report, self.count = wanted, report, 0
        self.draw = random.Random(seed)
        self.fsync, self.replace, self.unlink = os.fsync, os.replace, os.unlink
        os.fsync, os.replace, os.unlink = self._fsync, self._replace, self._unlink  # type: ignore[assignment]

    def moment(self, what: str, file: str, spoil: Callable[[], None] | None = None) -> None:
        """Die here, if this is the moment."""
        self.count += 1
        if self.count == self.wanted:
            if spoil is not None and self.draw.random() < 0.5:
                what += ", half written"
                spoil()
            self.report.write_text(f"{what} {file}")
            os.kill(os.getpid(), signal.SIGKILL)

    def _fsync(self, number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        self.moment("before fsync of", path.name, (lambda: cut(path)) if path.is_file() else None)
        self.fsync(number)

    def _replace(self, source: Any, target: Any, **more: Any) -> None:
        self.moment("before renaming to", Path(target).name)
        self.replace(source, target, **more)
        self.moment("after renaming to", Path(target).name)

    def _unlink(self, path: Any, **more: Any) -> None:
        self.moment("before removing", Path(path).name)
        self.unlink(path, **more)


def cut(path: Path) -> None:
    """Take half of the newest bytes away: of a file that is appended to, of its last line."""
    data = path.read_bytes()
    kept = data[:-1].rfind(b"\n") + 1 if path.suffix == ".jsonl" else 0
    os.truncate(path, kept + (len(data) - kept) // 2)


def worker(wanted: int, report: Path, seed: int, words: Sequence[str]) -> None:
    """Run the command in this process, to be killed at the moment that is wanted."""
    from holdfast.cli.main import main as command

    killer = Killer(wanted, report, seed)
    code = command(words)
    report.write_text(str(killer.count))
    sys.exit(code)


# -------------------------------------------------------------------------------------------------------- from outside


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Python with these words, quietly."""
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(words: Sequence[str]) -> None:
    """Run the command to its end, which it must reach."""
    done = subprocess.run([sys.executable, "-m", "holdfast", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"holdfast {' '.join(words)} ended with {done.returncode}: {done.stderr[-500:]}")


class Subject:
    """A command that is killed and started again in folders of its own.

    Args:
        first: The command's words for a folder, the first time.
        again: And every further time.
        outcome: What must be the same, of a finished folder.
        place: Where the folders go.
    """

    def __init__(
        self,
        first: Callable[[Path], list[str]],
        again: Callable[[Path], list[str]],
        outcome: Callable[[Path], Any],
        place: Path,
    ) -> None:
        self.first, self.again, self.outcome, self.place = first, again, outcome, place
        place.mkdir()
        whole, report = place / "whole", place / "report"
        began = time.monotonic()
        process = start([__file__, "--worker", "0", str(report), "0", *first(whole)])
        while not whole.exists() and process.poll() is None:
            time.sleep(0.01)
        self.begins = time.monotonic() - began
        if process.wait() != 0:
            raise SystemExit(f"holdfast {' '.join(first(whole))} ended with {process.returncode}")
        self.seconds = time.monotonic() - began
        self.moments = int(report.read_text())
        self.whole = outcome(whole)

    def words(self, folder: Path) -> list[str]:
        """The command for a folder, which may not have been begun."""
        begun = any((folder / name).exists() for name in ("config.yaml", "protocol.json"))
        return self.again(folder) if begun else self.first(folder)

    def killed_at_random(self, folder: Path, draw: random.Random) -> str | None:
        """Kill one process somewhere between its first file and its end. Returns where it was, None if it had ended."""
        limit = draw.uniform(0.9 * self.begins, self.seconds)
        process = start(["-m", "holdfast", *self.words(folder)])
        try:
            process.wait(timeout=limit)
            return None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"after {limit:.2f} s"

    def killed_inside_a_write(self, folder: Path, draw: random.Random) -> str | None:
        """Let one process kill itself inside a write. Returns which, None if it had ended before."""
        report = self.place / "report"
        wanted = draw.randint(1, self.moments)
        seed = draw.randint(0, 2**31)
        process = start([__file__, "--worker", str(wanted), str(report), str(seed), *self.words(folder)])
        return report.read_text() if process.wait() == -signal.SIGKILL else None

    def kill(self, kills: int, how: Callable[[Path, random.Random], str | None], draw: random.Random) -> dict[str, Any]:
        """Kill so often, in as many folders as it takes; a third of the killed are killed again.

        Returns:
            How many were killed, where, how many folders that were, and how many of them ended as the undisturbed one.
        """
        found: dict[str, Any] = {"kills": 0, "runs": 0, "identical": 0, "where": []}
        while found["kills"] < kills:
            folder = self.place / f"killed-{how.__name__}-{found['runs']}"
            again = True
            while again and found["kills"] < kills:
                where = how(folder, draw)
                if where is None:
                    break
                found["kills"] += 1
                found["where"].append(where)
                print(f"  {folder.name}: {where}", flush=True)
                again = draw.random() < 1 / 3
            finish(self.words(folder))
            found["runs"] += 1
            same = self.outcome(folder) == self.whole
            found["identical"] += same
            if not same:
                print(f"  {folder.name} DIFFERS", flush=True)
            else:
                shutil.rmtree(folder)
        return found


def without_times(value: Any) -> Any:
    """Nested values without what the clock decides; tensors as their bytes."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    return value


def outcome_of_run(run: Path) -> Any:
    """Weights, metrics, summary and the last checkpoint."""
    import torch

    weights = [(run / name / "model.safetensors").read_bytes() for name in ("model", "last")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = torch.load(max((run / "checkpoints").glob("step-*.pt")), weights_only=True)
    summary = json.loads((run / "summary.json").read_text())
    return weights, without_times(lines), without_times(summary), without_times(newest)


def outcome_of_evaluation(folder: Path) -> Any:
    """Ledger, summary, flags and examples."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    summary, flags = (json.loads((folder / name).read_text()) for name in ("summary.json", "flags.json"))
    examples = [load_file(file) for file in sorted((folder / "examples").glob("*.safetensors"))]
    return without_times(rows), without_times(summary), flags, without_times(examples), (folder / "units").exists()


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All kills."""
    draw = random.Random(asked.seed)
    print(f"seed {asked.seed}", flush=True)
    runs = Subject(
        lambda out: [*TRAIN, "--out", str(out)],
        lambda out: ["train", "--resume", "--out", str(out)],
        outcome_of_run,
        folder / "runs",
    )
    print(f"a run: {runs.seconds:.1f} s, {runs.moments} moments of writing", flush=True)
    found = {
        "train, random moments": runs.kill(asked.random, runs.killed_at_random, draw),
        "train, inside writes": runs.kill(asked.writes, runs.killed_inside_a_write, draw),
    }

    def evaluate(out: Path) -> list[str]:
        return ["evaluate", str(folder / "runs" / "whole"), *EVALUATE, "--out", str(out)]

    evaluations = Subject(evaluate, evaluate, outcome_of_evaluation, folder / "evaluations")
    print(f"an evaluation: {evaluations.seconds:.1f} s, {evaluations.moments} moments of writing", flush=True)
    found["evaluate, random moments"] = evaluations.kill(asked.evaluation, evaluations.killed_at_random, draw)
    found["evaluate, inside writes"] = evaluations.kill(asked.evaluation, evaluations.killed_inside_a_write, draw)
    return found


def main() -> int:
    """Measure, print, write; returns 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=20, help="SIGKILLs of a training at random moments (20)")
    parser.add_argument("--writes", type=int, default=20, help="and inside file writes (20)")
    parser.add_argument("--evaluation", type=int, default=5, help="of an evaluation, of each kind (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked, Path(folder))
    print(f"\n{'what':<28}{'kills':>7}{'runs':>7}{'identical':>11}")
    for name, counts in found.items():
        print(f"{name:<28}{counts['kills']:>7}{counts['runs']:>7}{counts['identical']:>11}")
    from holdfast.runs.environment import environment

    asked.out.write_text(
        json.dumps({"seed": asked.seed, "found": found, "environment": environment()}, indent=2) + "\n"
    )
    return 0 if all(counts["identical"] == counts["runs"] for counts in found.values()) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    sys.exit(main())
