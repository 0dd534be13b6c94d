"""Segmentation of street scenes: ERFNet teaches its cheap student of Moonshine on CamVid.

367 training images in the released set, 11 classes. ERFNet's optimizer and augmentation, as for
Cityscapes (`fastkd.recipes.moonshine`), in a budget for two CPU cores: 240 x 180 pixels and 20
epochs, without the stage for the encoder (`encoder.epochs=20` adds it). No paper prints these.
"""

from typing import Any

from fastkd.recipes.entry import Entry

__all__ = ["recipes"]

SETTING: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 6,
    "data.name": "camvid",
    "data.image_size": 180,
    "augment.padding": 2,
    "optim.name": "adam",
    "optim.lr": 5e-4,
    "optim.weight_decay": 1e-4,
    "optim.schedule": "poly",
    "losses.ce.weight": 1.0,
    "losses.ce.class_weights": "erfnet",
}
TEACHER = {"teacher.name": "erfnet", "teacher.train": True}
STUDENT = {"student.name": "erfnet", "student.block": "G(N)"}
KD = {"losses.kd.weight": 1.0, "losses.kd.ce_weight": 0.0, "losses.kd.temperature": 4.0}
AT = {
    "losses.at.weight": 600.0,
    "losses.at.pairs": {f"stage{number}": f"stage{number}" for number in range(1, 6)},
}
METHODS: dict[str, dict[str, Any]] = {
    "kd": KD,
    "at": AT,
    "at+kd": AT | KD,
    # Its authors' for logits.
    "cwd": {"losses.cwd.weight": 3.0, "losses.cwd.temperature": 4.0},
}


def recipes() -> dict[str, Entry]:
    """The networks alone, and every method."""
    alone = {"erfnet": {"student.name": "erfnet"}, "erfnet-G:N": STUDENT}
    entries = [
        Entry(
            name=f"camvid/{name}",
            description=f"{name} on camvid, no teacher",
            keys=SETTING | keys,
        )
        for name, keys in alone.items()
    ]
    entries += [
        Entry(
            name=f"camvid/erfnet--erfnet-G:N/{method}",
            description=f"erfnet teaches erfnet-G:N on camvid by {method}",
            keys=SETTING | TEACHER | STUDENT | keys,
        )
        for method, keys in METHODS.items()
    ]
    return {entry.name: entry for entry in entries}
