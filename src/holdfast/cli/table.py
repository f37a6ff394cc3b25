"""What the command can do, as plain text: `holdfast --help` and `holdfast list` import nothing heavier than this.

A test compares it with the real recipes, attacks and parsers.
"""

from __future__ import annotations

from typing import NamedTuple

COMMANDS: dict[str, str] = {
    "demo": "train three models on the built-in digits, attack them, and show what robustness is (two minutes)",
    "train": "train a robust classifier by a recipe, on your images or a known data set",
    "evaluate": "attack a trained model and say how well it holds: AutoAttack, with a ledger and flags",
    "verify": "recount an evaluation's verdict from its saved images alone",
    "compare": "compare two evaluated models on the same images, with an interval and McNemar's test",
    "export": "write an AutoAttack-standard evaluation as an entry of a leaderboard",
    "list": "list recipes, models, attacks or data sources",
    "doctor": "check the environment and time one training step here",
}


class RecipeLine(NamedTuple):
    """A line of `holdfast list recipes`. Cost is a step's forward passes over PGD-AT's, once everything is on."""

    cost: float
    paper: str
    what: str


_MADRY = "Madry et al. 2018"
_PIAT = "PIAT, arXiv:2303.13955"
_AR_AT = "AR-AT, arXiv:2402.14648"
_ISEAT = "ISEAT, Li and Spratling"
_AWP = "AWP, arXiv:2004.05884"
_LAS = "LAS-AT, arXiv:2203.06616"
_IDBH = "IDBH, arXiv:2301.09879"
_RST = "RST, arXiv:1905.13736"

RECIPES: dict[str, RecipeLine] = {
    "standard": RecipeLine(0.13, "-", "cross-entropy on clean images: the undefended baseline"),
    "pgd_at": RecipeLine(1.0, f"{_MADRY}; Rice et al. 2020", "cross-entropy on PGD-10 images"),
    "pgd_at_wa": RecipeLine(
        1.0, "arXiv:2604.22853", "averaged weights, soft labels, one cycle: the baseline that counts"
    ),
    "pgd_at_swa": RecipeLine(1.0, "Chen et al. 2021", "PGD-AT, weights averaged over the later epochs"),
    "seat": RecipeLine(1.0, "SEAT, arXiv:2203.09678", "PGD-AT, weights averaged at every step"),
    "alp": RecipeLine(1.13, "ALP, arXiv:1803.06373", "clean and adversarial logits are made equal"),
    "trades": RecipeLine(1.17, "TRADES, arXiv:1901.08573", "adversarial predictions are drawn to clean ones"),
    "asym_trades": RecipeLine(1.17, f"{_AR_AT}; our reading", "TRADES that leaves the clean prediction alone"),
    "mart": RecipeLine(1.13, "MART, Wang et al. 2020", "boosted cross-entropy; the pull is weighted by clean mistakes"),
    "score": RecipeLine(1.17, "SCORE, arXiv:2202.10103", "squared distances of probabilities, not entropies"),
    "awp": RecipeLine(1.13, _AWP, "PGD-AT at weights perturbed uphill"),
    "rwp": RecipeLine(2.3, "RWP, arXiv:2205.14826", "AWP in ten steps, on images with small loss"),
    "trades_awp": RecipeLine(1.43, _AWP, "TRADES at weights perturbed uphill"),
    "mart_awp": RecipeLine(1.39, _AWP, "MART at weights perturbed uphill"),
    "pgd_at_nmse": RecipeLine(1.13, _PIAT, "PGD-AT with NMSE: clean and adversarial logits point the same way"),
    "piat": RecipeLine(1.0, _PIAT, "PGD-AT with parameters interpolated between epochs"),
    "piat_nmse": RecipeLine(1.13, _PIAT, "PIAT + NMSE: the paper's full method"),
    "piat_trades": RecipeLine(1.17, _PIAT, "PIAT around TRADES"),
    "piat_mart": RecipeLine(1.13, _PIAT, "PIAT around MART"),
    "ar_at": RecipeLine(1.13, _AR_AT, "adversarial features are drawn to clean ones that stand still; split BatchNorm"),
    "ar_at_swa": RecipeLine(1.13, _AR_AT, "AR-AT, weights averaged late, both BatchNorm branches re-estimated"),
    "ar_at_awp": RecipeLine(1.26, "new", "AR-AT at weights perturbed uphill"),
    "ar_at_piat": RecipeLine(1.13, "new", "AR-AT with parameters interpolated between epochs"),
    "iseat": RecipeLine(1.26, _ISEAT, "logits stay put under input and weight perturbation, by vulnerability"),
    "iseat_swa": RecipeLine(1.26, _ISEAT, "ISEAT, weights averaged over the later epochs"),
    "iseat_svhn": RecipeLine(1.26, _ISEAT, "ISEAT as on SVHN: epsilon grows at first"),
    "iseat_finetune": RecipeLine(1.26, _ISEAT, "ISEAT (LSIW) as 40 epochs of fine-tuning: tables 7 to 9; needs --init"),
    "lsi_finetune": RecipeLine(1.39, _ISEAT, "its ablation LSI: stability at unperturbed weights; needs --init"),
    "trades_awp_finetune": RecipeLine(1.26, _ISEAT, "its ablation TRADES-AWP with squared L2; needs --init"),
    "iseat_eq7": RecipeLine(1.13, _ISEAT, "its eq. (7): stability for the most vulnerable tenth; needs --init"),
    "iseat_piat": RecipeLine(1.26, "new", "ISEAT with parameters interpolated between epochs"),
    "fat": RecipeLine(1.0, "FAT, arXiv:2002.11242", "PGD-AT whose attack stops soon after it has succeeded"),
    "fat_trades": RecipeLine(1.17, "FAT, arXiv:2002.11242", "FAT around TRADES"),
    "fat_mart": RecipeLine(1.13, "FAT, arXiv:2002.11242", "FAT around MART"),
    "gairat": RecipeLine(1.0, "GAIRAT, arXiv:2010.01736", "images that the attack flips early weigh more"),
    "piat_gairat": RecipeLine(1.0, _PIAT, "PIAT around GAIRAT"),
    "ovr_style": RecipeLine(1.0, "SOVR, arXiv:2207.10283; our reading", "one-vs-the-rest loss for small margins"),
    "slore_mart": RecipeLine(
        1.13, "LOAT, arXiv:2403.17520", "MART; clean probabilities shaped in first and last epochs"
    ),
    "lbgat": RecipeLine(
        1.17, "LBGAT, arXiv:2011.11164", "adversarial logits drawn to those of a clean network beside it"
    ),
    "kd_swa": RecipeLine(
        1.09, "Chen et al. 2021", "distillation from two teachers, with SWA; needs both teachers' runs"
    ),
    "sglr": RecipeLine(1.04, "SGLR, arXiv:2403.09101", "labels softened by remembered predictions"),
    "consistency": RecipeLine(2.0, "Tack et al., arXiv:2103.04623", "two attacked augmentations must agree"),
    "stat": RecipeLine(3.0, "STAT, arXiv:2205.11156", "outermost of clean, collaborative, adversarial drawn together"),
    "ikl": RecipeLine(1.0, "IKL, arXiv:2305.13948", "KL taken apart and weighted by class, with AWP; epsilon grows"),
    "las_at": RecipeLine(0.97, _LAS, "a strategy network learns how strongly to attack each image"),
    "las_awp": RecipeLine(1.41, _LAS, "LAS-AT around AWP"),
    "free_at": RecipeLine(
        0.13, "Free-AT, arXiv:1904.12843", "each batch 8 times, at this cost each; one backward serves both"
    ),
    "fast_at": RecipeLine(0.22, "Fast-AT, arXiv:2001.03994", "one step from a random start (FGSM-RS)"),
    "n_fgsm": RecipeLine(0.22, "N-FGSM, arXiv:2202.01181", "one step from strong noise, not projected"),
    "gat": RecipeLine(0.39, "GAT, arXiv:2011.14969", "one step guided by the distance of probabilities"),
    "nuat": RecipeLine(0.39, "NuAT, NeurIPS 2021", "one step with the nuclear norm of logit changes"),
    "fgsm_pgi": RecipeLine(0.35, "FGSM-PGI, arXiv:2207.08859", "one step from each image's earlier perturbation"),
    "liet": RecipeLine(0.35, "LIET, ICCV 2025", "one step from a start that mixes noise and class patterns"),
    "idbh": RecipeLine(1.0, _IDBH, "PGD-AT with harder and more varied augmentation"),
    "idbh_awp": RecipeLine(1.13, _IDBH, "AWP with that augmentation"),
    "iseat_idbh": RecipeLine(1.26, _ISEAT, "ISEAT with that augmentation"),
    "rst": RecipeLine(1.17, _RST, "TRADES with extra images, half of each batch; needs them"),
    "rst_mart": RecipeLine(1.13, "MART, Wang et al. 2020", "MART with extra images; needs them"),
    "rst_gairat": RecipeLine(1.0, "GAIRAT, arXiv:2010.01736", "GAIRAT with extra images; needs them"),
    "rst_awp": RecipeLine(1.43, _AWP, "RST at weights perturbed uphill; needs extra images"),
    "rst_rwp": RecipeLine(3.78, "RWP, arXiv:2205.14826", "RST with RWP; needs extra images"),
    "rst_iseat": RecipeLine(1.26, _ISEAT, "ISEAT with extra images; needs them"),
    "dm_at": RecipeLine(
        1.17, "DM-AT, arXiv:2302.04638", "TRADES with generated images, 7 of 10 in each batch; needs them"
    ),
}

ATTACKS: dict[str, str] = {
    "fgsm": "one step uphill (Linf, L2)",
    "pgd": "projected gradient descent (Linf, L2), with restarts and per-image early stop",
    "collaborative_pgd": "STAT's search for a less and a more certain image at once (Linf, L2); for training",
    "prior_guided_fgsm": "FGSM-PGI's step from a remembered perturbation (Linf); for training",
    "class_start_fgsm": "LIET's step from noise and class patterns (Linf); for training",
}

LISTS = ("recipes", "models", "attacks", "data")
