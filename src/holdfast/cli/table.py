"""What the command can do, as plain text: `holdfast --help` and `holdfast list` import nothing heavier than this.

A test compares it with the real recipes, attacks and parsers.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "demo": "train three models on the built-in digits, attack them, and show what robustness is (two minutes)",
    "train": "train a robust classifier by a recipe, on your images or a known data set",
    "evaluate": "attack a trained model and say how well it holds, with an interval",
    "list": "list recipes, models, attacks or data sources",
    "doctor": "check the environment and time one training step here",
}

RECIPES: dict[str, str] = {
    "standard": "cross-entropy on clean images: the undefended baseline",
    "pgd_at": "PGD-AT: cross-entropy on PGD-10 images (Madry et al.; schedule of Rice et al.)",
    "pgd_at_wa": "PGD-AT with weight averaging, label smoothing and one cycle: the baseline that counts",
    "pgd_at_nmse": "PGD-AT with NMSE: aligns normalised clean and adversarial logits",
    "piat": "PIAT: PGD-AT with parameters interpolated between epochs",
    "piat_nmse": "PIAT + NMSE: the paper's full method",
}

ATTACKS: dict[str, str] = {
    "fgsm": "one step uphill (Linf, L2)",
    "pgd": "projected gradient descent (Linf, L2), with restarts and per-image early stop",
}

LISTS = ("recipes", "models", "attacks", "data")
