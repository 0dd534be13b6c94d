"""`compress`: from a network and a target to a measured student, in phases that resume.

    1 original   it is trained if there are no weights, measured and counted
    2 costs      each candidate block at each layer shape, on the target
    3 search     students under the target, scored by Fisher potential and measured whole
    4 ranking    a short distillation of the best, judged by held back training images
    5 baselines  the original made shallower and narrower to the same cost
    6 training   all of them distilled alike, for all seeds
    7 result     exported, measured again in turns, one table, one picture

The search and its costs do not need the trained original, so `--dry-run` ends after it.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.compress.folder import CompressFolder
from fastkd.compress.lessons import Lessons, original_of
from fastkd.compress.proposing import Bench, Search, propose
from fastkd.compress.report import Row, proposals_table, result_of, spearman
from fastkd.compress.scaled import depth_scaled, width_scaled
from fastkd.compress.shrinking import steps_between
from fastkd.compress.space import space_of
from fastkd.compress.student import Student, start_weights
from fastkd.compress.table import Meter, Table
from fastkd.compress.target import Target
from fastkd.data import DataPair
from fastkd.deploy.latency.backends import BACKENDS
from fastkd.deploy.source import Choice
from fastkd.errors import RunFailed, UserError
from fastkd.evaluation.headline import headline
from fastkd.models.counting.count import count
from fastkd.output.occupancy import occupied
from fastkd.recipe.schema import Recipe
from fastkd.runs.export_saved import Request as ExportRequest
from fastkd.runs.export_saved import export
from fastkd.runs.stages import Session, open_recipe_data, run_recipe
from fastkd.teachers.loading import load_teacher

__all__ = ["Request", "compress"]

_FISHER_BATCHES = 2
_TURNS = 3
"""How often the last measurement goes through all networks."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for; the words of the command."""

    model: str
    target: Target
    weights: str | None = None
    keys: tuple[str, ...] = ()
    """Recipe keys for all trainings."""
    short_epochs: int = 5
    keep: int = 8
    draws: int = 100
    stages: int = 1
    seeds: int = 1
    dry_run: bool = False


def compress(
    request: Request, folder: Path, session: Session, meter: Meter
) -> dict[str, Any] | None:
    """Run what is not done yet in the folder; the result, or None after a dry run.

    Raises:
        UserError: the target cannot be met, or the words do not fit together.
        Interrupted: Ctrl-C; the same call resumes.
    """
    if session.world.size > 1:
        raise UserError("fastkd compress runs in one process: start it without torchrun")
    original, weights = original_of(request.model, request.weights, request.keys)
    asked = {key: one for key, one in asdict(request).items() if key not in ("dry_run", "seeds")}
    lessons = Lessons(original, weights, request.keys, folder)
    CompressFolder.check(folder)
    with occupied(folder, session.world):
        opened = CompressFolder(folder, asked)
        within = replace(session, root=folder / "runs")
        with opened.advising():
            return _Job(request, opened, within, meter, original, lessons).run()


@dataclass
class _Job:
    request: Request
    folder: CompressFolder
    session: Session
    meter: Meter
    original: Student
    lessons: Lessons

    @cached_property
    def data(self) -> DataPair:
        data = open_recipe_data(self.lessons.recipe, self.session)
        if data.facts.label_kind != "class":
            raise UserError(
                f"fastkd compress is for images with one class each, and {data.name} labels "
                f"{'pixels' if data.facts.label_kind == 'pixel' else 'several at once'}"
            )
        if data.facts.num_classes == 1:
            raise UserError(
                f"{data.name} has one class, and there is nothing to tell apart: add images of "
                f"another"
            )
        self.lessons.see(data)
        data.train  # noqa: B018 - a batch size that does not fit is told before it is measured
        return data

    @cached_property
    def bench(self) -> Bench:
        facts = self.data.facts
        table = Table(self.folder.path / "costs.jsonl", self.meter.target)
        return Bench(self.meter, table, facts.num_classes, facts.image_shape, self.say)

    def say(self, text: str) -> None:
        self.session.console.note(text)

    def title(self, number: int, text: str) -> None:
        self.say(f"[{number}/7] {text}")

    def run(self) -> dict[str, Any] | None:
        """All phases."""
        self.title(1, f"original: {self.original.name}")
        data = self.data
        if not self.lessons.trains:  # weights that do not fit are told before anything is measured
            load_teacher(self.lessons.recipe.teacher, data)
        if self.folder.read(f"measured-{_TURNS}.json") is None:
            _ = self.bench  # a table of elsewhere is refused before any training
        where = ", ".join(f"{key} {value}" for key, value in self.meter.target.items())
        self.title(2, f"costs: {where}")
        found = self.folder.phase("search", lambda: propose(self.search, self.say))
        self.title(3, "students under the target")
        for line in proposals_table(found, self.request.target):
            self.say(line)
        if self.request.dry_run:
            return None
        if self.lessons.trains:
            self.title(1, f"training the original: {self.original.name}")
            self._trained(self.lessons.of_original())
        self.title(4, f"{self.request.short_epochs} epochs for each of {len(found['students'])}")
        ranked = self.folder.phase("ranking", lambda: self._rank(found["students"]))
        self._say_ranking(ranked)
        chosen = Student.of_plain(ranked["students"][0])
        quantity = self.request.target.quantity
        self.title(5, f"the original made shallower and narrower to the same {quantity}")
        baselines = self.folder.phase("baselines", lambda: self._baselines(chosen, found["scale"]))
        students = {"chosen": chosen}
        for name, plain in baselines.items():
            if plain is None:
                self.say(f"  {name}: no {self.original.name} costs as little")
            else:
                students[name] = Student.of_plain(plain)
                self.say(f"  {name}: {students[name].title}")
        self.title(6, f"distilling {len(students)} students")
        trained = {
            name: [self._distilled(student, name, seed) for seed in self._seeds()]
            for name, student in students.items()
        }
        self.title(7, "measured again, in turns")
        return self._result(found, ranked, students, trained)

    def _seeds(self) -> list[int]:
        first = self.lessons.recipe.seed
        return [first + number for number in range(self.request.seeds)]

    @cached_property
    def search(self) -> Search:
        images: list[tuple[Tensor, Tensor]] = []

        def batches() -> list[tuple[Tensor, Tensor]]:
            if not images:
                for batch in self.data.train.epoch(0):
                    images.append((batch.images_NCHW.float(), batch.labels_N))
                    if len(images) == _FISHER_BATCHES:
                        break
            return images

        return Search(
            self.request.target,
            self.original,
            self.request.keep,
            self.request.draws,
            self.lessons.recipe.seed,
            batches,
            self.session.world.device,
            self.bench,
        )

    def _rank(self, students: list[dict[str, Any]]) -> dict[str, Any]:
        """By a short distillation; of equal ones by Fisher potential."""
        rows, failed = [], None
        for number, row in enumerate(students, 1):
            student = Student.of_plain(row)
            self.say(f"  {number}/{len(students)}  {student.digest}  {student.label}")
            title = f"short-{student.digest}"
            recipe = self._recipe(
                student, title, self._seeds()[0], self.request.short_epochs, ranking=True
            )
            try:
                accuracy = _accuracy(self._trained(recipe))
            except RunFailed as error:  # one that diverges is the worst, and no more
                self.say(f"  failed: {error}")
                accuracy, failed = 0.0, error
            rows.append(row | {"accuracy": accuracy})
        if failed is not None and not any(row["accuracy"] for row in rows):
            raise failed
        correlation = spearman([r["potential"] for r in rows], [r["accuracy"] for r in rows])
        rows.sort(key=lambda row: (-row["accuracy"], -row["potential"]))
        return {"students": rows, "rank_correlation": correlation}

    def _say_ranking(self, ranked: Mapping[str, Any]) -> None:
        for row in ranked["students"]:
            self.say(
                f"  {row['accuracy']:.2%}  Fisher potential {row['potential']:.3g}  "
                f"{self.request.target.words(row['cost'])}  {row['id']}  {row['label']}"
            )
        found = ranked["rank_correlation"]
        said = "not defined" if found is None else f"{found:+.2f}"
        self.say(
            f"rank correlation of Fisher potential and short distillation: {said} "
            f"(n={len(ranked['students'])})"
        )

    def _baselines(self, chosen: Student, scale: float) -> dict[str, Any]:
        facts, options = self.data.facts, self.original.options
        limit = self.search.cost(chosen)
        space = space_of(self.original.name, facts.num_classes, facts.image_shape, options)
        prices = replace(self.search.prices(space, quiet=True), scale=scale)
        deep = depth_scaled(prices, limit, self.search.cost)
        wide = width_scaled(self.original.name, options, limit, self.search.cost)
        return {
            "depth-scaled": deep and deep.plain(),
            "width-scaled": wide and wide.plain(),
        }

    def _recipe(
        self,
        student: Student,
        title: str,
        seed: int,
        epochs: int | None = None,
        source: Path | None = None,
        *,
        ranking: bool = False,
    ) -> Recipe:
        """Of one training, with its first weights written."""
        start = self.folder.path / "runs" / f"{title}-start.safetensors"
        if not start.exists():
            start.parent.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                taken = start_weights(
                    student, self.data.facts.num_classes, source or self.lessons.weights, start
                )
            of = "the original" if source is None else source.name
            self.say(f"  {title}: {taken} are those of {of}")
        return self.lessons.of(student, title, start, epochs=epochs, seed=seed, ranking=ranking)

    def _distilled(self, student: Student, name: str, seed: int) -> dict[str, Any]:
        """Distil for the full length, in stages that shrink towards it; its summary."""
        title, stages = f"{name}-seed{seed}", self.request.stages
        epochs = None if stages == 1 else self.lessons.epochs_of(stages)
        source = None
        for number, middle in enumerate(steps_between(self.original, student, stages), 1):
            recipe = self._recipe(middle, f"{title}-stage{number}", seed, epochs, source)
            self._trained(recipe)
            source = Path(str(recipe.out))
        return self._trained(self._recipe(student, title, seed, epochs, source))

    def _trained(self, recipe: Recipe) -> dict[str, Any]:
        """Train it, or read what it reached before."""
        assert recipe.out is not None
        resume = "auto" if Path(recipe.out).exists() else None
        with self.session.console.without_tables():
            return run_recipe(recipe, self.session, resume=resume) | {"folder": recipe.out}

    def _result(
        self,
        found: Mapping[str, Any],
        ranked: Mapping[str, Any],
        students: Mapping[str, Student],
        trained: Mapping[str, list[dict[str, Any]]],
    ) -> dict[str, Any]:
        onnx = self.folder.path / "student.onnx"
        run = trained["chosen"][0]["folder"]
        if not onnx.exists():
            done = export(ExportRequest(what=run, command="fastkd compress"), str(onnx), Choice())
            self.say(f"exported {done.path}, compared on {done.proof.on}")
        measured = self._in_turns(students, onnx)
        facts = self.data.facts
        accuracies = {name: [_accuracy(one) for one in runs] for name, runs in trained.items()}
        accuracies["original"] = [self._of_original(trained)]
        rows = []
        for name, student in {"original": self.original, **students}.items():
            size = count(student.build(facts.num_classes), facts.image_shape)
            label = student.title
            rows.append(Row(name, label, accuracies[name], measured[name], size.macs, size.params))
        return result_of(
            rows,
            self.request.target,
            self.folder,
            limit=None if self.request.target.share else found["limit"],
            extra={
                "rank_correlation": ranked["rank_correlation"],
                "meter": dict(self.meter.target),
                "genotype": students["chosen"].plain(),
                "run": run,
                "onnx": str(onnx),
                "seeds": self._seeds(),
            },
            say=self.say,
        )

    def _of_original(self, trained: Mapping[str, list[dict[str, Any]]]) -> float:
        """As the runs evaluated it as their teacher."""
        teacher = trained["chosen"][0]["teacher"]
        return float(teacher[headline(teacher)])

    def _in_turns(self, students: Mapping[str, Student], onnx: Path) -> dict[str, list[float]]:
        """p10, p50 and p90 of each network, as medians over the turns; the student as exported."""
        facts = self.data.facts
        networks: dict[str, nn.Module | Path] = {
            name: student.build(facts.num_classes).eval()
            for name, student in {"original": self.original, **students}.items()
        }
        if self.meter.target.get("batch", "1") == "1" and _takes_files(self.meter.target):
            networks["chosen"] = onnx

        def turn() -> dict[str, dict[str, float]]:
            return {
                name: asdict(self.meter.whole(one, facts.image_shape))
                for name, one in networks.items()
            }

        turns: list[dict[str, dict[str, float]]] = []
        for number in range(1, _TURNS + 1):
            turns.append(self.folder.phase(f"measured-{number}", turn))
            medians = (f"{name} {one['p50_ms']:.4g} ms" for name, one in turns[-1].items())
            self.say(f"  {number}/{_TURNS}  {', '.join(medians)}")
        return {
            name: [
                statistics.median(one[name][f"{p}_ms"] for one in turns)
                for p in ("p10", "p50", "p90")
            ]
            for name in networks
        }


def _takes_files(target: Mapping[str, str]) -> bool:
    backend = BACKENDS.get(target.get("on", ""))
    return backend is not None and backend.takes_files


def _accuracy(summary: Mapping[str, Any]) -> float:
    return float(summary[f"{headline(summary)}_last"])
