"""The folder of a call of `fastkd.distill`: chosen, described, compared with a later call.

Flow: `fastkd.api` asks for it once everything fits. With `resume=True` any state of a folder is
right as long as a call with the same arguments made it.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd.augment.config import PickConfig
from fastkd.compute.machine import environment
from fastkd.compute.ranks import World, on_main
from fastkd.errors import Interrupted, UserError
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import card_of, title_of
from fastkd.output.call_record import differences, how_to_resume, read_call, record
from fastkd.output.run_folder import RunFolder
from fastkd.storage.checkpoint import Checkpoint
from fastkd.teachers.loaded import LoadedNet
from fastkd.training.config import OptimConfig
from fastkd.training.settings import TrainData

__all__ = ["advice", "check_state", "choose_folder", "describe", "digested"]


def choose_folder(
    out: str | Path | None, call: Mapping[str, Any], *, resume: bool
) -> RunFolder | None:
    """The folder to write to: a new one, or with `resume` one that a call like this one made."""
    if out is None:
        if resume:
            raise UserError("resume=True needs out=, the folder to resume or to start")
        return None
    path = Path(out).expanduser()
    if path.is_dir() and any(path.iterdir()):
        made_by = read_call(path)
        if not resume:
            cure = "choose another folder"
            if made_by is not None:
                cure = "resume=True continues it, or gives its result; or " + cure
            raise UserError(f"out={out} exists and is not empty: {cure}")
        folder = RunFolder.open(path)
        if made_by is None and (path / "config.yaml").exists():
            raise UserError(
                f"out={out} is the run folder of a recipe: fastkd train --resume {out} resumes it; "
                f"choose another folder for this call"
            )
        return folder
    folder = RunFolder.create(Path("runs"), "distill", "", out=path)
    folder.write_text("config.yaml", record(call))
    folder.write_json("environment.json", environment())
    return folder


def check_state(
    folder: RunFolder | None,
    checkpoint: Checkpoint | None,
    call: Mapping[str, Any],
    world: World,
    *,
    finished: bool,
) -> None:
    """UserError if another call made the folder and its checkpoint, or a finished run lacks it."""
    if folder is None:
        return
    there = on_main(world, lambda: read_call(folder.path)) or {}
    digest = checkpoint.state["digest"] if checkpoint else there.get("digest", call["digest"])
    if digest != call["digest"]:
        unlike = "; ".join(differences(there, call)) if there else ""
        raise UserError(
            f"{folder.path} belongs to a run with other arguments ("
            f"{unlike or 'its networks, losses or loaders differ'}): resume it with the same ones, "
            f"or choose another folder with out="
        )
    if _taught_by_others(there, call):
        raise UserError(
            f"{folder.path} was begun with other weights in its teacher: load the same ones, or "
            f"choose another folder with out="
        )
    if finished and checkpoint is None:
        raise UserError(
            f"the run in {folder.path} is finished, but its last.pt is gone, and with it the "
            f"student of the last epoch. fastkd.storage.weights.load_into(student, "
            f"{str(folder.path)!r}) loads the best one; to train again choose another folder"
        )
    if not there:
        # A folder of fastkd 0.1, or one whose run was killed before it was described.
        on_main(world, lambda: folder.write_text("config.yaml", record(call)))


def _taught_by_others(there: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
    """Whether the teachers of two calls differ in their weights. 0.1 did not note them."""
    noted = [one.get("weights") for one in there.get("teachers") or ()]
    return all(noted) and noted != [one["weights"] for one in call["teachers"] if noted]


def _fingerprint(model: nn.Module) -> str:
    """Eight hex digits of all weights and buffers."""
    found = 0
    for tensor in (*model.parameters(), *model.buffers()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), found)
    return f"{found:08x}"


class _Fact(NamedTuple):
    """What the arguments of a call decide."""

    shown: Mapping[str, Any]
    """In config.yaml, where a difference is named."""
    digested: tuple[Any, ...]
    """In the digest, which must not change: folders of older versions resume."""


def describe(
    run: Mapping[str, Any],
    student: nn.Module,
    loaded: Sequence[LoadedNet],
    terms: Sequence[LossTerm],
    data: TrainData,
    *,
    optim: OptimConfig,
    pick: PickConfig | None,
) -> dict[str, Any]:
    """A call as config.yaml has it, with `digest`: sixteen hex digits that identify it.

    run: its numbers and choices by name. loaded: the teachers.
    """
    sides = [one.resolution for one in loaded]
    steps = data.loader.steps_per_epoch
    optimizer, picking = optim.model_dump(), pick.model_dump() if pick else None
    # In the digest's order.
    facts = (
        _Fact({"losses": {term.name: _loss(term) for term in terms}}, ([*map(digested, terms)],)),
        _Fact({"optim": optimizer}, (optimizer,)),
        _Fact(
            {"student": _network(student)},
            ([(name, tuple(p.shape), p.requires_grad) for name, p in student.named_parameters()],),
        ),
        _Fact(
            {
                "teachers": [
                    _network(one.model)
                    | {"resolution": one.resolution, "weights": _fingerprint(one.model)}
                    for one in loaded
                ]
            },
            (
                [[tuple(p.shape) for p in one.model.parameters()] for one in loaded],
                *([sides] if any(sides) else []),
            ),
        ),
        _Fact(run, (tuple(run.values()),)),
        _Fact({"steps_per_epoch": steps}, (steps,)),
        _Fact({"pick": picking}, (picking,) if picking else ()),
        _Fact({"image_shape": data.facts.image_shape, "classes": data.facts.num_classes}, ()),
    )
    every = tuple(part for fact in facts for part in fact.digested)
    call = {"digest": sha256(repr(every).encode()).hexdigest()[:16], **run}
    for fact in facts:
        call |= fact.shown
    return call


def _loss(term: LossTerm) -> dict[str, Any]:
    """A loss in config.yaml."""
    return {"class": type(term).__qualname__, **_settings(term), "parts": term.weights}


def digested(term: LossTerm) -> tuple[Any, ...]:
    """A loss in the digest: nothing that changes during training."""
    settings = [("class", type(term).__qualname__)]
    settings += [(name, repr(value)) for name, value in _settings(term).items()]
    return (term.name, tuple(map(str, term.needs)), sorted(term.weights.items()), settings)


def _network(model: nn.Module) -> dict[str, Any]:
    """A network in config.yaml."""
    card = card_of(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {"network": title_of(model), "parameters": sum(p.numel() for p in model.parameters())}
    options = {"options": dict(card.options)} if card is not None and card.options else {}
    return facts | options | {"trained": trained}


def _settings(term: LossTerm) -> dict[str, Any]:
    """Temperature, form, ..."""
    plain = (bool, int, float, str, tuple, type(None))
    given = {name: vars(term).get(name) for name in signature(type(term)).parameters}
    return {name: value for name, value in given.items() if isinstance(value, plain)}


@contextmanager
def advice(folder: RunFolder | None) -> Iterator[None]:
    """Add to an interruption how the run goes on."""
    try:
        yield
    except Interrupted as stopped:
        how = "With out=FOLDER the next one can be resumed"
        if folder is not None:
            how = f"To resume it, {how_to_resume(folder.path)}"
        raise Interrupted(f"{stopped} {how}.", stopped.exit_code) from None
