"""The recipe that `fastkd train` runs without arguments: handwritten digits, no download.

300 training images at 16x16, a teacher with 0.7 M parameters, a student with 5 k. The student
alone gets the same budget and the best of three learning rates.
"""

from fastkd.recipes.entry import Entry

__all__ = ["recipes"]


def recipes() -> dict[str, Entry]:
    """WRN-16-2 teaches a ResNet-8 at a quarter of its width."""
    keys = {
        "epochs": 40,
        "batch_size": 50,
        # bf16 saves such small networks no time and costs most of what distillation gains here.
        "precision": "fp32",
        "data.name": "digits",
        "augment.crop": "none",
        "augment.flip": False,
        "student.name": "resnet8",
        "student.width": 0.25,
        "teacher.name": "wrn_16_2",
        "teacher.train": True,
        "teacher.epochs": 20,
        "teacher.lr": 0.05,
        "optim.lr": 0.4,
        "optim.nesterov": True,
        "optim.schedule": "cosine",
        "losses.kd.weight": 0.9,
        "losses.kd.ce_weight": 0.1,
        "losses.kd.temperature": 4.0,
        "baseline.lrs": [0.2, 0.4, 0.8],
    }
    description = "digits (ships with scikit-learn): wrn_16_2 -> resnet8 at width 0.25"
    return {"quickstart": Entry(name="quickstart", description=description, keys=keys)}
