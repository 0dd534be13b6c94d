"""Words of recipes that train in a second on a CPU."""

__all__ = ["TINY", "TINY_QUICKSTART"]

TINY = (
    "data.name=synthetic",
    "data.train_limit=64",
    "student.width=0.5",
    "batch_size=32",
    "epochs=1",
    "precision=fp32",
    "compile=off",
    "device=cpu",
)
"""One epoch of two steps on synthetic images; the student is one that takes a width."""

TINY_QUICKSTART = ("quickstart", *TINY, "data.image_size=16", "baseline.lrs=")
"""The quickstart's networks on such images, without the student alone."""
