"""The recipe to start from with label maps of your own: `fastkd train pairs data.root=streets`.

A DeepLab is trained on them and teaches a small network; `data.image_dir` and `data.label_dir` name
the folders of images and label maps. Nothing is downloaded.
"""

from typing import Any

from fastkd.recipes.entry import Entry

__all__ = ["recipes"]

NOTE = """\
A teacher of your own: teacher.name=NAME teacher.weights=FILE. No teacher, the labels alone:
teacher=null losses.kd=null. A folder of CamVid: data.name=camvid."""


def recipes() -> dict[str, Entry]:
    """A small MobileNetV3 for segmentation, taught by a DeepLab."""
    keys: dict[str, Any] = {
        "epochs": 100,
        "batch_size": 8,
        "data.name": "pairs",
        "data.image_size": 256,
        "student.name": "torchvision:lraspp_mobilenet_v3_large",
        "teacher.name": "torchvision:deeplabv3_resnet50",
        "teacher.train": True,
        "optim.name": "adamw",
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.01,
        "optim.schedule": "poly",
        "losses.ce.weight": 1.0,
        "losses.kd.weight": 1.0,
        "losses.kd.ce_weight": 0.0,
        "losses.kd.temperature": 4.0,
    }
    entry = Entry(
        name="pairs",
        description="label maps of your own beside images: any teacher -> any student",
        keys=keys,
        note=NOTE,
    )
    return {entry.name: entry}
