"""mAP and a linear probe on two ranks: `transfer_ranks.py FILE`; tests/runs/test_transfer.py
starts it.

FILE becomes a torch.save of what every rank found.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import tiny
import torch
from alike import same_on_all_ranks
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastkd.api import distill
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import open_world
from fastkd.data.batch import Batch
from fastkd.evaluation.evaluate import evaluate
from fastkd.losses.multilabel import BinaryCrossEntropy
from fastkd.models import create_model
from fastkd.models.head import freeze_backbone


class Share:
    """Images that are the scores themselves; this rank's slice of them, none where it is empty."""

    def __init__(self, scores_NC: Tensor, targets_NC: Tensor, part: slice) -> None:
        self.scores_NC, self.targets_NC = scores_NC[part], targets_NC[part]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """In batches of 4."""
        batches = zip(self.scores_NC.split(4), self.targets_NC.split(4), strict=True)
        for scores_NC, targets_NC in batches if len(self.scores_NC) else ():
            yield Batch(scores_NC[:, :, None, None], targets_NC, torch.zeros(len(targets_NC)))


def example() -> tuple[Tensor, Tensor]:
    """23 samples of 6 classes, some labels unknown."""
    generator = torch.Generator().manual_seed(1)
    scores_NC = torch.randn(23, 6, generator=generator)
    targets_NC = (torch.rand(23, 6, generator=generator) < 0.4).float()
    targets_NC[torch.rand(23, 6, generator=generator) < 0.2] = -1
    return scores_NC, targets_NC


def probe() -> dict[str, object]:
    """Two epochs of a linear probe on several labels; what moved."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    labels = (torch.rand(24, 5, generator=generator) < 0.5).float()
    data = TensorDataset(images, labels)
    torch.manual_seed(3)
    student = create_model("resnet8", 5, width=0.5)
    freeze_backbone(student, ["fc"])
    before = {key: value.clone() for key, value in student.state_dict().items()}
    loaders = [DataLoader(data, 4, sampler=DistributedSampler(data)) for _ in range(2)]
    result = distill(
        student,
        None,
        *loaders,
        epochs=2,
        losses=[BinaryCrossEntropy()],
        lr=0.1,
        device="cpu",
        precision="fp32",
        compile="off",
        quiet=True,
    )
    state = result.student.state_dict()
    return {
        "moved": [key for key, value in state.items() if not torch.equal(value, before[key])],
        "alike": same_on_all_ranks(result.student),
        "map": result.metrics["map_last"],
    }


def main(target: Path) -> None:
    """One process for the truth, then two ranks with parts of 23 = 10 + 13 and 23 + 0."""

    def job() -> None:
        with open_world("cpu") as world:
            found = {}
            for first in (10, 23):
                part = [slice(first), slice(first, None)][world.rank]
                share = Share(*example(), part)
                fp32 = Precision("fp32", "cpu")
                found[first] = evaluate(lambda x: x[:, :, 0, 0], share, fp32, world, "multi")
            torch.save(found | {"probe": probe()}, target.with_suffix(f".{world.rank}"))

    codes = tiny.forked(*tiny.as_ranks(2, job), log=target.with_suffix(".log"))
    assert codes == [0, 0], target.with_suffix(".log").read_text()
    torch.save([torch.load(target.with_suffix(f".{rank}")) for rank in (0, 1)], target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
