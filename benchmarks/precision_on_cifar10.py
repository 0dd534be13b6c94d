"""Whether bf16 costs accuracy: the same runs in fp32 and in bf16, seed by seed, on real CIFAR-10.

    python benchmarks/precision_on_cifar10.py --data DIR/cifar10 --runs runs [--seeds 3] [--write]

Images and schedules are those of `cifar10_methods.py`; both precisions share one teacher, which was
trained in fp32. A CPU without instructions for bf16 takes ten times as long to multiply such
numbers: there they are multiplied in fp32, in which their products are exact, and the results
rounded to bf16. To resume an interrupted run, give the command again.
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accuracy_runs import difference, finished, note, row_line, words, write
from cifar10_methods import ALONE, EPOCHS, METHODS, lesson, taught
from torch import Tensor, nn

from fastkd.compute.machine import environment
from fastkd.compute.precision import computes_in_bf16
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.runs.stages import Session

RESULTS = Path(__file__).parent / "results"
# The smallest pair of the family: rounding costs a network of few parameters most.
TEACHER, STUDENT = "resnet20", "resnet8"
NAMES = (ALONE, "resnet20, KD")
PRECISIONS = ("fp32", "bf16")


@contextmanager
def bf16_products_in_fp32() -> Iterator[None]:
    """Let convolutions under bf16 autocast round as bf16 instructions do, on fp32 instructions."""
    native = nn.Conv2d._conv_forward

    def rounded(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return native(module, x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            x, weight = x.bfloat16().float(), weight.bfloat16().float()
            bias = None if bias is None else bias.bfloat16().float()
            return native(module, x, weight, bias).bfloat16()

    nn.Conv2d._conv_forward = rounded
    try:
        check_rounding(native)
        yield
    finally:
        nn.Conv2d._conv_forward = native


def check_rounding(native: Callable[..., Tensor]) -> None:
    """AssertionError unless result and gradients are those of bf16 numbers, rounded once.

    The truth is float64 on rounded numbers: without instructions torch's own bf16 adds in bf16.
    """
    conv = nn.Conv2d(16, 24, 3, padding=1)
    shapes = ((4, 16, 9, 9), (4, 24, 9, 9))
    image, upstream = (torch.randn(shape).bfloat16() for shape in shapes)
    exact = copy.deepcopy(conv).bfloat16().double()
    found = []
    for net, forward in ((exact, native), (conv, nn.Conv2d._conv_forward)):
        x = image.to(net.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=net is conv):
            out = forward(net, x, net.weight, net.bias)
        grads = torch.autograd.grad(out, (x, *net.parameters()), upstream.to(out.dtype))
        found.append([value.detach().double() for value in (out, *grads)])
    for truth, ours in zip(*found, strict=True):
        # Half of the last of 8 bits, and what fp32 sums are off.
        torch.testing.assert_close(ours, truth, rtol=2**-8, atol=1e-5 * float(truth.abs().max()))


def main() -> None:
    parser = words(__doc__, images="CIFAR-10", writes="results/precision_cifar10.*")
    options = parser.parse_args()
    given = [f"data.root={options.data}", "compile=off"]
    rows = []
    with ExitStack() as stack:
        if not computes_in_bf16(torch.device("cpu")):
            stack.enter_context(bf16_products_in_fp32())
        world = stack.enter_context(open_world("cpu"))
        session = Session(world, Console(enabled=True), options.runs)
        plain = [*given, f"student.name={TEACHER}", "precision=fp32"]
        teacher = taught("resnet56", plain, session)
        for name, seed in itertools.product(NAMES, range(options.seeds)):
            method = METHODS[name]
            keys = [f"seed={seed}", *given, f"student.name={STUDENT}"]
            if method.teacher is not None:
                keys += [f"teacher.name={TEACHER}", f"teacher.weights={teacher['weights']}"]
            for precision in PRECISIONS:
                recipe = lesson(method, *keys, f"precision={precision}")
                accuracy = finished(recipe, session)["accuracy_last"]
                row = {"method": name.replace("resnet20", STUDENT), "seed": seed}
                note(rows, row | {"precision": precision, "accuracy": accuracy})
    facts = {
        "command": f"python benchmarks/precision_on_cifar10.py --seeds {options.seeds}",
        "teacher": teacher["accuracy_last"],
        "products": "bf16" if computes_in_bf16(torch.device("cpu")) else "fp32, then rounded",
        "environment": environment(),
        "rows": rows,
    }
    text = table(facts)
    print(text)
    if options.write:
        write(RESULTS / "precision_cifar10.json", facts)
        (RESULTS / "precision_cifar10.md").write_text(text)


def table(facts: dict) -> str:
    """Mean and spread of every method in both precisions, and the paired difference."""
    machine = facts["environment"]
    lines = [
        "# bf16 against fp32 on CIFAR-10",
        "",
        f"- command: {facts['command']}",
        f"- date: {machine['time']}; cpu: {machine['cpu']['name']}; torch: {machine['torch']}",
        f"- 5,000 training images, {EPOCHS} epochs, accuracy of the last epoch on 10,000 test "
        f"images; teacher {TEACHER} {facts['teacher']:.2%}, trained in fp32",
        f"- bf16 products of convolutions computed in: {facts['products']}",
        "",
        "| method | fp32 | bf16 | bf16 - fp32 by seed, points | mean | standard error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    every = []
    for name in dict.fromkeys(row["method"] for row in facts["rows"]):
        found = {
            precision: [
                row["accuracy"]
                for row in facts["rows"]
                if row["method"] == name and row["precision"] == precision
            ]
            for precision in PRECISIONS
        }
        gains = [100 * (b - f) for f, b in zip(found["fp32"], found["bf16"], strict=True)]
        every += gains
        means = [f"{statistics.mean(found[precision]):.2%}" for precision in PRECISIONS]
        lines.append(row_line([name, *means, *difference(gains)]))
    lines.append(row_line(["all", "", "", *difference(every)]))
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
