"""The rows that one attack is working on, which may be dropped, added and reordered between any two passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.stepwise import Rows, State, join, take


@dataclass
class Work:
    """The rows that are being worked on."""

    state: State
    rows: Rows
    job: Tensor  # the place in the list of jobs
    image: Tensor  # the place in the unit
    restart: Tensor
    age: Tensor  # passes made, on the CPU: no wait is needed to know which rows end
    precise: Tensor  # near the boundary: no low precision any more
    mixed: bool = False  # whether there are such rows, as far as the last look saw
    claim: Tensor | None = None  # the best misclassified point since the last look
    claimed: Tensor | None = None  # how good it is (lower is better); infinite: none

    def take(self, index: Tensor) -> Work:
        """Some of the rows."""
        return Work(
            state=take(self.state, index),
            rows=self.rows.take(index),
            job=self.job[index],
            image=self.image[index],
            restart=self.restart[index],
            age=self.age[index.cpu()],
            precise=self.precise[index],
            mixed=self.mixed,
            claim=None if self.claim is None else self.claim[index],
            claimed=None if self.claimed is None else self.claimed[index],
        )

    def join(self, other: Work) -> Work:
        """These rows and then the others."""
        claims = None if self.claim is None or other.claim is None else torch.cat([self.claim, other.claim])
        claimed = None if self.claimed is None or other.claimed is None else torch.cat([self.claimed, other.claimed])
        return Work(
            state=join([self.state, other.state]),
            rows=Rows(*(torch.cat(pair) for pair in zip(self.rows, other.rows, strict=True))),
            job=torch.cat([self.job, other.job]),
            image=torch.cat([self.image, other.image]),
            restart=torch.cat([self.restart, other.restart]),
            age=torch.cat([self.age, other.age]),
            precise=torch.cat([self.precise, other.precise]),
            mixed=self.mixed or other.mixed,
            claim=claims,
            claimed=claimed,
        )
