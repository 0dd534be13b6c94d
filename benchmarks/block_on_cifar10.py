"""Whether a network trains with the fused block as with plain modules, on real CIFAR-10 images.

    python benchmarks/block_on_cifar10.py --data DIR/cifar10 [--steps 200] [--seeds 3] [--write]

1. The same 200 steps of WRN-16-2 with G(4) from the same weights, twice: the loss curves differ by
   rounding only. How far rounding alone carries two runs apart is measured beside it: plain modules
   once more, from weights that were moved by one part in ten million.
2. Accuracy after 3 epochs on 5,000 images, over seeds, with the recipe's own trainer.

Writes results/block_cifar10.{json,md}. Not a measurement of time.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from accuracy_runs import finished
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import fastkd
from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session

RESULTS = Path(__file__).parent / "results"
NETWORK, BLOCK, BATCH = "wrn_16_2", "G(4)", 64
RECIPE = "moonshine/cifar10/wrn_16_2/scratch"
KEYS = ("student.block=G:4", "data.train_limit=5000", "batch_size=64", "precision=fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write results/block_cifar10.*")
    options = parser.parse_args()
    images, labels = cifar_images(options.data, options.steps * BATCH)
    curves = {
        "plain": curve(images, labels, "plain", 0.0),
        "fused": curve(images, labels, "fused", 0.0),
        "plain, moved by 1e-7": curve(images, labels, "plain", 1e-7),
    }
    rows = accuracies(options)
    facts = {
        "command": f"python benchmarks/block_on_cifar10.py --steps {options.steps} "
        f"--seeds {options.seeds} --epochs {options.epochs}",
        "environment": environment(),
        "curves": curves,
        "rows": rows,
    }
    text = table(facts)
    print(text)
    if options.write:
        (RESULTS / "block_cifar10.json").write_text(json.dumps(facts, indent=1) + "\n")
        (RESULTS / "block_cifar10.md").write_text(text)


def cifar_images(root: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [N, 3, 32, 32] normalised fp32, labels [N]) in a fixed random order."""
    found = ImageFolder(str(Path(root) / "train"))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:number]
    pairs = [found[int(place)] for place in order]
    images = torch.stack([pil_to_tensor(image) for image, _ in pairs]).float().div(255)
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return (images - mean) / std, torch.tensor([label for _, label in pairs])


def curve(images: torch.Tensor, labels: torch.Tensor, kernels: str, moved: float) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model = fastkd.create_model(NETWORK, num_classes=10, block=BLOCK, kernels=kernels)
    model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + moved)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    losses = []
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracies(options: argparse.Namespace) -> list[dict[str, object]]:
    """Accuracy in the last epoch, by kernels and seed."""
    factor = options.epochs / load_recipe(RECIPE).epochs
    keys = [*KEYS, f"epoch_factor={factor:.12g}", f"eval_epochs={options.epochs}"]
    rows = []
    with open_world("cpu") as world:
        for seed in range(options.seeds):
            for kernels in ("plain", "fused"):
                # The choice is not part of a run's digest: each has folders of its own.
                session = Session(world, Console(enabled=True), options.runs / kernels)
                own = [f"seed={seed}", f"data.root={options.data}", f"student.kernels={kernels}"]
                summary = finished(load_recipe(RECIPE, overrides=[*keys, *own]), session)
                accuracy = summary["accuracy_last"]
                rows.append({"kernels": kernels, "seed": seed, "accuracy": accuracy})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(facts: dict[str, object]) -> str:
    """What results/block_cifar10.md shows."""
    curves, rows = facts["curves"], facts["rows"]
    plain = curves["plain"]
    lines = [
        "# The fused block in training, on real CIFAR-10 images",
        "",
        f"`{facts['command']}`",
        "",
        f"WRN-16-2 with G(4), fp32, {len(plain)} steps of {BATCH} images from the same weights. "
        "Largest difference of the loss from the plain run's:",
        "",
        "| run | steps 1 to 10 | 1 to 50 | all | last loss, mean of 20 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, losses in curves.items():
        gaps = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
        worst = " | ".join(f"{max(gaps[:n]):.2g}" for n in (10, 50, len(gaps)))
        lines.append(f"| {name} | {worst} | {statistics.fmean(losses[-20:]):.4f} |")
    lines += ["", "Accuracy over seeds, 5,000 training images:", ""]
    lines += ["| kernels | accuracy by seed, % | mean | std |", "| --- | --- | --- | --- |"]
    for kernels in ("plain", "fused"):
        found = [100 * row["accuracy"] for row in rows if row["kernels"] == kernels]
        each = ", ".join(f"{one:.2f}" for one in found)
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        lines.append(f"| {kernels} | {each} | {statistics.fmean(found):.2f} | {spread:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
