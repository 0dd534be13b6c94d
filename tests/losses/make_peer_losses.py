"""Makes peer_losses.json by running the authors' own code; run by hand, the peers are not shipped.

    python tests/losses/make_peer_losses.py PEERS > tests/losses/peer_losses.json

PEERS holds one checkout per repository, under the repository's name, each with its commit in a file
COMMIT: SimKD, mdistiller, image_classification_sota, logit-standardization-KD, JointRD_Neurips2020,
MEAL-V2. Needs scipy, which JointRD's margin uses. Inputs and weights are the sines of
`fastkd.testing.sines` in float64, their numbers as below; test_peer_losses.py uses the same.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.testing import fill_with_sines, sines

PEERS = Path(sys.argv[1])
LABELS_N = (3 * torch.arange(8) + 1) % 10


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


def entries(gradient: Tensor) -> dict[int, float]:
    """Place -> value at six places from the first to the last, at all of a smaller one."""
    flat = gradient.flatten()
    return {k: flat[k].item() for k in (place * (len(flat) - 1) // 5 for place in range(6))}


def measured(loss: Tensor, leaves: Iterable[Tensor], **more: Tensor) -> dict[str, Any]:
    """The loss and, per input, the norm and some entries of its gradient."""
    gradients = torch.autograd.grad(loss, list(leaves))
    return {
        "loss": loss.item(),
        "grad_norm": [gradient.norm().item() for gradient in gradients],
        "grad_entries": [entries(gradient) for gradient in gradients],
        **{key: value.detach().flatten()[:6].tolist() for key, value in more.items()},
    }


def logits() -> tuple[Tensor, Tensor]:
    """Student (a leaf) and teacher, [8, 10]."""
    return sines((8, 10), 1, 3).requires_grad_(), sines((8, 10), 2, 4)


class Answers(nn.Module):
    """A network that answers what it is given."""

    def __init__(self, *answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Any) -> Any:
        """The given answer."""
        return self.answer


def simkd() -> dict[str, Any]:
    """Student map larger than the teacher's, projector in training mode, then its logits."""
    peer = load("SimKD/models/util.py").SimKD(s_n=5, t_n=6, factor=2).double()
    fill_with_sines(peer.transfer, 110)
    head = nn.Linear(6, 10).double()
    fill_with_sines(head, 130)
    student, teacher = sines((4, 5, 8, 8), 101).requires_grad_(), sines((4, 6, 4, 4), 102)
    projected, target, logits_NC = peer(student, teacher.relu(), head)
    loss = nn.MSELoss()(projected, target)
    first = peer.transfer[0].weight
    return measured(loss, [student, first], logits=logits_NC)


def simkd_smaller() -> dict[str, Any]:
    """The teacher's map is the larger one."""
    peer = load("SimKD/models/util.py").SimKD(s_n=5, t_n=6, factor=3).double()
    fill_with_sines(peer.transfer, 110)
    student, teacher = sines((4, 5, 3, 3), 101).requires_grad_(), sines((4, 6, 7, 7), 102)
    projected, target, _ = peer(student, teacher.relu(), lambda pooled: pooled)
    return measured(nn.MSELoss()(projected, target), [student])


def distiller(path: str, name: str, repository: str) -> Any:
    """A distiller class of mdistiller or of its descendant."""
    base = load(f"{repository}/mdistiller/distillers/_base.py")
    return getattr(load(f"{repository}/mdistiller/distillers/{path}", peer___base=base), name)


def reviewkd() -> dict[str, Any]:
    """Four levels, of which one has a larger teacher map; epoch 5 of a warm-up of 20."""
    cfg = SimpleNamespace(
        SHAPES=[1, 2, 4, 8],
        OUT_SHAPES=[1, 4, 4, 8],
        IN_CHANNELS=[4, 6, 8, 8],
        OUT_CHANNELS=[5, 7, 9, 10],
        CE_WEIGHT=0.0,
        REVIEWKD_WEIGHT=1.0,
        WARMUP_EPOCHS=20,
        STU_PREACT=False,
        MAX_MID_CHANNEL=512,
    )
    student_shapes = [(4, 3, 8, 8), (4, 4, 8, 8), (4, 6, 4, 4), (4, 8, 2, 2)]
    maps = [sines(s, 140 + k).requires_grad_() for k, s in enumerate(student_shapes)]
    pooled = sines((4, 8), 144).requires_grad_()
    teacher_shapes = [(4, 3, 8, 8), (4, 5, 8, 8), (4, 7, 4, 4), (4, 9, 4, 4)]
    teacher = {
        "preact_feats": [sines(s, 150 + k) for k, s in enumerate(teacher_shapes)],
        "pooled_feat": sines((4, 10), 154),
    }
    zeros = torch.zeros(4, 10, dtype=torch.float64)
    peer = distiller("ReviewKD.py", "ReviewKD", "mdistiller")(
        Answers(zeros, {"feats": maps, "pooled_feat": pooled}),
        Answers(zeros, teacher),
        SimpleNamespace(REVIEWKD=cfg),
    )
    peer.abfs.double()
    for level, fusion in enumerate(peer.abfs):  # the deepest first
        fill_with_sines(fusion.conv1, 160 + 20 * level)
        fill_with_sines(fusion.conv2, 165 + 20 * level)
        if fusion.att_conv is not None:
            fill_with_sines(fusion.att_conv, 170 + 20 * level)
    _, losses = peer.train()(image=None, target=LABELS_N[:4], epoch=5)
    return measured(losses["loss_kd"], [*maps[1:], pooled, peer.abfs[0].conv1[0].weight])


def dkd(repository: str, **stands: bool) -> dict[str, Any]:
    """Epoch 3 of a warm-up of 20, alpha 1.5, beta 6."""
    student, teacher = logits()
    cfg = SimpleNamespace(CE_WEIGHT=0.0, ALPHA=1.5, BETA=6.0, T=2.0, WARMUP=20)
    whole = SimpleNamespace(DKD=cfg, EXPERIMENT=SimpleNamespace(**stands))
    peer = distiller("DKD.py", "DKD", repository)(Answers(student, {}), Answers(teacher, {}), whole)
    _, losses = peer.train()(image=None, target=LABELS_N, epoch=3)
    return measured(losses["loss_kd"], [student])


def kd_standardized() -> dict[str, Any]:
    """The total of KD on standardised logits, 0.1 CE + 9 KD at T = 2."""
    student, teacher = logits()
    loss = SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=9.0)
    cfg = SimpleNamespace(TEMPERATURE=2.0, LOSS=loss)
    whole = SimpleNamespace(KD=cfg, EXPERIMENT=SimpleNamespace(LOGIT_STAND=True))
    peer = distiller("KD.py", "KD", "logit-standardization-KD")(
        Answers(student, {}), Answers(teacher, {}), whole
    )
    _, losses = peer.train()(image=None, target=LABELS_N)
    return measured(losses["loss_ce"] + losses["loss_kd"], [student])


def dist() -> dict[str, Any]:
    """T = 4."""
    student, teacher = logits()
    peer = load("image_classification_sota/lib/models/losses/dist_kd.py").DIST(tau=4.0)
    return measured(peer(student, teacher), [student])


def jointrd_margin() -> dict[str, Any]:
    """The partial distance and the margin of a batch norm whose biases span both branches."""
    peer = load("JointRD_Neurips2020/model/distiller2.py")
    student = sines((4, 6, 3, 3), 201, 2).requires_grad_()
    teacher = sines((4, 6, 3, 3), 202, 2)
    norm = nn.BatchNorm2d(6).double()
    norm.weight.data.copy_(sines((6,), 203))
    norm.bias.data.copy_(torch.tensor([-2.0, -0.5, 0.0, 0.4, 1.5, 9.0], dtype=torch.float64))
    margin = peer.get_margin_from_BN(norm).double()
    loss = peer.distillation_loss(student, teacher, margin[None, :, None, None]) / 4
    return measured(loss, [student], margin=margin)


class JointModel:
    """In place of the authors' two networks: answers by stage, and nothing to train."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.module = self.teacher = self

    def __call__(self, images: Any, *, stage: str, **_: Any) -> Any:
        return self.answers[stage]

    def nothing(self, *_: Any) -> None:
        """Modes, margins, steps, log lines."""

    train = eval = reset_margin = step = zero_grad = log = nothing


def jointrd_total() -> dict[str, Any]:
    """What the branch JOINT makes of four cross entropies and four distances, per epoch.

    The factor of each is the derivative of its total: read off the gradients of the distances, and
    off those of the logits relative to a plain cross entropy.
    """
    tools, utils = types.ModuleType("tools"), types.ModuleType("tools.utils")
    tools.utils = utils  # type: ignore[attr-defined]
    utils.AverageMeter = type(  # type: ignore[attr-defined]
        "Meter", (), {"update": lambda *_: None, "avg": 0.0}
    )
    utils.accuracy = lambda *_, **__: (torch.zeros(()),) * 2  # type: ignore[attr-defined]
    peer = load("JointRD_Neurips2020/process/multikd_train.py", tools=tools)
    torch.Tensor.cuda = lambda self, **_: self  # type: ignore[method-assign]
    args = SimpleNamespace(dc=0.5, dis_weight=1e-3, baseline_epochs=200)
    batches = [(torch.zeros(8), LABELS_N)]
    found: dict[str, Any] = {}
    for epoch in (0, 10, 20, 30, 40, 50, 60, 75):
        student = [sines((8, 10), 210 + k, 3).requires_grad_() for k in range(4)]
        distances = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(4)]
        teacher = sines((8, 10), 2, 4).requires_grad_()
        model = JointModel({"RES_TA": (teacher, [teacher]), "JOINT": (student, None, distances)})
        peer.train(batches, model, F.cross_entropy, model, model, epoch, "JOINT", model, args)
        plain = [torch.autograd.grad(F.cross_entropy(z, LABELS_N), z)[0] for z in student]
        factors = [z.grad.norm() / g.norm() for z, g in zip(student, plain, strict=True)]
        found[str(epoch)] = {
            "eta": peer.Cosine(0.5, 1.0, epoch, 60),
            "of_ce": [factor.item() for factor in factors],
            "of_distance": [distance.grad.item() for distance in distances],
        }
    return found


def meal_discriminator() -> dict[str, Any]:
    """64 classes, K = 4: 64 -> 16 -> 4 -> 2, with the ReLU behind the last layer."""
    peer = load("MEAL-V2/models/discriminator.py").Discriminator(outputs_size=64, K=4).double()
    fill_with_sines(peer, 220)
    student, teacher = sines((8, 64), 230, 3).requires_grad_(), sines((8, 64), 231, 4)
    loss = load("MEAL-V2/loss.py").discriminatorLoss(peer)([student], [teacher])
    return measured(loss, [student, peer.conv1.weight, peer.conv3.bias])


CASES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "simkd": ("DefangChen/SimKD models/util.py", simkd),
    "simkd_smaller": ("DefangChen/SimKD models/util.py", simkd_smaller),
    "reviewkd": ("megvii-research/mdistiller mdistiller/distillers/ReviewKD.py", reviewkd),
    "dkd": (
        "megvii-research/mdistiller mdistiller/distillers/DKD.py",
        lambda: dkd("mdistiller"),
    ),
    "dkd_standardized": (
        "sunshangquan/logit-standardization-KD mdistiller/distillers/DKD.py",
        lambda: dkd("logit-standardization-KD", LOGIT_STAND=True),
    ),
    "kd_standardized": (
        "sunshangquan/logit-standardization-KD mdistiller/distillers/KD.py",
        kd_standardized,
    ),
    "dist": ("hunto/image_classification_sota lib/models/losses/dist_kd.py", dist),
    "jointrd_margin": ("leoozy/JointRD_Neurips2020 model/distiller2.py", jointrd_margin),
    "jointrd_total": ("leoozy/JointRD_Neurips2020 process/multikd_train.py", jointrd_total),
    "meal_discriminator": ("szq0214/MEAL-V2 models/discriminator.py loss.py", meal_discriminator),
}


def main() -> None:
    """Prints name -> repository, commit, file and numbers."""
    sys.modules["peer"] = types.ModuleType("peer")
    result = {}
    for name, (source, case) in CASES.items():
        repository, *files = source.split()
        result[name] = {
            "repository": repository,
            "commit": (PEERS / repository.split("/")[1] / "COMMIT").read_text().strip(),
            "file": " ".join(files),
            "torch": torch.__version__,
            **case(),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
