"""KD steps as one rank of a group on a GPU: `gpu_ranks.py BACKEND DEVICE`.

BACKEND is nccl, gloo or fake (eight ranks of which seven exist in name only: shapes and memory).
The rank comes from torchrun's names. Prints a line of JSON; tests/training/test_gpu_ranks.py
starts it.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from alike import same_on_all_ranks
from test_gpu_step import epoch, mean_loss, trainer

from fastkd.compute.collectives import all_reduce_sum, sync_buffers
from fastkd.compute.ranks import World

RANKS_IN_NAME = 8


def main(backend: str, device: torch.device) -> None:
    """Two epochs of four steps."""
    # The workers of this machine share its first GPU.
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=RANKS_IN_NAME, store=FakeStore())
    else:
        dist.init_process_group(backend)
    size = dist.get_world_size()
    world = World(dist.get_rank(), 0, size, device, "nccl" if backend == "nccl" else "gloo")
    made = trainer(device, compiled=os.environ.get("COMPILED") == "1", world=world)
    if size == 1:
        # One rank needs no wrapper; here it is what is tried.
        made.update.runner = DistributedDataParallel(
            made.runner,
            device_ids=[0] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    if backend == "fake":
        made.runner.register_comm_hook(None, echo)
    for number in range(2):
        epoch(made, number, device)
    if backend != "fake":
        all_reduce_sum(made.totals_M)
        # As the trainer does at the end of an epoch: batch statistics are each rank's own.
        sync_buffers(made.step)
    found = {
        "size": size,
        "loss": mean_loss(made),
        "skipped": made.guard.counts()[1],
        "same": backend == "fake" or same_on_all_ranks(made.step),
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "rows": next(made.prepare(0)).views["x"].shape[0],
    }
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def echo(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A bucket as it is: a group in name has nobody to add to it, and DDP wants an answer."""
    buffer = bucket.buffer()
    answer = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    answer.set_result(buffer)
    return answer


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
