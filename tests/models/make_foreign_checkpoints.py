"""Makes foreign_checkpoints.json by running other repositories' networks; run by hand.

    python tests/models/make_foreign_checkpoints.py PEERS

PEERS holds clones of RepDistiller, pytorch_resnet_cifar10 (akamaster), pytorch-cifar100
(weiaicunzai) and erfnet_pytorch (Eromera), which are not shipped. Each network gets the weights
`fixed_state` and the images `hashed_values`, and runs in float64 and evaluation mode. Stored are
the names and shapes of its state dict, and of its logits and (RepDistiller) features, plain and
`preact`, the shape, the norm, the product with `hashed_values` and the first ten elements.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.testing import fixed_state, hashed_values

PEERS = Path(sys.argv[1])
RESULT = Path(__file__).with_name("foreign_checkpoints.json")


def load(folder: str, module: str) -> Any:
    """A module of a peer; what was loaded from another peer under the same name is forgotten."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("models", "resnet")]:
        del sys.modules[name]
    sys.path.insert(0, str(PEERS / folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.pop(0)


def summary(tensor: Tensor) -> dict[str, Any]:
    product = (tensor * hashed_values(tensor.shape, 0)).sum()
    return {
        "shape": list(tensor.shape),
        "norm": float(tensor.norm()),
        "product": float(product),
        "first": tensor.flatten()[:10].tolist(),
    }


def run(model: nn.Module, side: int, featured: bool) -> dict[str, Any]:
    model = model.double().eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(fixed_state(shapes))
    images = hashed_values((2, 3, side, side), -1)
    with torch.no_grad():
        taps = {"logits": summary(model(images))}
        for suffix, preact in (("", False), (":preact", True)) if featured else ():
            features, _ = model(images, is_feat=True, preact=preact)
            stages = enumerate(features[1:-1], start=1)
            taps |= {f"stage{number}{suffix}": summary(value) for number, value in stages}
            if not preact:
                taps |= {"stem": summary(features[0]), "pooled": summary(features[-1])}
    names = [f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    return {"side": side, "state": names, "taps": taps}


def main() -> None:
    """Writes one line for each network."""
    lines = []

    def add(folder: str, name: str, make: Callable[[], nn.Module], **how: Any) -> None:
        git = ["git", "-C", str(PEERS / folder), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        side, featured = how.pop("side", 32), folder == "RepDistiller"
        facts = {"repository": folder, "commit": commit, "name": name, "options": how}
        lines.append(json.dumps(facts | run(make(), side, featured)))

    zoo = load("RepDistiller", "models").model_dict
    wide = importlib.import_module("models.resnetv2")
    theirs = {"mobilenetv2_half": "MobileNetV2", "shufflenetv1": "ShuffleV1"}
    theirs |= {"shufflenetv2": "ShuffleV2", "resnet50": "ResNet50"}
    ours = ["resnet20", "resnet8x4", "wrn_16_2", "wrn_16_1", "vgg8", "vgg13", "vgg19", *theirs]
    for name in ours:
        add("RepDistiller", name, lambda name=name: zoo[theirs.get(name, name)](num_classes=10))
    add("RepDistiller", "vgg13", lambda: zoo["vgg13"](num_classes=10), side=64)
    add("RepDistiller", "resnet18", lambda: wide.ResNet18(num_classes=10))
    for name in ("resnet20", "resnet56"):
        make = getattr(load("pytorch_resnet_cifar10", "resnet"), name)
        add("pytorch_resnet_cifar10", name, make, shortcuts="pad")
    for name in ("resnet18", "resnet34", "resnet50", "mobilenetv2"):
        family = "resnet" if "resnet" in name else name
        module = load("pytorch-cifar100", f"models.{family}")
        add("pytorch-cifar100", name, getattr(module, name))
    erfnet = load("erfnet_pytorch/train", "erfnet")
    add("erfnet_pytorch", "erfnet", lambda: erfnet.Net(20))

    class Encoder(erfnet.Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images, only_encode=True)

    add("erfnet_pytorch", "erfnet_encoder", lambda: Encoder(20))
    RESULT.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
