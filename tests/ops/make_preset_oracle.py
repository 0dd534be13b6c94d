"""Makes kd_presets.json by running the peers' own code; run by hand, the peers are not shipped.

    python tests/ops/make_preset_oracle.py PEERS > tests/ops/kd_presets.json

PEERS holds one checkout per repository, under the repository's name, each with its commit in a file
COMMIT: RepDistiller, mdistiller, deit, Model-Optimizer, pytorch-moonshine, MEAL-V2. timm is the
installed one; its preset is compared with timm itself in test_kd_modules.py.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEERS = Path(sys.argv[1])


def load(path: str, **stubs: types.ModuleType) -> Any:
    """A peer's file as a module; `stubs` stand for imports that its loss does not use."""
    name = "peer." + path.replace("/", "_").removesuffix(".py")
    sys.modules.update({key.replace("__", "."): module for key, module in stubs.items()})
    spec = importlib.util.spec_from_file_location(name, PEERS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "peer"
    spec.loader.exec_module(module)
    return module


def sines(a: int, scale: float) -> Tensor:
    """The logits of kd_loss_oracle.json."""
    n = torch.arange(1, 81, dtype=torch.float64)
    return (scale * torch.sin(12.9898 * n + 78.233 * a)).view(8, 10)


def main() -> None:
    """Prints name -> repository, commit, file, loss and gradient norm in float64."""
    student, teacher = sines(1, 3).requires_grad_(), sines(2, 4)
    labels = (3 * torch.arange(8) + 1) % 10
    base = types.ModuleType("peer._base")
    base.Distiller = nn.Module  # type: ignore[attr-defined]
    sys.modules["peer"] = types.ModuleType("peer")
    ce = F.cross_entropy

    def repdistiller() -> Tensor:
        kd = load("RepDistiller/distiller_zoo/KD.py").DistillKL(4)
        return 0.1 * ce(student, labels) + 0.9 * kd(student, teacher)

    def mdistiller() -> Tensor:
        peer = load("mdistiller/mdistiller/distillers/KD.py", peer___base=base)
        return 0.1 * ce(student, labels) + 0.9 * peer.kd_loss(student, teacher, 4)

    def deit() -> Tensor:
        peer = load("deit/losses.py").DistillationLoss
        loss = peer(nn.CrossEntropyLoss(), lambda *a, **k: teacher, "soft", 0.5, 1.0)
        # Two heads in the peer; here both are the student.
        return loss(None, (student, student), labels)

    def modelopt() -> Tensor:
        peer = load("Model-Optimizer/modelopt/torch/distill/losses.py")
        return peer.LogitsDistillationLoss()(student, teacher)

    def moonshine() -> Tensor:
        peer = load("pytorch-moonshine/funcs.py", models=types.ModuleType("models"))
        return peer.distillation(student, teacher, labels, 4.0, 0.9)

    def meal_v2() -> Tensor:
        peer = load("MEAL-V2/extensions/kd_loss.py").KLLoss().train()
        return peer((student, teacher.softmax(1)), labels)[0]

    files = {
        repdistiller: "HobbitLong/RepDistiller distiller_zoo/KD.py",
        mdistiller: "megvii-research/mdistiller mdistiller/distillers/KD.py",
        deit: "facebookresearch/deit losses.py",
        modelopt: "NVIDIA/Model-Optimizer modelopt/torch/distill/losses.py",
        moonshine: "BayesWatch/pytorch-moonshine funcs.py",
        meal_v2: "szq0214/MEAL-V2 extensions/kd_loss.py",
    }
    result = {}
    for function, source in files.items():
        loss = function()
        (grad,) = torch.autograd.grad(loss, student)
        repository, file = source.split()
        result[function.__name__] = {
            "repository": repository,
            "commit": (PEERS / repository.split("/")[1] / "COMMIT").read_text().strip(),
            "file": file,
            "torch": torch.__version__,
            "loss": loss.item(),
            "grad_norm": grad.norm().item(),
            "grad_00": grad[0, 0].item(),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
