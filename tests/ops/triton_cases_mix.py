"""The launches of `mix` that triton_offline.py compiles."""

from collections.abc import Iterator

from fastkd.kernels.mix.gpu import plan
from fastkd.kernels.mix.gpu_kernels import mix_kernel
from triton_offline import Launch

BYTES = {"u8": 1, "bf16": 2, "fp32": 4}
# (what, side, from, to, channels-last from, to)
CASES = [
    ("normalise", 224, "u8", "bf16", True, True),
    ("cutmix", 32, "u8", "bf16", True, True),
    ("cutmix", 224, "u8", "bf16", True, True),
    ("cutmix", 224, "u8", "fp32", True, True),
    ("cutmix", 224, "u8", "bf16", False, False),
    ("cutmix", 224, "u8", "bf16", False, True),
    ("mixup", 224, "u8", "bf16", True, True),
    ("cutmix", 224, "bf16", "bf16", True, True),
    ("mixup", 224, "bf16", "bf16", True, True),
    ("cutout", 224, "bf16", "bf16", True, True),
]


def launches() -> Iterator[Launch]:
    """Three channels; one box or lam for the batch, partners by index, as the trainer does it."""
    for what, side, source, target, source_last, target_last in CASES:
        p = plan(side, side * (3 if target_last else 1), BYTES[source], BYTES[target])
        layouts = " -> ".join("NHWC" if last else "NCHW" for last in (source_last, target_last))
        three, sources, pixels = ("fp32",) * 3, 2 if what == "mixup" else 1, 64 * 3 * side * side
        yield Launch(
            mix_kernel,
            f"{what} {side}px {source} -> {target}, {layouts}",
            p.warps,
            {
                "PARTNER": what in ("cutmix", "mixup"), "INDEX": what in ("cutmix", "mixup"),
                "BOXES": what in ("cutmix", "cutout"), "BLEND": what == "mixup",
                "NORMALIZE": "multiply" if source == "u8" else "",
                "SOURCE_LAST": source_last, "TARGET_LAST": target_last,
                "C": 3, "H": side, "W": side, "VEC": p.vec, "GROUPS": p.groups,
            },
            types={
                "images_ptr": f"*{source}", "partners_ptr": f"*{source}", "out_ptr": f"*{target}",
                "index_ptr": "*i64", "boxes_ptr": "*i64", "lam_ptr": "*fp64",
                "mean": three, "std": three, "rest": three,
            },
            # Where the layouts differ the bytes of a vector come from different planes.
            wide_loads=source_last == target_last,
            tile=("GROUPS", "VEC"),
            fp_fusion=False,
            # A batch of 64; each element of a CutMix comes from one of its sources.
            moved_bytes=pixels * (BYTES[target] + BYTES[source] * sources),
            operations=pixels * (3 * (source == "u8") * sources + 3 * (what == "mixup") + 1),
        )  # fmt: skip
