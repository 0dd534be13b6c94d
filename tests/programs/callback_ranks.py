"""Two ranks of `fastkd.distill` whose rank 0 has an `on_epoch`: `callback_ranks.py DIR`.

Writes DIR/rank0.json and DIR/rank1.json: the rows that it got, and what each rank ended with.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.losses import CrossEntropy

RANK = int(os.environ["RANK"])
DATA = TensorDataset(torch.randn(16, 3, 4, 4), torch.arange(16) % 2)


def main(folder: Path) -> None:
    """One run whose callback only counts, one in which it fails."""
    found = {"rows": [], "raised": ""}

    def fails(row: dict) -> None:
        raise LookupError("no such dashboard")

    loader = DataLoader(DATA, batch_size=4, sampler=range(RANK, 16, 2))
    for on_epoch in (found["rows"].append, fails):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        try:
            fastkd.distill(
                student,
                None,
                loader,
                loader,
                epochs=2,
                losses=[CrossEntropy()],
                device="cpu",
                compile="off",
                precision="fp32",
                quiet=True,
                # Only rank 0 has a logger, as is usual.
                on_epoch=on_epoch if RANK == 0 else None,
            )
        except Exception as error:
            found["raised"] = f"{type(error).__name__}: {error}"
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
