"""Does an evaluation's verdict depend on how it was run? Batch sizes, processes, and kills.

    python benchmarks/evaluation_stability.py RUN --data SOURCE --epsilon 0.2 [--attack autoattack] [--n 1000]
        [--batch-sizes 17 250] [--processes 1 2 4] [--kills 20]

Evaluates one network several times by the command line, in folders of its own, compares the ledgers row by row, kills
one evaluation at random moments with SIGKILL until it has finished, and recounts every evaluation from its saved images
(`holdfast verify`). Prints a table and writes benchmarks/results/evaluation_stability-<name>.json.
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
from pathlib import Path
from typing import Any

from holdfast.runs.environment import environment


def command(asked: argparse.Namespace, out: Path, *, batch_size: int, processes: int = 1) -> list[str]:
    """`holdfast evaluate` with these settings."""
    words = ["-m", "holdfast", "evaluate", asked.run, "--data", asked.data, "--epsilon", asked.epsilon]
    words += ["--attack", asked.attack, "--images", str(asked.n), "--unit", str(asked.unit), "--save-examples"]
    words += ["--batch-size", str(batch_size), "--out", str(out)]
    if processes == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *words]


def rows(out: Path) -> list[dict[str, Any]]:
    """A finished ledger without its times."""
    lines = (out / "ledger.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def differing(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[int]:
    """Positions of the images with another verdict."""
    return [a["index"] for a, b in zip(one, other, strict=True) if a["verdict"] != b["verdict"]]


def evaluated(asked: argparse.Namespace, out: Path, **how: int) -> list[dict[str, Any]]:
    """One evaluation, and its rows."""
    subprocess.run(command(asked, out, **how), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    verified = [sys.executable, "-m", "holdfast", "verify", str(out), "--model", asked.run]
    if subprocess.run(verified, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
        raise SystemExit(f"the recount of {how} differs from its ledger")
    return rows(out)


def killed(asked: argparse.Namespace, out: Path, seconds: float, draw: random.Random) -> int:
    """Kill and start again until it has been killed often enough, then let it finish. Returns the kills."""
    kills = 0
    while kills < asked.kills:
        process = subprocess.Popen(
            command(asked, out, batch_size=250), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + draw.uniform(0.3, 1.0) * seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--epsilon", required=True)
    parser.add_argument("--attack", default="autoattack")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--unit", type=int, default=50)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[17, 250])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--name", default="run")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp())
    found: dict[str, Any] = {key: getattr(asked, key) for key in ("epsilon", "attack", "n", "unit")}
    try:
        started = time.monotonic()
        base = evaluated(asked, folder / "base", batch_size=250)
        seconds = time.monotonic() - started
        found["robust"] = sum(row["verdict"] == "robust" for row in base)
        found["clean"] = sum(row["verdict"] != "wrong" for row in base)
        found["unstable"] = [row["index"] for row in base if row["unstable"]]
        found["seconds"] = seconds
        print(json.dumps(found), flush=True)
        for size in asked.batch_sizes:
            if size != 250:
                other = evaluated(asked, folder / f"batch{size}", batch_size=size)
                found[f"batch size {size}"] = compared(base, other)
                print(f"batch size {size}:", found[f"batch size {size}"], flush=True)
        for count in asked.processes:
            if count > 1:
                other = evaluated(asked, folder / f"processes{count}", batch_size=250, processes=count)
                found[f"{count} processes"] = compared(base, other)
                print(f"{count} processes:", found[f"{count} processes"], flush=True)
        if asked.kills:
            draw = random.Random(0)
            span = min(seconds, 6 + seconds / (2 * asked.kills))
            kills = killed(asked, folder / "killed", span, draw)
            other = evaluated(asked, folder / "killed", batch_size=250)
            found["killed"] = {"kills": kills, "identical ledger": other == base}
            print("killed:", found["killed"], flush=True)
    finally:
        shutil.rmtree(folder)
    found["environment"] = environment()
    out = Path(__file__).parent / "results" / f"evaluation_stability-{asked.name}.json"
    out.write_text(json.dumps(found, indent=2) + "\n")


def compared(base: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """What differs, and whether it had been listed as unstable by either."""
    images = differing(base, other)
    listed = {row["index"] for row in (*base, *other) if row["unstable"]}
    return {
        "verdicts that differ": images,
        "of these listed as unstable": [index for index in images if index in listed],
        "rows identical": base == other,
    }


if __name__ == "__main__":
    main()
