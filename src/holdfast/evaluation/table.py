"""The attacks of an evaluation by name, as plain text: this imports nothing."""

from __future__ import annotations

UPPER_BOUND = "upper bound, not AutoAttack-standard"
PROTOCOLS: dict[str, str] = {
    "autoattack": "AutoAttack-standard: APGD-CE, APGD-T, FAB-T, Square (Linf, L2, L1)",
    "autoattack-plus": "AutoAttack-plus: five restarts, untargeted FAB and DLR besides",
    "autoattack-rand": "AutoAttack-rand, for defences that draw: APGD-CE and APGD-DLR on averaged gradients",
    "quick": f"APGD-CE, then APGD-T on what is left; {UPPER_BOUND}",
}
SINGLE: dict[str, str] = {
    "fgsm": "one step of length epsilon (Linf, L2)",
    "pgd": "projected gradient descent with restarts (Linf, L2)",
    "mim": "the momentum iterative method (Linf, L2)",
    "cw": "Linf: PGD on the margin, as papers' tables use it; L2: Carlini and Wagner's minimum-norm attack",
    "apgd-ce": "Auto-PGD on the cross-entropy (Linf, L2, L1)",
    "apgd-dlr": "Auto-PGD on the difference of logits ratio (Linf, L2, L1)",
    "apgd-t": "Auto-PGD on the targeted DLR loss, nine targets, L1 five (Linf, L2, L1)",
    "fab": "the fast adaptive boundary attack, minimum norm (Linf, L2, L1)",
    "fab-t": "FAB towards nine targets (Linf, L2, L1)",
    "square": "random search by squares, black box, 5,000 queries (Linf, L2, L1)",
    "multitargeted": "PGD on the difference to each of nine targets (Linf, L2)",
    "transfer": "PGD images of another run, given by --source (Linf, L2)",
    "noise": "100 uniform points of the ball: a control (Linf, L2, L1)",
}
