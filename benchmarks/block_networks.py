"""Whole networks for bench_grouped_pointwise.py: plain modules, fused blocks, the dense network.

As a program it makes two steps of WRN-40-2 with G(4) and prints the MiB of the process before and
at most: `python block_networks.py plain|fused BATCH`.
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import count, create_model
from fastkd.compute.precision import resolve_precision
from fastkd.losses import KDLoss
from fastkd.models.planner import KernelChoice
from fastkd.testing import assert_as_accurate, ulp

KERNELS: tuple[KernelChoice, ...] = ("plain", "fused")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = resolve_precision("auto", DEVICE)
TEACHER = "wrn_40_2"

TABLE_1 = [
    "S",
    "S-2x2",
    "G(2)",
    "G(4)",
    "G(8)",
    "G(16)",
    "G(N/16)",
    "G(N/8)",
    "G(N/4)",
    "G(N/2)",
    "G(N)",
    "B(2)",
    "B(4)",
    "BG(2,2)",
    "BG(2,4)",
    "BG(2,8)",
    "BG(2,16)",
    "BG(2,M/16)",
    "BG(2,M/8)",
    "BG(2,M/4)",
    "BG(2,M/2)",
    "BG(2,M)",
    "BG(4,M)",
]
"""Moonshine's blocks, in the order of its tables 1 and 2."""


@dataclass(frozen=True)
class Student:
    """A network, its images, and whether its dense counterpart runs beside it."""

    name: str
    block: str = "S"
    batch: int = 32
    image: tuple[int, int, int] = (3, 32, 32)
    classes: int = 100
    dense: bool = True

    @property
    def title(self) -> str:
        """Network and block."""
        return self.name if self.block == "S" else f"{self.name} {self.block}"

    @property
    def text(self) -> str:
        """Batch and image size."""
        return "x".join(map(str, (self.batch, *self.image)))


def students(part: str, *, quick: bool) -> list[Student]:
    """The networks of a part of the benchmark."""
    wrn = [Student("wrn_40_2", block) for block in TABLE_1]
    tables = {
        "steps_wrn": [
            replace(one, dense=True)
            for one in wrn
            if one.block in ("G(2)", "G(4)", "G(8)", "G(16)", "G(N/8)", "G(N)", "BG(2,M)")
        ],
        "steps_others": [
            Student("resnet34", "G(N)", 4, (3, 224, 224), 1000),
            Student("mobilenetv2", dense=False),
            Student("erfnet", "G(N)", 1, (3, 256, 512), 20),
            Student("timm:mobilenetv2_100", "S", 4, (3, 224, 224), 1000, dense=False),
        ],
        "steps_teacher": [one for one in wrn if one.block in ("G(8)", "G(N)")],
        "picture": wrn,
    }
    found = tables[part]
    if quick:
        small = found[2 if part == "picture" else 0]
        return [replace(small, name="wrn_10_1", batch=2, image=(3, 8, 8))]
    return found


def built(student: Student, kernels: KernelChoice) -> nn.Module:
    """The same weights for the same student, whatever computes its blocks."""
    torch.manual_seed(0)
    options = {} if student.block == "S" else {"block": student.block}
    if student.name == "resnet34":
        options["stem"] = "imagenet"
    model = create_model(student.name, student.classes, kernels=kernels, **options)
    return model.to(DEVICE, memory_format=torch.channels_last).train()


def macs_of(student: Student) -> int:
    """Multiply-accumulates of a forward pass of one image."""
    return count(built(student, "plain"), student.image).macs


def batch_of(student: Student) -> tuple[Tensor, Tensor]:
    """Images and labels (a label for every pixel, of a network for segmentation)."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(student.batch, *student.image, generator=random).to(DEVICE)
    dense = student.image[1:] if student.name == "erfnet" else ()
    labels = torch.randint(0, student.classes, (student.batch, *dense), generator=random)
    return images.contiguous(memory_format=torch.channels_last), labels.to(DEVICE)


Sides = dict[str, Callable[[], object]]


def nets_of(student: Student) -> dict[str, nn.Module]:
    """The sides; their first outputs in training mode are checked against float64."""
    nets = {"plain": built(student, "plain"), "fastkd": built(student, "auto")}
    images, _ = batch_of(student)
    wide = built(student, "plain").double()
    with torch.no_grad():
        truth = wide(images.double())
        with PRECISION.autocast():
            plain, fast = (net(images).float() for net in nets.values())
    assert_as_accurate(f"{student.title}, logits", fast, plain, truth, floor=ulp(truth))
    if student.dense and student.block != "S":
        nets["dense"] = built(replace(student, block="S"), "plain")
    return nets


def steps_of(student: Student) -> Sides:
    """Training steps: forward, cross entropy, backward, SGD; eager, channels-last."""
    images, labels = batch_of(student)

    def step(net: nn.Module) -> Callable[[], None]:
        def loss() -> Tensor:
            return F.cross_entropy(net(images), labels)

        return updating(net, loss)

    return {side: step(net) for side, net in nets_of(student).items()}


def updating(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A call is a training step."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=True)

    def run() -> None:
        with PRECISION.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def distilling_steps_of(student: Student) -> Sides:
    """The same with a live teacher; the side `teacher` is its forward pass alone."""
    images, labels = batch_of(student)
    teacher = built(Student(TEACHER, classes=student.classes), "plain")
    teacher.eval().requires_grad_(False)
    distill = KDLoss(temperature=4.0, alpha=0.9)

    def answers() -> Tensor:
        with torch.no_grad(), PRECISION.autocast():
            return teacher(images)

    def step(net: nn.Module) -> Callable[[], None]:
        return updating(net, lambda: distill(net(images), answers(), labels))

    nets = nets_of(replace(student, dense=False))
    return {side: step(net) for side, net in nets.items()} | {"teacher": answers}


def forwards_of(student: Student) -> Sides:
    """Forward passes in eval mode, batch norms not folded."""
    images, _ = batch_of(student)

    def forward(net: nn.Module) -> Callable[[], None]:
        net.eval()

        def run() -> None:
            with torch.no_grad(), PRECISION.autocast():
                net(images)

        return run

    return {side: forward(net) for side, net in nets_of(student).items()}


def main(kernels: KernelChoice, batch: str) -> None:
    """Peak memory of this process before and after two steps."""

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    student = Student("wrn_40_2", "G(4)", int(batch))
    net, (images, labels) = built(student, kernels), batch_of(student)
    step = updating(net, lambda: F.cross_entropy(net(images), labels))
    before = peak_mib()
    step()
    step()
    print(before, peak_mib())


if __name__ == "__main__":
    _, kind, number = sys.argv
    main(next(one for one in KERNELS if one == kind), number)
