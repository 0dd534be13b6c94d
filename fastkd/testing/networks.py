"""One build of each form of every family of the zoo, narrow where the family has a width."""

from typing import Any

__all__ = ["CLASSIFIERS", "DENSE", "Build"]

Build = tuple[str, dict[str, Any]]
"""What `create_model` takes besides the number of classes: a name and options."""

CLASSIFIERS: dict[str, Build] = {
    "resnet8x4": ("resnet8x4", {}),
    "resnet18-imagenet": ("resnet18", {"width": 0.25, "stem": "imagenet"}),
    "plain18": ("plain18", {"width": 0.25}),
    "resnet50": ("resnet50", {}),
    "wrn_16_2": ("wrn_16_2", {}),
    "vgg8": ("vgg8", {}),
    "mobilenetv2": ("mobilenetv2", {}),
    "mobilenetv2_half": ("mobilenetv2_half", {}),
    "shufflenetv1": ("shufflenetv1", {}),
    "shufflenetv2": ("shufflenetv2", {}),
}
DENSE: dict[str, Build] = {
    "erfnet": ("erfnet", {}),
    "erfnet-G(N)": ("erfnet", {"block": "G(N)"}),
}
