"""Every recipe on equal terms: the same network, epochs, optimiser and schedule, several seeds, two arms.

The arm ``plain`` trains by SGD whose learning rate steps down at 50 % and 75 %. The arm ``averaged`` has what the
strongest baseline has: one cycle, label smoothing, and an EMA of the weights after the method's own averages. Attack,
objective, views and the method's own averages are the recipe's; a clean warm-up is left out. ``finetune`` starts from
the arm plain's PGD-AT network of the same seed and repeats the ablations of the ISEAT paper's tables 7 to 9; it runs
half as many epochs at a tenth of the learning rate. Free-AT replays each batch up to 8 times in a run of as many steps;
the methods with extra images (rst…) get the training images beyond the first, without their labels, under pseudo-labels
of the standard network of the same seed. ``studies`` changes one thing in the arm plain (named after the
comma), where a method came out below PGD-AT; x3 is three times the epochs.

    python benchmarks/methods.py digits --seeds 5 --jobs 2
    python benchmarks/methods.py path/to/fashion-mnist --seeds 3 --jobs 2 --train-images 10000
    python benchmarks/methods.py --table

appends one JSON row a run to docs/results/methods-rows.jsonl (runs that are there already are not repeated) and writes
the table docs/results/methods.md. Seconds a step are those of runs that share the machine; benchmarks/step_cost.py
compares them one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ROWS, TABLE = RESULTS / "methods-rows.jsonl", RESULTS / "methods.md"

METHODS = (
    *("standard", "pgd_at", "alp", "trades", "asym_trades", "mart", "score"),
    *("awp", "rwp", "trades_awp", "mart_awp"),
    *("pgd_at_nmse", "piat", "piat_nmse", "piat_trades", "piat_mart"),
    *("ar_at", "ar_at_awp", "ar_at_piat", "iseat", "iseat_piat"),
    *("fat", "fat_trades", "fat_mart", "gairat", "piat_gairat", "ovr_style", "slore_mart"),
    *("lbgat", "kd_swa", "sglr", "consistency", "stat", "ikl"),
    *("las_at", "las_awp", "free_at", "fast_at", "n_fgsm", "gat", "nuat", "fgsm_pgi", "liet"),
    *("idbh", "idbh_awp", "iseat_idbh"),
)
EXTRA = ("rst", "rst_mart", "rst_gairat", "rst_awp", "rst_rwp", "rst_iseat")  # with images that are not in the 10,000
TEACHERS = {"standard_teacher": "standard", "robust_teacher": "pgd_at"}  # for kd_swa: the arm plain's networks
AVERAGING = ("pgd_at_swa", "seat", "ar_at_swa", "iseat_swa")  # methods that are an average: in the plain arm only
FINETUNED = (
    *("pgd_at", "awp", "input_smoothing", "iseat_finetune", "lsi_finetune", "trades_awp_finetune"),
    *("kl_uniform", "squared_l2_uniform", "squared_l2_top", "iseat_eq7"),
)
STUDIES: dict[str, dict[str, Any]] = {
    "pgd_at_nmse, clean warm-up": {"warmup": 1 / 12},
    "piat_nmse, clean warm-up": {"warmup": 1 / 12},
    "pgd_at_nmse, learning rate 0.02": {"learning_rate": 0.02},
    "mart_awp, clean warm-up": {"warmup": 1 / 12},
    "mart_awp, learning rate 0.02": {"learning_rate": 0.02},
    "mart, clean warm-up": {"warmup": 1 / 12},
    "mart, learning rate 0.02": {"learning_rate": 0.02},
    "piat_mart, clean warm-up": {"warmup": 1 / 12},
    "trades, learning rate 0.02": {"learning_rate": 0.02},
    "trades, beta 2": {"objective": ("trades", {"beta": 2.0})},
    "piat, fixed 0.3": {"interpolation": {"weight": 0.3}},
    "piat, n to 120": {"interpolation": {"scale_n": 120}},
    "piat, every 5 steps": {"interpolation": {"period": 5}},
    **{f"{method}, x3": {"times": 3} for method in ("pgd_at", "piat", "trades", "mart", "awp", "ar_at", "iseat")},
    "piat_nmse, clean warm-up, x3": {"warmup": 1 / 12, "times": 3},
}
ARMS = {
    "plain": (*METHODS, *EXTRA, *AVERAGING),
    "averaged": (*METHODS, *EXTRA),
    "finetune": FINETUNED,
    "studies": tuple(STUDIES),
}
SIZES = {  # per data set: epsilon, batch, epochs, width of small_cnn, images of the closing PGD-50
    "digits": (0.2, 64, 15, 8, None),
    "fashion-mnist": (0.1, 128, 4, 8, 2000),
}
SMOOTHING, DECAY = 0.1, 0.99
READING = """Accuracies are per cent of the test images, mean ± sample deviation over seeds; robust is PGD-50 with one
random start. Best is chosen by PGD-10 on held-out training images. "Over PGD-AT" is the difference of the best
checkpoints' robust accuracy from PGD-AT's on the same terms, seed by seed: mean and deviation of the differences.
"s" is seconds a step, the least of the seeds', since the runs shared the machine. Raw rows: methods-rows.jsonl."""


@dataclass(frozen=True)
class Job:
    """One run."""

    data: str
    source: str
    arm: str
    method: str
    seed: int
    train_images: int | None
    work: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a row is found by."""
        return (self.data, self.arm, self.method, self.seed)


def plain(recipe: Any, epochs: int, batch: int) -> Any:
    """The recipe's method under the common schedule."""
    from holdfast.recipe import SGD
    from holdfast.schedule import piecewise

    return replace(
        recipe,
        optimizer=SGD(learning_rate=0.1, weight_decay=5e-4),
        schedule=piecewise((0, 1), (0.5, 0.1), (0.75, 0.01)),
        epochs=epochs,
        batch_size=batch,
        warmup=0.0,
        label_smoothing=0.0,
    )


def averaged(recipe: Any, epochs: int, batch: int) -> Any:
    """The same with one cycle, label smoothing and an EMA."""
    from holdfast.averages.ema import EMA
    from holdfast.schedule import one_cycle

    return replace(
        plain(recipe, epochs, batch),
        schedule=one_cycle(),
        label_smoothing=SMOOTHING,
        averages=(*recipe.averages, EMA(decay=DECAY)),
    )


def finetuned(method: str, epsilon: float, epochs: int, batch: int) -> Any:
    """Half as many epochs more at a tenth of the learning rate, by one row of the ISEAT paper's tables."""
    from holdfast.objectives.logit_stability import LogitStability
    from holdfast.recipe import SGD
    from holdfast.recipes import RECIPES
    from holdfast.schedule import piecewise

    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "input_smoothing": lambda: {"views": ()},
        "kl_uniform": lambda: {"objective": LogitStability(strength=0.1, weights="uniform", distance="kl")},
        "squared_l2_uniform": lambda: {"objective": LogitStability(strength=0.1, weights="uniform")},
        "squared_l2_top": lambda: {"objective": LogitStability(strength=0.1, weights="top")},
    }
    recipe = RECIPES[method if method in RECIPES else "iseat_finetune"](epsilon=epsilon)
    return replace(
        recipe,
        **changes.get(method, dict)(),
        optimizer=SGD(learning_rate=0.01, weight_decay=5e-4),
        schedule=piecewise((0, 1), (0.5, 0.1)),
        epochs=max(1, epochs // 2),
        batch_size=batch,
    )


def studied(name: str, epsilon: float, epochs: int, batch: int) -> Any:
    """A method of the arm plain with one thing changed."""
    from holdfast.averages.interpolation import Interpolation
    from holdfast.components import OBJECTIVES
    from holdfast.recipes import RECIPES

    changes = dict(STUDIES[name])
    recipe = plain(RECIPES[name.partition(",")[0]](epsilon=epsilon), epochs * changes.pop("times", 1), batch)
    if "learning_rate" in changes:
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=changes.pop("learning_rate")))
    if "objective" in changes:
        kind, settings = changes.pop("objective")
        recipe = replace(recipe, objective=OBJECTIVES[kind](**settings))
    if "interpolation" in changes:
        recipe = replace(recipe, averages=(Interpolation(**changes.pop("interpolation")),))
    return replace(recipe, **changes)


def adapted(recipe: Any, job: Job) -> Any:
    """What a method cannot take from the common terms: replays, teachers, averages that are not its point here."""
    from holdfast.further_network import FurtherNetwork

    if job.method == "free_at":  # as many optimiser steps as the others
        replays = min(recipe.step.replays, recipe.epochs)
        step = replace(recipe.step, replays=replays)
        return replace(recipe, step=step, epochs=max(1, round(recipe.epochs / replays)))
    if job.method == "kd_swa":
        networks = {
            name: FurtherNetwork(init=str(plain_run(job, method)), trained=False) for name, method in TEACHERS.items()
        }
        kept = recipe.averages if job.arm == "plain" else recipe.averages[1:]  # the EMA takes SWA's place
        return replace(recipe, networks=networks, averages=kept)
    if job.arm == "averaged" and job.method in ("liet", "idbh"):
        return replace(recipe, averages=recipe.averages[-1:])  # their own EMA is the arm's
    return recipe


def plain_run(job: Job, method: str) -> Path:
    """The folder of the arm plain's run of a method with this job's seed; trained if it is not there."""
    folder = Path(job.work) / job.data / "plain" / method / str(job.seed)
    if not (folder / "summary.json").exists():
        own = replace(job, arm="plain", method=method, work=str(Path(job.work) / f"for-{job.arm}-{job.method}"))
        folder = Path(own.work) / own.data / "plain" / method / str(own.seed)
        if not (folder / "summary.json").exists():
            train(own, folder)
    return folder


def build(job: Job) -> Any:
    """The recipe of a run."""
    return adapted(common(job), job)


def common(job: Job) -> Any:
    """The recipe under the arm's terms."""
    from holdfast.recipes import RECIPES

    epsilon, batch, epochs, _, _ = SIZES[job.data]
    if job.arm == "studies":
        return studied(job.method, epsilon, epochs, batch)
    if job.arm == "finetune":
        return finetuned(job.method, epsilon, epochs, batch)
    return {"plain": plain, "averaged": averaged}[job.arm](RECIPES[job.method](epsilon=epsilon), epochs, batch)


def extra_images(job: Job, data: Any) -> str:
    """The training images beyond the first ones, without labels, as a file."""
    import numpy

    file = Path(job.work) / f"{job.data}-beyond-{job.train_images}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.stem}-{job.method}-{job.seed}.npz")  # two runs may write at once
        numpy.savez(part, x=data.train.pixels[job.train_images :].squeeze(-1).numpy())
        part.replace(file)
    return str(file)


def train(job: Job, out: Path) -> Any:
    """Train and evaluate in this folder; the recipe and what `fit` returns."""
    import torch

    from holdfast.data.sources import load
    from holdfast.runs.memory import keep_freed_memory
    from holdfast.setup import Settings
    from holdfast.train import fit

    torch.set_num_threads(1)
    keep_freed_memory()
    whole = data = load(job.source)
    if job.train_images is not None:
        data = replace(data, train=data.train.subset(torch.arange(job.train_images)))
    _, _, _, width, tested = SIZES[job.data]
    recipe = build(job)
    settings = Settings(validation_images=500, validation_steps=10, test_images=tested, test_steps=50)
    if recipe.extra_share:
        labels = str(plain_run(job, "standard"))
        settings = replace(settings, extra_data=extra_images(job, whole), extra_labels=labels)
    init = plain_run(job, "pgd_at") if job.arm == "finetune" else None
    shutil.rmtree(out, ignore_errors=True)
    finished = fit(
        recipe, data, "small_cnn", out=out, seed=job.seed, init=init, model_options={"width": width}, settings=settings
    )
    return recipe, finished


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate; one row."""
    out = Path(job.work) / job.data / job.arm / job.method / str(job.seed)
    began = time.monotonic()
    recipe, finished = train(job, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = finished.summary
    row = {
        "data": job.data,
        "arm": job.arm,
        "method": job.method,
        "seed": job.seed,
        **{
            f"{which}_{side}": summary[which][f"{side}_accuracy"]
            for which in ("best", "last")
            for side in ("clean", "robust")
        },
        "best_epoch": summary["best"]["epoch"],
        "n": summary["n"],
        "epochs": recipe.epochs,
        "steps": lines[-1]["step"],
        "seconds_a_step": round(sum(line["seconds"] for line in lines) / lines[-1]["step"], 5),
        "passes_a_step": recipe.passes(),
        "seconds": round(time.monotonic() - began, 1),
    }
    keep = job.arm == "plain" and job.method in ("pgd_at", "standard")
    if not keep:
        shutil.rmtree(out)
    return row


def jobs(asked: argparse.Namespace) -> list[Job]:
    """Runs that are still to be made, every method with one seed before any with the next."""
    name = "digits" if asked.data == "digits" else "fashion-mnist"
    done = {(row["data"], row["arm"], row["method"], row["seed"]) for row in read_rows()}
    wanted = [
        Job(name, asked.data, arm, method, seed, asked.train_images, asked.work)
        for seed in range(asked.seeds)
        for arm in asked.arms
        for method in ARMS[arm]
        if (asked.only is None or method in asked.only) and (method not in EXTRA or asked.train_images is not None)
    ]
    return [job for job in wanted if job.key not in done]


def read_rows() -> list[dict[str, Any]]:
    """All rows so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def spread(values: list[float], sign: str = "") -> str:
    """Mean and sample deviation, in per cent."""
    average = f"{100 * mean(values):{sign}.1f}"
    return f"{average} ± {100 * stdev(values):.1f}" if len(values) > 1 else average


def baseline_of(row: dict[str, Any]) -> tuple[str, str]:
    """Arm and method of the run that a row is compared with: PGD-AT on the same terms."""
    if row["arm"] == "studies":
        return ("studies", "pgd_at, x3") if row["method"].endswith("x3") else ("plain", "pgd_at")
    return row["arm"], "pgd_at"


def table() -> str:
    """The rows as Markdown, a section for every data set and arm."""
    rows = read_rows()
    arms = (__doc__ or "").partition("\n\n")[2].partition("\n\n    ")[0].strip()
    text = ["# Every method on equal terms", "", arms, "", READING, ""]
    for data in dict.fromkeys(row["data"] for row in rows):
        for arm in ARMS:
            own = [row for row in rows if row["data"] == data and row["arm"] == arm]
            if own:
                text += section(data, arm, own, rows)
    return "\n".join(text).rstrip()


def section(data: str, arm: str, rows: list[dict[str, Any]], everything: list[dict[str, Any]]) -> list[str]:
    """One table."""
    epsilon, batch, _, width, _ = SIZES[data]
    usual = next((row for row in rows if row["method"].startswith("pgd_at")), rows[0])
    text = [
        f"## {data}, {arm}",
        "",
        f"Linf {epsilon}, small_cnn of width {width}, batch {batch}, {usual['epochs']} epochs"
        f" ({usual['steps']} steps){' unless x3' if arm == 'studies' else ''}, {rows[0]['n']} test images.",
        "",
        "| method | seeds | clean, best | robust, best | over PGD-AT | clean, last | robust, last | s | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["data"], row["arm"], row["method"], row["seed"]): row for row in everything}
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    for method, own in sorted(by_method.items(), key=lambda item: -mean(row["best_robust"] for row in item[1])):
        clean, robust, last_clean, last_robust = (
            spread([row[key] for row in own]) for key in ("best_clean", "best_robust", "last_clean", "last_robust")
        )
        pairs = [(row, found.get((data, *baseline_of(row), row["seed"]))) for row in own]
        gains = [row["best_robust"] - other["best_robust"] for row, other in pairs if other is not None]
        over = "" if (method == "pgd_at" and arm != "studies") or not gains else spread(gains, sign="+")
        seconds = min(row["seconds_a_step"] for row in own)
        text.append(
            f"| {method} | {len(own)} | {clean} | {robust} | {over} | {last_clean} | {last_robust} | {seconds:.3f} |"
            f" {own[0]['passes_a_step']:g} |"
        )
    return [*text, ""]


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="digits, or the path of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=["plain", "averaged"], choices=ARMS)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--work", default="runs/benchmark-methods")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not asked.table:
        waiting = jobs(asked)
        print(f"{len(waiting)} runs to make", flush=True)
        failed = 0
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(asked.jobs, mp_context=context) as pool:
            running = [pool.submit(run, job) for job in waiting]
            for count, finished in enumerate(as_completed(running), 1):
                if finished.exception() is not None:  # the others' rows are kept
                    failed += 1
                    print(f"{count}/{len(waiting)} failed: {finished.exception()}", flush=True)
                    continue
                row = finished.result()
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{count}/{len(waiting)}", row["data"], row["arm"], row["method"], row["seed"], end=" ")
                print(f"{row['best_clean']:.3f} {row['best_robust']:.3f} {row['seconds']:.0f} s", flush=True)
                if not math.isfinite(row["best_robust"]):
                    failed += 1
        if failed:
            raise SystemExit(f"{failed} runs gave no result")
    TABLE.write_text(table() + "\n")
    print(TABLE)


if __name__ == "__main__":
    main()
