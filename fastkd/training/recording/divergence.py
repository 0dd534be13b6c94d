"""`report.record=kl`: the mean KL of a pool of images, and that of its harder part.

"Understanding the Success of Knowledge Distillation: A Data Augmentation Perspective", equation 4:
r = mean KL of the picked images / mean KL of all of the pool. With a pick, every row of
metrics.jsonl has r over the whole epoch (`pick_ratio`); this has both means, and for runs without
a pick what it would find.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastkd.augment.config import PickConfig
from fastkd.augment.pick import Pick
from fastkd.compute.collectives import all_reduce_sum
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.models.intake import restored_after
from fastkd.training.config import RecordName
from fastkd.training.recording.recording import Recording, Row
from fastkd.training.step import Prepared

__all__ = ["Divergence"]

_SHARE = 0.5
"""Of a pool that nothing is picked from: N / 2 in the paper."""


class Divergence(Recording):
    """Scores what the last steps of an epoch are shown by KL, as the pick does, without picking.

    x' with its teacher's logits where the losses ask for them, else x. The student scores in
    training mode, as it is at that step; its batch statistics are put back.
    """

    name: ClassVar[RecordName] = "kl"

    def __init__(
        self,
        student: nn.Module,
        *,
        view: str,
        temperature: float,
        pick: PickConfig | None,
        precision: Precision,
        world: World,
    ) -> None:
        """view: of which the targets have the teacher's logits. pick: of the run."""
        self.student, self.view, self.world = student, view, world
        self.key = f"{view}/teacher/logits"
        images = pick.images if pick else None
        self.pool = Pick(
            student,
            criterion="kl",
            temperature=temperature,
            images=images,
            share=None if images else (pick.share if pick else _SHARE),
            update_statistics=True,
            precision=precision,
        )
        self._reset()

    def _reset(self) -> None:
        # Batches, sums of their means over all and over the hardest, sum of the ratios; images.
        self.sums_5 = torch.zeros(5, dtype=torch.float64, device=self.world.device)

    @override
    def before_update(self, prepared: Prepared) -> None:
        with restored_after(self.student):
            scores_P = self.pool.scores(prepared.views[self.view], prepared.targets[self.key])
        scores_P = scores_P.double()
        hardest_K = scores_P.sort(descending=True).values[: self.pool.num_chosen(len(scores_P))]
        mean, hard = scores_P.mean(), hardest_K.mean()
        one = mean.new_ones(())
        self.sums_5 += torch.stack([one, mean, hard, hard / mean, one * len(scores_P)])

    @override
    def of_epoch(self, epoch: int, last: Prepared, wait_ms: float) -> Row:
        sums_5: Tensor = self.sums_5
        if self.world.size > 1:
            all_reduce_sum(sums_5)
        batches, mean, hard, ratio, images = sums_5.tolist()
        self._reset()
        return {
            "view": self.view,
            "temperature": self.pool.temperature,
            "images": int(images),
            "kl_all": mean / batches,
            "kl_hardest": hard / batches,
            "ratio": ratio / batches,
        }
