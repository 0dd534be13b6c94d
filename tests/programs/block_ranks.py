"""A block with SyncBN on two ranks against the whole batch on one: `block_ranks.py FOLDER`.

Writes FOLDER/found.pt: by name, what DDP found and what plain modules in float64 found.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from grouped_pointwise_modules import Block, Fused, Shape, described


def gather(vector: Tensor) -> Tensor:
    """[K] of this rank -> [ranks, K]."""
    rows = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, vector.contiguous())
    return torch.stack(rows)


def synchronised(block: Block) -> dict:
    names = ("before", "norm", "after")
    return {
        name: described(getattr(block, name), getattr(block.form, name), gather=gather)
        for name in names
    }


def main(folder: Path) -> None:
    """Three images on rank 0 and two on rank 1."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    block = Block(Shape("inverted", 24, 8, 10, num=5))
    x, residual = block.draw()
    upstream = torch.randn(residual.shape)
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    found = {}
    plain = copy.deepcopy(block).double()
    whole = x.double().requires_grad_()
    want = plain(whole, residual.double())
    want.backward(upstream.double())
    for which in (None, "reference"):
        net = copy.deepcopy(block)
        # SyncBN is described anew in every forward pass: modules keep their parameters.
        ddp = DistributedDataParallel(Synchronised(net, which))
        leaf = x[mine].clone().requires_grad_()
        out = ddp(leaf, residual[mine])
        out.backward(upstream[mine])
        for name, p in net.named_parameters():
            # DDP takes the mean over ranks.
            found[f"{which}: {name}"] = (2 * p.grad, plain.get_parameter(name).grad.float())
        for name, buffer in net.named_buffers():
            if "running" in name:
                found[f"{which}: {name}"] = (buffer, plain.get_buffer(name).float())
        found[f"{which}: x"] = (leaf.grad, whole.grad[mine].float())
        found[f"{which}: out"] = (out.detach(), want[mine].detach().float())
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        named = {f"rank {i}, {k}": v for i, part in enumerate(everyone) for k, v in part.items()}
        torch.save(named, folder / "found.pt")
    dist.destroy_process_group()


class Synchronised(Fused):
    """The op with norms over all ranks."""

    def __init__(self, block: Block, which: str | None) -> None:
        super().__init__(block)
        self.which = which

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.block.fused(x, residual, impl=self.which, **synchronised(self.block))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
