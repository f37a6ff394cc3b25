"""Does each paper's ordering against PGD-AT and TRADES hold in our comparison?

Reads docs/results/methods-rows.jsonl (arm averaged, or plain for methods that are an average themselves) and writes
docs/results/orderings.md: for every method a sentence with the published robust accuracies of one table, and with our
differences, seed by seed. Run it after benchmarks/methods.py:

    python benchmarks/orderings.py
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from methods import RESULTS, read_rows

PAGE = RESULTS / "orderings.md"
DATA = {"digits": "the digits", "fashion-mnist": "Fashion-MNIST"}

# Published robust accuracies in per cent, each table by itself: networks, epochs and radii differ between them.
PIAT_RN18 = {"pgd_at": 46.3, "trades": 48.0, "mart": 47.5, "piat": 47.1, "piat_nmse": 48.8, "pgd_at_nmse": 46.6}
PIAT_RN18 |= {"alp": 46.1}
PIAT_WRN = {"pgd_at": 47.8, "trades": 50.4, "piat_trades": 53.7, "piat_mart": 52.8, "piat_gairat": 44.2}
AR_AT_RN18 = {"pgd_at": 42.4, "trades": 48.5, "ar_at": 49.0, "lbgat": 48.9}
ISEAT_WRN = {"pgd_at": 53.4, "trades": 53.4, "iseat": 56.5, "awp": 54.0, "gairat": 40.3, "fat": 47.5, "rwp": 54.6}
ISEAT_WRN |= {"mart_awp": 54.2, "las_at": 53.6, "las_awp": 55.5}
ISEAT_EXTRA = {"rst": 59.5, "rst_mart": 56.3, "rst_gairat": 59.6, "rst_awp": 60.1, "rst_rwp": 60.4, "rst_iseat": 61.6}
IDBH_PRN18 = {"pgd_at": 48.2, "trades": 49.0, "idbh": 50.7, "idbh_awp": 52.3, "kd_swa": 49.9}
CURE_RN18 = {"pgd_at": 44.6, "trades": 48.4, "stat": 50.5}
CURE_PGD = {"pgd_at": 55.1, "trades": 56.8, "slore_mart": 59.1}
NUAT_RN18 = {"pgd_at": 48.8, "trades": 49.1, "fast_at": 43.1, "free_at": 40.2, "gat": 47.3, "nuat": 49.2}
FAST_AT = {"pgd_at": 50.5, "n_fgsm": 47.8, "fgsm_pgi": 49.9, "liet": 50.0}
ROBUSTBENCH = {"trades": 53.1, "ikl": 57.1, "trades_awp": 56.2, "fat_trades": 53.5}
TABLES: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("PIAT's table 2, ResNet-18, AutoAttack", PIAT_RN18),
    ("PIAT's table 2, WRN-32-10, AutoAttack", PIAT_WRN),
    ("AR-AT's table 3, ResNet-18, AutoAttack, last epoch", AR_AT_RN18),
    ("ISEAT's table 2, WRN-34-10, AutoAttack", ISEAT_WRN),
    ("ISEAT's table 2, WRN-28-10 with 500,000 images, AutoAttack", ISEAT_EXTRA),
    ("IDBH's tables, PreActResNet-18, AutoAttack", IDBH_PRN18),
    ("CURE's table 1, ResNet-18, AutoAttack", CURE_RN18),
    ("ISEAT's table 5 and CURE's table 1, WRN-34-10, PGD-20", CURE_PGD),
    ("NuAT's table, ResNet-18, AutoAttack", NUAT_RN18),
    ("the fast-AT benchmark, ResNet-18 with averaging, AutoAttack", FAST_AT),
    ("RobustBench, WRN-34-10, AutoAttack", ROBUSTBENCH),
)
PARTNERS = {"rst": ("trades",), **dict.fromkeys(list(ISEAT_EXTRA)[1:], ("rst",))}  # compared with: PGD-AT and TRADES
UNPUBLISHED = {
    "asym_trades": "no published number",
    "ovr_style": "our own reading, no published number",
    "ar_at_awp": "new here",
    "ar_at_piat": "new here",
    "iseat_piat": "new here",
    "consistency": "published on other networks and by the last epoch only in tables that we know",
    "sglr": "published on another network than its table's PGD-AT",
    "score": "published with generated images only",
    "fat_mart": "no AutoAttack number known",
    "iseat_idbh": "published without PGD-AT in its table",
}

MASKED = " PGD flatters it: its gradients are masked. The published number is AutoAttack's, which is not here yet."
CAUTIONS = dict.fromkeys(("gairat", "piat_gairat", "rst_gairat"), MASKED)


def published(method: str, other: str) -> tuple[str, float] | None:
    """A table that holds both, and the published difference in points."""
    for name, table in TABLES:
        if method in table and other in table:
            return name, table[method] - table[other]
    return None


def word(differences: list[float]) -> str:
    """Above, below, or level: within the spread of the seeds."""
    if not differences:
        return "not run"
    centre = mean(differences)
    spread = stdev(differences) if len(differences) > 1 else 0.0
    if abs(centre) <= max(spread, 0.5):
        return "level"
    return "above" if centre > 0 else "below"


def figures(differences: list[float]) -> str:
    """Mean and sample deviation."""
    if len(differences) < 2:
        return f"{mean(differences):+.1f} (one seed)" if differences else "not run"
    return f"{mean(differences):+.1f} ± {stdev(differences):.1f}"


def differences(rows: Mapping[tuple[str, str, int], Any], data: str, method: str, other: str) -> list[float]:
    """Robust accuracy of the best checkpoints over the other's, in points, seed by seed."""
    pairs = [(row, rows.get((data, other, seed))) for (d, m, seed), row in rows.items() if (d, m) == (data, method)]
    return [100 * (row["best_robust"] - base["best_robust"]) for row, base in pairs if base is not None]


def sentence(rows: Mapping[tuple[str, str, int], Any], method: str) -> str:
    """What the paper's table says, what we see, and whether the two agree."""
    parts = []
    for other in PARTNERS.get(method, ("pgd_at", "trades")):
        if other == method:
            continue
        known = published(method, other)
        claim = ""
        if known is not None:
            centre = known[1]
            claim = "level with" if abs(centre) < 0.5 else ("above" if centre > 0 else "below")
            claim = f"published {claim} `{other}` ({centre:+.1f}; {known[0]}); "
        seen, verdicts = [], []
        for data, where in DATA.items():
            found = differences(rows, data, method, other)
            if found:
                seen.append(f"{word(found)} on {where} ({figures(found)})")
                verdicts.append(word(found))
        if not seen:
            continue
        verdict = ""
        if known is not None:
            expected = claim.removeprefix("published ").partition(" ")[0]
            agree = [seen_word == expected for seen_word in verdicts]
            verdict = ": holds" if all(agree) else (": holds in part" if any(agree) else ": does not hold here")
        parts.append(f"{claim}over `{other}` here {', '.join(seen)}{verdict}")
    note = f" ({UNPUBLISHED[method]})" if method in UNPUBLISHED else ""
    return f"* **`{method}`**{note}: {'; '.join(parts) if parts else 'not run'}.{CAUTIONS.get(method, '')}"


def main() -> None:
    """Write the page."""
    rows = {(r["data"], r["method"], r["seed"]): r for r in read_rows() if r["arm"] == "averaged"}
    methods = [m for m in dict.fromkeys(method for _, method, _ in rows) if m not in ("pgd_at", "standard")]
    text = [
        "# The papers' orderings, and ours",
        "",
        "Robust accuracy of the best checkpoint in the arm `averaged` of [methods.md](methods.md), minus PGD-AT's and",
        "TRADES' on the same terms: mean and sample deviation over seeds, in points. Ours is PGD-50, theirs mostly",
        "AutoAttack on far larger networks and longer runs. Level means within the seeds' spread, or half a point.",
        "Written by `python benchmarks/orderings.py`.",
        "",
        *(sentence(rows, method) for method in methods),
    ]
    PAGE.write_text("\n".join(text) + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
