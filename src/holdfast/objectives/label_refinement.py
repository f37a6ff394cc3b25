"""SGLR: labels softened by the network's own predictions, remembered for every image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import distributed
from holdfast.distributed import require_rows
from holdfast.errors import HoldfastError
from holdfast.forward import Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress


class LabelRefinement(Objective):
    r"""SGLR: adversarial cross-entropy against labels that the network has refined itself.

    .. math:: \mathrm{CE}(f(x'), \tilde t), \qquad
        \tilde t \leftarrow m\,\tilde t + (1 - m)\bigl(r\,p(x) + (1 - r)\,p(x')\bigr)

    :math:`\tilde t` is kept for every image, begins as its hard label, and is refined from `begin` on; before that the
    loss is plain cross-entropy. No gradient flows into it.

    Args:
        momentum: m in [0, 1).
        clean_share: r in [0, 1]: the clean prediction's part.
        begin: Share of the run after which labels are refined; epoch 90 of 200 in the paper's scripts.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,). Terms: (B,). Buffer: memory (N, K), a row an
        image.
    Units:
        Nats.
    Raises:
        HoldfastError: a share lies outside its range, or the objective is not prepared with the number of images.
            Recipes with MixUp or CutMix are refused: the memory holds labels of single images.
    Source: Li et al., CVPR 2024 (Soften to Defend: Self-Guided Label Refinement), arXiv:2403.09101. Reference code:
        devicerxx/SGLS.
    Differs from the reference: epochs are counted from 0; label smoothing, where a recipe has it, softens the labels
        that the memory begins with.

    Example:
        >>> LabelRefinement(begin=0.5).sides(Progress(step=0, epochs=10))
        ('adv',)
    """

    detached_sides = ("clean",)
    takes_mixed_images = False
    memory: Tensor
    started: Tensor
    written: Tensor

    def __init__(self, *, momentum: float = 0.9, clean_share: float = 0.2, begin: float = 0.45) -> None:
        super().__init__()
        for name, value, most in (("momentum", momentum, 1), ("clean_share", clean_share, 1), ("begin", begin, 1)):
            if not 0 <= value <= most:
                raise HoldfastError(f"{name} is {value}: it is a share, give a number in 0 … 1")
        self.momentum, self.clean_share, self.begin = float(momentum), float(clean_share), float(begin)
        self.register_buffer("memory", torch.zeros(0))
        self.register_buffer("started", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("written", torch.zeros(0, dtype=torch.bool))

    @property
    def is_prepared(self) -> bool:
        return self.memory.numel() > 0

    def prepare(self, model: nn.Module, x: Tensor, images: int = 0) -> None:
        if images < 1:
            raise HoldfastError("SGLR remembers a label for every image: call objective.prepare(model, x, images=N)")
        with torch.no_grad():
            classes = View(model)(x).logits.shape[1]
        self.memory = torch.zeros(images, classes, device=x.device)
        self.started = torch.zeros(images, dtype=torch.bool, device=x.device)
        self.written = torch.zeros_like(self.started)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "clean") if progress.fraction >= self.begin else ("adv",)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv, labels = f.outputs["adv"].logits, f.batch.labels
        if "clean" not in f.outputs:
            return {"adv_ce": cross_entropy(adv, labels)}
        return {"refined_ce": cross_entropy(adv, self.refined(f).to(adv.dtype))}

    @torch.no_grad()
    def refined(self, f: Forward) -> Tensor:
        """The labels of the batch after this step's refinement, (B, K); kept where the step remembers."""
        if f.batch.index is None:
            raise HoldfastError("SGLR remembers a label for every image: give batches their index")
        require_rows("SGLR", f.batch.index, self.memory)
        clean, adv, index = f.outputs["clean"].logits.softmax(1), f.outputs["adv"].logits.softmax(1), f.batch.rows
        given = f.batch.labels if f.batch.target is not None else F.one_hot(f.batch.y, adv.shape[1])
        before = torch.where(self.started[index, None], self.memory[index], given.to(self.memory.dtype))
        predicted = self.clean_share * clean + (1 - self.clean_share) * adv
        after = self.momentum * before + (1 - self.momentum) * predicted.to(before.dtype)
        if f.remember:
            self.memory[index] = after
            self.started[index] = True
            self.written[index] = True
        return after

    def after_epoch(self, progress: Progress) -> None:
        """Every process takes over the labels that the others have refined."""
        self.started |= distributed.total(self.written.float()) > 0
        distributed.merge_rows(self.memory, self.written)
