"""The families of recipes in small, as three files of tests and this program run them.

A row of families.yaml is a named recipe with smaller networks and batches of 16; everything else,
its losses, weights, schedules, views and taps, is the recipe's own. The trainer is the one that
`fastkd train` builds. The images are real ones where FASTKD_TEST_DATA has them; without, digits
stand in and only the golden losses are skipped. After a change of numerics

    FASTKD_TEST_DATA=DIR python tests/recipes/family_runs.py [NAME ...]

writes tests/golden/families.json anew, all of it or the named rows.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from fastkd.compute.ranks import World
from fastkd.models import create_model
from fastkd.models.config import StudentConfig
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.catalogue import all_recipes
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.storage.weights import describe, save_weights
from fastkd.teachers.loading import load_teacher
from fastkd.training.step import Prepared, StepOutput
from fastkd.training.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "families.json"
DATA = os.environ.get("FASTKD_TEST_DATA")
STEPS, BATCH, GOLDEN_STEPS = 30, 16, 5
# At a recipe's own rate: rounding decides from the third step on.
OWN_STEPS = 2

Numbers = dict[str, float]

_TABLE = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text())
FAMILIES = {
    name: (recipe, tuple(_TABLE["networks"][networks]))
    for name, (recipe, networks) in _TABLE["families"].items()
}
COMPILED = frozenset(("kd", "crd+tlcutmix-pick", "simkd", "meal_v2-two"))
"""Families that are compiled by default."""
_DEFAULT = {*COMPILED, "at-G:4", "tlcutmix-pick", "jointrd", *list(FAMILIES)[::4]}
"""One family for each way in which a step can differ, and some more."""


def families(default: Collection[str] = _DEFAULT) -> pytest.MarkDecorator:
    """Run a test on these families, with `-m matrix` on all others."""
    names = [
        pytest.param(name, marks=() if name in default else pytest.mark.matrix) for name in FAMILIES
    ]
    return pytest.mark.parametrize("name", names)


ALL = ("device=cpu", "precision=fp32", f"batch_size={BATCH}", "data.drop_last=true")
SCHEDULED = {"name", "schedule", "milestones", "gamma", "warmup_epochs", "clip_norm"}
# What those that have it need for batches of 16 of 480 images.
FEW = {"crd": ("losses.crd.negatives=64",), "pick": (f"augment.pick.images={BATCH}",)}


@dataclass(frozen=True)
class Run:
    """What 30 steps of a family left."""

    asked: dict[str, Any]
    """How the recipe is to be trained, each group of parameters as its optimizer has it."""
    parts: dict[str, dict[str, float]]
    """Per part of the loss, in the first step: its value, and the norm of the gradient that it,
    with its weight, has on the student."""
    steps: list[dict[str, float]]
    """Per step the total, the parts, and what else the trainer reports."""
    skipped: int


class Workplace:
    """The images, copied once, and the trained networks, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, Run] = {}
        self.starts: dict[str, tuple[float, float]] = {}
        self.session = Session(
            World(0, 0, 1, torch.device("cpu"), None), Console(enabled=False), folder
        )
        if not DATA:
            self.data: tuple[str, ...] = (
                "data.name=digits",
                "data.image_size=null",
                f"batch_size={300 // STEPS}",
            )
            return
        # As many as 30 steps want: listing all 60,000 takes longer than a run.
        for split, number in (("train", STEPS * BATCH // 10), ("test", 2)):
            for source in sorted((Path(DATA) / "cifar10" / split).glob("*/")):
                target = folder / "cifar10" / split / source.name
                target.mkdir(parents=True)
                for image in sorted(source.iterdir())[:number]:
                    shutil.copyfile(image, target / image.name)
        self.data = ("data.name=cifar10", "data.image_size=null", f"data.root={folder}")

    def recipe(self, name: str, *words: str) -> Recipe:
        """The recipe of a row, its schedule within one epoch, all trained weights made."""
        entry, small = FAMILIES[name]
        keys = all_recipes()[entry].keys
        few = [word for key, more in FEW.items() if any(key in k for k in keys) for word in more]
        words = (*small, *ALL, *few, *self.data, f"epoch_factor={1 / keys['epochs']}", *words)
        recipe = load_recipe(entry, overrides=words)
        trained: dict[str, StudentConfig] = dict(recipe.teacher.members()) if recipe.teacher else {}
        if recipe.student.weights:
            trained["student"] = recipe.student
        weights = [f"{key}.weights={self.weights(one)}" for key, one in trained.items()]
        return load_recipe(entry, overrides=(*words, *weights))

    def weights(self, config: StudentConfig) -> Path:
        """Those of a network that answers like a trained one: batch norms that have seen the
        images, and logits with a spread of 3 over them."""
        classes = max(getattr(config, "class_map", None) or (9,)) + 1
        options = config.options()
        words = [config.name, str(classes), *(f"{key}-{value}" for key, value in options.items())]
        path = self.folder / (re.sub(r"\W+", "-", "-".join(words)) + ".safetensors")
        if path.exists():
            return path
        torch.manual_seed(7)
        model = create_model(config.name, classes, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        plain = load_recipe(FAMILIES["resnet8"][0], overrides=[*ALL, *self.data])
        images_NCHW = next(open_recipe_data(plain, self.session).train.epoch(0)).images_NCHW
        with torch.no_grad():
            logits_NC = model.train()(images_NCHW)
            *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
            scale = 3 / logits_NC.std(0).mean()
            head.weight.mul_(scale)
            head.bias.sub_(logits_NC.mean(0)).mul_(scale)
        save_weights(path, model, describe(model))
        return path

    def trainer(self, name: str, *words: str) -> Trainer:
        """What `fastkd train` would train."""
        recipe = self.recipe(name, *words)
        data = open_recipe_data(recipe, self.session)
        teacher = load_teacher(recipe.teacher, data)
        trainer = build_stage(recipe, data, teacher, self.session)
        trainer.runner.train()
        return trainer

    def run(self, name: str) -> Run:
        """30 steps, made once."""
        if name not in self.runs:
            trainer = self.trainer(name, "compile=off")
            # Asked first: a schedule writes its momentum over that of the recipe.
            wanted = asked(name, trainer)
            parts, slopes = measured(trainer), slopes_of(trainer)
            steps = list(taken(trainer, trainer.prepare(0)))
            self.runs[name] = Run(wanted, parts, steps, trainer.guard.counts()[1])
            self.starts[name] = steps[0]["loss"], slopes[0]
        return self.runs[name]

    def start(self, name: str) -> tuple[float, float]:
        """Total of the first step and square of the norm of its gradient."""
        if name not in self.starts:
            trainer = self.trainer(name, "compile=off")
            slopes = slopes_of(trainer)
            (step,) = taken(trainer, islice(trainer.prepare(0), 1))
            self.starts[name] = step["loss"], slopes[0]
        return self.starts[name]

    def gentle(self, name: str, *words: str) -> Trainer:
        """The same at a rate at which the first step, along the gradient, takes about 0.2 % of the
        total away, so that rounding never decides."""
        loss, slope = self.start(name)
        lr = 0.002 * loss / slope
        constant = ("optim.schedule=constant", "optim.weight_decay=0")
        return self.trainer(name, f"optim.lr={lr}", *constant, *(words or ("compile=off",)))


def asked(name: str, trainer: Trainer) -> dict[str, Any]:
    """Length and batch as the named recipe has them: those of the row are small."""
    recipe = load_recipe(FAMILIES[name][0])
    return {
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "optim": recipe.optim.model_dump(mode="json", include=SCHEDULED),
        "groups": [
            {"tensors": len(group["params"]), "lr": group["base_lr"]}
            | {key: group[key] for key in ("momentum", "nesterov", "weight_decay") if key in group}
            for group in trainer.optimizer.param_groups
        ],
    }


def taken(trainer: Trainer, batches: Iterable[Prepared], advance: int = 1) -> Iterator[Numbers]:
    """What the trainer reports of every step that it takes; `advance` 0 stays at the first."""
    for number, prepared in enumerate(batches):
        before_M = trainer.totals_M.clone()
        trainer.optimize(prepared, 0, number * advance)
        sums = (trainer.totals_M - before_M).tolist()
        found = dict(zip(trainer.metric_names, sums, strict=True))
        images = found.pop("images")
        found.pop("correct", None)
        yield {key: value / images for key, value in found.items()}


def slopes_of(trainer: Trainer) -> list[float]:
    """A list that takes the square of the gradient's norm in every step."""
    judge, found = trainer.guard.judge, []

    def noting(losses: Tensor, grads: Any, clip_norm: float | None = None) -> Tensor:
        found.append(sum(gradient.square().sum().item() for gradient in grads))
        return judge(losses, grads, clip_norm)

    trainer.guard.judge = noting  # type: ignore[method-assign]
    return found


def measured(trainer: Trainer) -> dict[str, Numbers]:
    """Value and gradient of each part in the next step; a dict that is filled in that step."""
    found: dict[str, Numbers] = {}
    runner, step = trainer.runner, trainer.step
    student = [p for p in step.student.parameters() if p.requires_grad]

    def measuring(*arguments: Any) -> StepOutput:
        trainer.update.runner = runner
        state = {key: value.clone() for key, value in step.state_dict().items()}
        weights = {term.name: term.weights for term in trainer.terms}
        for part in step.part_names:
            for term in trainer.terms:
                own = weights[term.name]
                term.weights = {key: w if key == part else 0.0 for key, w in own.items()}
            with torch.random.fork_rng(devices=[]):
                out = step(*arguments)
            gradients = torch.autograd.grad(out.loss, student, allow_unused=True)
            norms = [gradient.norm() for gradient in gradients if gradient is not None]
            values = dict(zip(step.metric_names, out.metrics_M.tolist(), strict=True))
            found[part] = {
                "value": values[part] / values["images"],
                "gradient": torch.stack(norms).norm().item(),
            }
            step.load_state_dict(state)
        for term in trainer.terms:
            term.weights = weights[term.name]
        return runner(*arguments)

    trainer.update.runner = measuring  # type: ignore[assignment]
    return found


@contextmanager
def at_work(folder: Path) -> Iterator[Workplace]:
    """On one thread, with a cache of its own."""
    threads, cache = torch.get_num_threads(), os.environ.get("FASTKD_CACHE")
    torch.set_num_threads(1)
    os.environ["FASTKD_CACHE"] = str(folder / "cache")
    try:
        yield Workplace(folder)
    finally:
        torch.set_num_threads(threads)
        if cache is None:
            del os.environ["FASTKD_CACHE"]
        else:
            os.environ["FASTKD_CACHE"] = cache


def recorded(workplace: Workplace, name: str) -> dict[str, Any]:
    """What is golden: `totals` are those of the recipe's own rate, `steps` of a gentle one."""
    run, trainer = workplace.run(name), workplace.gentle(name)
    steps = list(taken(trainer, islice(trainer.prepare(0), GOLDEN_STEPS)))
    totals = [step["loss"] for step in run.steps[:OWN_STEPS]]
    return {"asked": run.asked, "totals": totals, "parts": run.parts, "steps": steps}


def main(names: list[str]) -> None:
    """Run the families and write what is golden."""
    if not DATA:
        raise SystemExit("set FASTKD_TEST_DATA to the folder that has cifar10/ in it")
    golden = json.loads(GOLDEN.read_text()) if names else {}
    with tempfile.TemporaryDirectory() as folder, at_work(Path(folder)) as place:
        for name in names or FAMILIES:
            golden[name] = recorded(place, name)
    rows = {name: golden[name] for name in FAMILIES if name in golden}
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
