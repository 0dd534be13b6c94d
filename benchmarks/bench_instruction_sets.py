"""The C++ core by instruction set: a clone that the compiler failed to vectorise shows here.

    pytest benchmarks/bench_instruction_sets.py [--pairs 20] [--save-results]

One thread on inputs that fit its cache; main memory would make all clones equally fast.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from fastkd.kernels._library import Core, core
from fastkd.kernels.attention_map import cpu as attention_map
from fastkd.kernels.hardness import cpu as hardness
from fastkd.kernels.kd_loss import cpu as kd_loss
from fastkd.kernels.kd_loss.inputs import Inputs

CORE = core()
OnClone = Callable[[str], object]


def kd_loss_on() -> OnClone:
    student, teacher = 3 * torch.randn(2, 256, 1000)
    labels = torch.randint(0, 1000, (256,))
    gradient, loss, divisor = torch.empty_like(student), torch.empty(()), torch.empty(())

    inputs = Inputs(
        student,
        [teacher],
        labels,
        temperature=4.0,
        label_smoothing=0.0,
        ignore_index=-100,
        class_dim=-1,
        weights=None,
        mask=None,
    )
    outputs = kd_loss.Outputs(grad=gradient, loss=loss, divisor=divisor)
    return lambda isa: kd_loss.fill(inputs, outputs, kd_loss.Upstream(), isa)


def hardness_on() -> OnClone:
    student, teacher = 3 * torch.randn(2, 512, 1000)
    return lambda isa: hardness.hardness(student, teacher, None, "kl", 4.0, isa=isa)


def attention_loss_on(layout: torch.memory_format) -> OnClone:
    student, teacher = (torch.randn(4, c, 16, 16).to(memory_format=layout) for c in (32, 128))

    def run(isa: str) -> None:
        _, coefficients, _ = attention_map.loss(
            student,
            teacher,
            power=2,
            student_window=(1, 1),
            teacher_window=(1, 1),
            eps=1e-12,
            distance=False,
            isa=isa,
        )
        attention_map.energy_grad(student, coefficients, None, 2, (1, 1), isa)

    return run


# What runs on a clone, and how much slower than another the widest one may seem.
CASES = {
    "kd_loss 256x1000": (kd_loss_on, 1.05),
    "hardness kl 512x1000": (hardness_on, 1.05),
    "attention NCHW": (lambda: attention_loss_on(torch.contiguous_format), 1.1),
    "attention channels-last": (lambda: attention_loss_on(torch.channels_last), 1.1),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(isinstance(CORE, str), reason="needs the C++ core")
@pytest.mark.parametrize("case", CASES)
def bench_instruction_sets(case, table, race) -> None:
    assert isinstance(CORE, Core)
    make, noise = CASES[case]
    run, widest = make(), CORE.isas[0]
    found = race({isa: lambda isa=isa: run(isa) for isa in CORE.isas}, of=widest, repeat=5)
    table.rows.append({"case": f"{case} fp32", **found.cells(of=widest)})
    assert all(found.ms(widest) <= noise * found.ms(isa) for isa in CORE.isas), table.rows[-1]
