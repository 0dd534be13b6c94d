"""Whether the ranks of a program have the same network."""

import torch
import torch.distributed as dist
from torch import nn

from fastkd.compute.collectives import all_reduce_sum


def same_on_all_ranks(module: nn.Module) -> bool:
    """Whether all parameters and buffers are bitwise those of rank 0."""
    if not dist.is_initialized():
        return True
    num_different = torch.zeros((), device=next(module.parameters()).device)
    for tensor in [*module.parameters(), *module.buffers()]:
        mine = tensor.detach().contiguous().flatten().view(torch.uint8)
        of_rank_0 = mine.clone()
        dist.broadcast(of_rank_0, src=0)
        num_different += (mine != of_rank_0).any()
    return all_reduce_sum(num_different).item() == 0
