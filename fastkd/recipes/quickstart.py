"""The recipe that `fastkd train` runs without arguments: handwritten digits, no download.

300 training images at 16x16, a teacher of 0.7 M parameters, a student of 5 k. The student alone
gets the same budget and the best of three learning rates.
"""

from fastkd.recipe.schema import (
    AugmentConfig,
    BaselineConfig,
    DataConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
)

__all__ = ["RECIPES"]


def quickstart() -> Recipe:
    """WRN-16-2 teaches a ResNet-8 of a quarter of the width."""
    return Recipe.model_validate(
        {
            "name": "quickstart",
            "description": "digits (ships with scikit-learn): wrn_16_2 -> resnet8 at width 0.25",
            "epochs": 40,
            "batch_size": 50,
            "data": DataConfig(name="digits"),
            "augment": AugmentConfig(crop="none", flip=False),
            "student": StudentConfig(name="resnet8", width=0.25),
            "teacher": TeacherConfig(name="wrn_16_2", train=True, epochs=20, lr=0.05),
            "optim": OptimConfig(lr=0.4, nesterov=True, schedule="cosine"),
            "losses": {"kd": {"weight": 0.9, "ce_weight": 0.1, "temperature": 4.0}},
            "baseline": BaselineConfig(lrs=(0.2, 0.4, 0.8)),
        }
    )


RECIPES = {"quickstart": quickstart}
