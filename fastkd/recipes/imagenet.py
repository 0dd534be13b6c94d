"""Today's training on ImageNet: three recipes of others that many students are measured by.

    rsb        "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476), A1 to A3, which
               learn from labels alone
    vanillakd  "Revisit the Power of Vanilla Knowledge Distillation" (Hao et al. 2023,
               arXiv:2305.15781), with the settings of its repository, Hao840/vanillaKD
    funmatch   "Knowledge distillation: A good teacher is patient and consistent" (Beyer et al.
               2021, arXiv:2106.05237), with big_vision/configs/proj/distill/bit_i1k.py: the
               teacher's answers alone, on mixed images that teacher and student share

None has run here. What could be read in neither a paper nor its code, or is computed otherwise
here, is in the notes and sources.
"""

from typing import Any

from fastkd.recipes.entry import Entry

__all__ = ["recipes"]

IMAGENET = {"data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225]}
SETTING: dict[str, Any] = {
    "batch_size": 2048,
    "data.name": "folder",
    "data.image_size": 224,
    **IMAGENET,
    "data.eval_resize": 235,
    "data.eval_crop": 224,
    "data.eval_interpolation": "bicubic",
    "augment.crop": "resized",
    "augment.policy": "randaugment",
    "augment.randaugment.spread": 0.5,
    "augment.cutmix": 1.0,
    "student.name": "timm:resnet50",
    "optim.name": "lamb",
    "optim.lr": 5e-3,
    "optim.decay_norms": False,
    "optim.schedule": "cosine",
    "optim.warmup_epochs": 5,
}
OF_TIMM = "timm's training script, by which it was trained"
SOURCES = {
    "data.mean": OF_TIMM,
    "data.std": OF_TIMM,
    "data.eval_resize": "224 / 0.95, as timm rounds it",
    "data.eval_interpolation": OF_TIMM,
    "optim.decay_norms": OF_TIMM,
}
ROOT = "data.root is ImageNet as folders or shards: train/ and val/, one folder a class."
OTHERWISE = (
    " timm's rate rises once an epoch from 1e-4 or 1e-6 and ends at 1e-6, and its cosine counts "
    "the warm-up; here it rises in every step from 0, and the cosine from there to 0. Its LAMB "
    "clips the gradient's norm to 1, here too. timm draws between bilinear and bicubic for crops "
    "and operations, here both are bilinear; it mixes an image with the one at the other end of "
    "its process's batch, here with any of the whole batch, after normalisation; its repeats of an "
    "image go to different processes, here they are neighbours."
)

# Name -> differences from SETTING, top-1 accuracy that the paper prints.
RSB: dict[str, tuple[dict[str, Any], float]] = {
    "a1": (
        {
            "epochs": 600,
            "augment.randaugment.magnitude": 7,
            "augment.mixup": 0.2,
            "augment.repeats": 3,
            "student.drop_path": 0.05,
            "optim.weight_decay": 0.01,
            "losses.bce.label_smoothing": 0.1,
        },
        80.4,
    ),
    "a2": (
        {
            "epochs": 300,
            "augment.randaugment.magnitude": 7,
            "augment.mixup": 0.1,
            "augment.repeats": 3,
            "student.drop_path": 0.05,
            "optim.weight_decay": 0.02,
        },
        79.8,
    ),
    "a3": (
        {
            "epochs": 100,
            "data.image_size": 160,
            "augment.randaugment.magnitude": 6,
            "augment.mixup": 0.1,
            "optim.lr": 8e-3,
            "optim.weight_decay": 0.02,
        },
        78.1,
    ),
}
TEACHER = "timm:beitv2_base_patch16_224.in1k_ft_in22k_in1k"
# Strategy -> epochs, mixup, weight decay, label smoothing.
VANILLA = {"A2": (300, 0.1, 0.02, 0.0), "A1": (600, 0.2, 0.01, 0.1)}
# Epochs -> top-1 accuracy of table 3, both networks at 224 pixels.
FUNMATCH = {90: 78.0, 300: 80.3, 1200: 81.54, 4800: 82.18, 9600: 82.31}


def recipes() -> dict[str, Entry]:
    """Entries of this module by name."""
    entries = [_rsb(name, *row) for name, row in RSB.items()]
    entries += [_vanillakd(name, *row) for name, row in VANILLA.items()]
    entries += [_funmatch(epochs, accuracy) for epochs, accuracy in FUNMATCH.items()]
    return {entry.name: entry for entry in entries}


def _rsb(name: str, own: dict[str, Any], accuracy: float) -> Entry:
    return Entry(
        name=f"rsb/imagenet/resnet50/{name}",
        description=f"resnet50 on imagenet by ResNet strikes back, {name.upper()}",
        keys={
            **SETTING,
            "augment.randaugment.space": "timm_increasing",
            "losses.bce.weight": 1.0,
            "losses.bce.target_threshold": 0.2,
            **own,
        },
        sources=SOURCES
        | {"losses.bce.target_threshold": "scripts of others; the paper: both classes are present"},
        note=f"{ROOT} The paper prints {accuracy} % top-1.{OTHERWISE} Values from a copy of its "
        "table 2; the paper itself could not be read.",
    )


def _vanillakd(
    strategy: str, epochs: int, mixup: float, weight_decay: float, smoothing: float
) -> Entry:
    labels = {"losses.bce.label_smoothing": smoothing} if smoothing else {}
    return Entry(
        name=f"vanillakd/imagenet/beitv2_base--resnet50/kd@{epochs}",
        description=f"beitv2_base teaches resnet50 on imagenet by KD, strategy {strategy}",
        keys={
            **SETTING,
            "epochs": epochs,
            "augment.randaugment.space": "timm",
            "augment.randaugment.magnitude": 7,
            "augment.mixup": mixup,
            "augment.repeats": 3,
            "student.drop_path": 0.05,
            "teacher.name": TEACHER,
            "teacher.pretrained": True,
            "optim.weight_decay": weight_decay,
            "losses.bce.weight": 1.0,
            **labels,
            "losses.kd.weight": 1.0,
            "losses.kd.ce_weight": 0.0,
            "losses.kd.temperature": 1.0,
        },
        sources=SOURCES
        | {"teacher.name": "the repository names beitv2_base and no file; timm's best weights"},
        note=f"{ROOT}{OTHERWISE} The repository prints 83.08 % for its released network, which by "
        "others' accounts took 4,800 epochs, and no number for this training.",
    )


def _funmatch(epochs: int, accuracy: float) -> Entry:
    return Entry(
        name=f"funmatch/imagenet/bit_r152x2--bit_r50x1/kd@{epochs}",
        description=f"BiT ResNet-152x2 teaches BiT ResNet-50 on imagenet, {epochs} epochs",
        keys={
            "epochs": epochs,
            "batch_size": 4096,
            "data.name": "folder",
            "data.image_size": 224,
            "data.mean": [0.5, 0.5, 0.5],
            "data.std": [0.5, 0.5, 0.5],
            "data.eval_resize": 256,
            "data.eval_crop": 224,
            "data.eval_interpolation": "box",
            "augment.crop": "resized",
            "augment.mixup": 1.0,
            "student.name": "timm:resnetv2_50x1_bit",
            "teacher.name": "timm:resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k",
            "teacher.pretrained": True,
            "optim.name": "adamw",
            "optim.lr": 0.03,
            "optim.weight_decay": 0.01,
            "optim.decay_norms": False,
            "optim.schedule": "cosine",
            "optim.warmup_epochs": 16,
            "optim.clip_norm": 1.0,
            "losses.kd.weight": 1.0,
            "losses.kd.ce_weight": 0.0,
            "losses.kd.temperature": 1.0,
        },
        sources={
            "optim.weight_decay": "3e-4 that is not multiplied by the rate, over a rate of 0.03",
            "optim.warmup_epochs": "5,000 steps of 4,096 images; an epoch of all images has 312",
        },
        note=f"{ROOT} The paper prints {accuracy:g} % top-1. Its areas are 5 to 100 % of a "
        "picture, here 8 to 100 %, and resized without antialias; it trains on 98 % of the "
        "training images, and its classifier starts at zero.",
    )
