"""The launches of `hardness` and `select_hardest` that triton_offline.py compiles."""

from collections.abc import Iterator

from fastkd.kernels.hardness.gpu import MAX_POOL, RANK_TILE
from fastkd.kernels.hardness.gpu_kernels import rank_kernel, score_kernel
from fastkd.kernels.hardness.inputs import KINDS
from fastkd.kernels.kd_loss.gpu import plan
from triton_offline import Launch

# (criterion, rows, classes, storage type)
CASES = [
    ("kl", 128, 100, "fp32"),
    ("kl", 512, 1000, "fp32"),
    ("kl", 512, 1000, "bf16"),
    ("kl", 512, 21841, "bf16"),
    ("entropy", 512, 1000, "bf16"),
    ("entropy", 512, 21841, "bf16"),
    ("cross_entropy", 512, 1000, "bf16"),
    ("margin", 512, 1000, "bf16"),
]
# Per class: maxima, exponentials, sums, and the terms of the criterion.
OPERATIONS = {"kl": 14, "entropy": 6, "cross_entropy": 4, "margin": 2}


def launches() -> Iterator[Launch]:
    """Every criterion, and the choice from the largest pool that is ranked."""
    for criterion, rows, classes, storage in CASES:
        p = plan(rows, classes, 1)
        constants = {
            "KIND": KINDS.index(criterion), "CLASSES": classes, "s_c": 1, "t_c": 1,
            "ALIGN": min(16, classes & -classes), "ONE_TILE": classes <= p.block_c,
            "BLOCK_R": p.block_r, "BLOCK_C": p.block_c,
        }  # fmt: skip
        labels = "*i64" if criterion in ("cross_entropy", "margin") else f"*{storage}"
        size, both = 2 if storage == "bf16" else 4, 2 if criterion == "kl" else 1
        types = {"s_ptr": f"*{storage}", "t_ptr": f"*{storage}", "y_ptr": labels}
        yield Launch(
            score_kernel,
            f"{criterion} {rows}x{classes} {storage}",
            p.warps,
            constants,
            types={**types, "temperature": "fp32"},
            multiples_of_16=("num_rows",),
            # An odd number of classes leaves rows at odd addresses.
            wide_loads=classes % 2 == 0,
            moved_bytes=both * size * rows * classes + 4 * rows,
            operations=OPERATIONS[criterion] * rows * classes,
        )
    block_r, block_c, warps = RANK_TILE
    yield Launch(
        rank_kernel,
        f"select {MAX_POOL}",
        warps,
        {"BLOCK_R": block_r, "BLOCK_C": block_c},
        types={"index_ptr": "*i64", "num_nan_ptr": "*i64"},
        multiples_of_16=("num_rows", "k"),
        moved_bytes=4 * MAX_POOL + 8 * MAX_POOL // 2,
        # Each score against each other: greater, equal, lower index, count.
        operations=4 * MAX_POOL**2,
    )
