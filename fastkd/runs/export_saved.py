"""`fastkd export`: a finished run or a weight file becomes a file for other programs.

`fastkd.deploy` writes it; here the network is opened, and the images of its run on which the file
is compared with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import open_world
from fastkd.config.section import Normalization
from fastkd.data import DataPair
from fastkd.data.batch import Batch
from fastkd.data.normalization import normalization
from fastkd.deploy.export import Exported, Proof, Prove, export_network
from fastkd.deploy.metadata import UNCHANGED
from fastkd.deploy.numerics import Meter
from fastkd.deploy.source import Choice, Source
from fastkd.deploy.target import check_target
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluate
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.models.card import title_of
from fastkd.models.registry import model_from_file
from fastkd.output.call_record import read_call
from fastkd.output.console import Console
from fastkd.printable import shown
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.evaluate_onnx import ON_CPU
from fastkd.runs.evaluate_saved import as_shown, built_for, names_data, no_student_keys, recipe_for
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.storage.description import facts_of
from fastkd.storage.facts import DataFacts
from fastkd.storage.file_kinds import weights_in
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.class_names import map_by_name
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher

__all__ = ["Request", "export"]

_BATCH = 32
_KEPT = 1 << 26
"""Numbers of a file's answers that are kept, to be evaluated without asking again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What shall be exported, and on which images it is compared."""

    what: str
    """A run folder, or the name of a network."""
    weights: str | None = None
    """Of a network by name."""
    keys: tuple[str, ...] = ()
    check: int | None = 512
    """Validation images; None: all."""
    command: str = ""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A network with its weights."""

    model: nn.Module
    file: WeightFile
    recipe: Recipe | None
    """Which images it is for; None: nobody has said it."""
    asked: bool
    """Whether keys name the images, which then must be there."""
    teacher: str | None = None


def export(
    request: Request,
    out: str,
    choice: Choice,
    *,
    force: bool = False,
    push: str | None = None,
    say: Callable[[str], None] = print,
) -> Exported:
    """Export the student of a run, or a network by name with its weights.

    say: shows remarks. Raises what `export_network` raises.
    """
    check_target(Path(out), force=force, files=choice.files)
    opened = _open_run(request) if request.weights is None else _open_named(request)
    _check_source(Path(out), Path(opened.file.given))
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=False), Path("runs"))
        recipe = opened.recipe and opened.recipe.model_copy(update=ON_CPU)
        data = None if recipe is None else _data(recipe, session, opened, say)
        if recipe is None:
            say("no images are named (data.name=.. data.root=..): compared on noise")
        source = _source(opened, data, request)
        prove = None
        if recipe is not None and data is not None:
            prove = _on_images(source, data, session.placement(recipe), request.check)
        return export_network(source, out, choice, prove=prove, force=force, push=push)


def _check_source(target: Path, weights: Path) -> None:
    """UserError if the file would take the place of the weights that it is made from."""
    weights = weights_in(weights) if weights.is_dir() else weights
    if target.exists() and any(map(target.samefile, (weights, weights.parent))):
        raise UserError(
            f"--out {shown(target)} holds the weights that are exported, which an export never "
            f"replaces: choose another"
        )


def _open_run(request: Request) -> _Opened:
    folder = Path(request.what)
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{request.what} is not a run folder (no config.yaml); a network by name needs its "
            f"weights: fastkd export NAME --weights FILE --out PATH"
        )
    weights = folder / "best.safetensors"
    if not weights.exists():
        raise UserError(f"{request.what} has no best.safetensors yet: nothing was evaluated so far")
    no_student_keys(request.what, request.keys, "exported")
    file = WeightFile.open(weights)
    model = model_from_file(file)
    if read_call(folder) is None:
        recipe = load_recipe(None, config=folder / "config.yaml", overrides=request.keys)
        teacher = " + ".join(one.name for one in recipe.teachers().values()) or None
    else:
        # A run of fastkd.distill: its images are in the script that made it.
        name = facts_of(model).architecture
        assert name is not None
        recipe = recipe_for(name, request.keys) if names_data(request.keys) else None
        teacher = None
    recipe = recipe and as_shown(recipe, file.network.data)
    asked = any(key.startswith("data.") for key in request.keys)
    return _Opened(model, file, recipe, asked, teacher)


def _open_named(request: Request) -> _Opened:
    recipe = recipe_for(request.what, request.keys, request.weights)
    assert request.weights is not None
    file = WeightFile.open(request.weights, recipe.student.weights_key)
    model = _built(recipe, file)
    named = names_data(request.keys)
    recipe = as_shown(recipe, facts_of(model).data)
    return _Opened(model, file, recipe if named else None, named)


def _built(recipe: Recipe, file: WeightFile) -> nn.Module:
    """With as many classes as the file says, or its last matrix has rows."""
    if file.network.num_classes is not None:
        return built_for(recipe, file, file.network.num_classes)
    matrices = [tensor for tensor in file.tensors.values() if tensor.dim() == 2]
    rows = matrices[-1].shape[0] if matrices else None
    if ":" not in recipe.student.name:
        return built_for(recipe, file, rows)
    try:
        return built_for(recipe, file, None)
    except UserError:
        if rows is None:
            raise
        return built_for(recipe, file, rows)


def _data(
    recipe: Recipe, session: Session, opened: _Opened, say: Callable[[str], None]
) -> DataPair | None:
    """The images; None if they are not here and no key has asked for them."""
    keys = recipe.data.model_copy(update={"drop_last": False, "train_limit": None})
    recipe = recipe.model_copy(update={"data": keys, "batch_size": _BATCH})
    try:
        return open_recipe_data(recipe, session)
    except (UserError, OSError) as error:
        if opened.asked:
            raise
        say(
            f"note: the images of the run cannot be opened here ({error}): compared on noise; "
            f"data.root=FOLDER says where they are"
        )
        return None


def _source(opened: _Opened, data: DataPair | None, request: Request) -> Source:
    facts = facts_of(opened.model)
    known = facts.data or DataFacts()
    framing = known.evaluation
    recipe = opened.recipe or recipe_for("resnet20", request.keys, request.weights)
    keys = recipe.data
    if data is not None:
        framing = data.facts.evaluation or framing
        known = known.model_copy(
            update={
                "name": data.name,
                "classes": known.classes or data.facts.classes,
                "image_size": known.image_size or data.facts.image_shape[1],
            }
        )
    elif framing is not None and (side := keys.eval_crop or keys.image_size):
        framing = framing if str(framing.mode) == "whole" else framing.at(side)
    known = known.model_copy(update={"evaluation": framing})
    told = facts.normalization
    if keys.mean or keys.std:
        mean, std = normalization(keys.name)
        told = (keys.mean or mean, keys.std or std)
    if told is None and data is not None:
        told = data.facts.normalization
    facts = replace(facts, normalization=told, data=known if known != DataFacts() else None)
    size = keys.eval_crop or keys.image_size
    written = opened.file.facts
    return Source.of(
        opened.model,
        facts=facts,
        size=framing.crop if framing else size,
        multiple=getattr(keys, "multiple", 1),
        recipe=written.get("recipe"),
        digest=written.get("digest"),
        metrics={name: _number(written[name]) for name in HEADLINES if name in written},
        teacher=opened.teacher,
        command=request.command,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _on_images(source: Source, data: DataPair, placement: Placement, check: int | None) -> Prove:
    """Compares on validation images of a run."""
    facts, kind = source.facts, data.facts.label_kind
    if facts.num_classes:
        cure = "Name the data it was trained on"
        title = f"the network {source.title}"
        order = map_by_name(facts.data, data.facts.classes, network=title, cure=cure)
        if order is None and facts.num_classes != data.facts.num_classes:
            raise UserError(
                f"{title} knows {facts.num_classes} classes, {data.name} has "
                f"{data.facts.num_classes}: name the data it was trained on"
            )
    else:
        order = None

    def answering(model: nn.Module, expected: Normalization | None) -> Callable[[Tensor], Tensor]:
        return Teacher(
            LoadedNet(model, expected, class_map=order, name=title_of(model)),
            {},
            placement,
            data_normalization=data.facts.normalization,
            fold_batch_norm=False,
        ).logits

    def prove(plain: nn.Module, network: nn.Module, inside: Normalization | None) -> Proof:
        expected = source.normalization
        pair = _Pair(
            answering(plain, expected),
            answering(network, UNCHANGED if inside else expected),
            Meter(classes=source.answers != "embedding"),
        )
        loader = data.val if check is None else _Spread(data.val, check)
        found: dict[str, Any] = {}
        if source.answers == "embedding":
            for batch in loader.epoch(0):
                pair.both(batch.images_NCHW)
        else:
            for title, forward in (("network", pair.both), ("file", pair.again)):
                reached = evaluate(forward, loader, placement.precision, placement.world, kind)
                metric = headline(reached)
                found[f"{HEADLINES[metric]} of the {title}"] = f"{reached[metric]:.2%}"
        compared = pair.meter.result()
        return Proof(f"{compared.images:,} validation images of {data.name}", compared, found)

    return prove


class _Pair:
    """Both networks on the same batches, first together, then the file alone."""

    def __init__(
        self,
        source: Callable[[Tensor], Tensor],
        exported: Callable[[Tensor], Tensor],
        meter: Meter,
    ) -> None:
        self.source, self.exported, self.meter = source, exported, meter
        self.kept: list[Tensor] = []
        self.numbers = self.next = 0

    def both(self, images_NCHW: Tensor) -> Tensor:
        """The source's answers; the other's are compared, and kept while there are few."""
        images_NCHW = images_NCHW.float()
        source, exported = self.source(images_NCHW), self.exported(images_NCHW)
        self.meter.add(source, exported)
        self.numbers += exported.numel()
        if self.numbers < _KEPT:
            self.kept.append(exported)
        return source

    def again(self, images_NCHW: Tensor) -> Tensor:
        """The file's answers to the same batches in the same order."""
        self.next += 1
        if self.next <= len(self.kept):
            return self.kept[self.next - 1]
        return self.exported(images_NCHW.float())


class _Spread:
    """Some of the batches of a loader, evenly spread: images of a folder come class by class."""

    def __init__(self, loader: Any, images: int) -> None:
        self.loader = loader
        self.batches = -(-images // _BATCH)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches; others are not read."""
        steps = self.loader.steps_per_epoch
        if self.batches >= steps:
            yield from self.loader.epoch(epoch, start_step)
            return
        for number in range(self.batches):
            step = number * steps // self.batches
            yield next(iter(self.loader.epoch(epoch, step)))
