"""The arguments of `fastkd.distill`: checked, and converted to what the trainer takes."""

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import nn

from fastkd.augment.config import PickConfig
from fastkd.augment.pick import PickCriterion
from fastkd.config.mistakes import explain
from fastkd.data.loaders.label_rules import LabelUse
from fastkd.errors import UserError
from fastkd.losses.base.needs import NeedRule, first_unmet
from fastkd.losses.base.term import LossTerm
from fastkd.losses.drop_in import KDLoss
from fastkd.losses.logits import KD
from fastkd.models.card import title_of
from fastkd.models.intake import Remedy, is_quantised
from fastkd.models.taps import check_network
from fastkd.models.unwrap import unwrapped
from fastkd.teachers.loaded import LoadedNet
from fastkd.training.config import OptimConfig

__all__ = [
    "check_callback",
    "check_choice",
    "check_mode",
    "check_needs",
    "check_numbers",
    "check_student",
    "label_use",
    "loaded_teachers",
    "networks_of",
    "optim_config",
    "pick_config",
    "terms_of",
]

_UNMET: dict[NeedRule, str] = {
    "pick": "pick chooses x' by the teacher's answers to it, which no loss uses: give "
    "xprime='cutmix' and losses=[KD(views=('x', 'xprime'))]",
    "xprime unused": "xprime={xprime} would make a view x' that no loss uses: give "
    "losses=[KD(views=('x', 'xprime'))], or leave it out",
    "teacher": "{loss} needs a teacher but teacher is None; use losses=[CrossEntropy()]",
    "xprime": "{loss} needs the view x': give xprime='cutmix' or xprime='mixup'",
}


def check_mode() -> None:
    """UserError under torch.inference_mode(), whose tensors no gradient may meet."""
    if torch.is_inference_mode_enabled():
        raise UserError(
            "nothing can be trained under torch.inference_mode(): call fastkd outside of it"
        )


def _check_made_for_training(called: str, network: nn.Module) -> None:
    """UserError if tensors of a network were made under torch.inference_mode()."""
    if any(one.is_inference() for one in (*network.parameters(), *network.buffers())):
        raise UserError(
            f"distill: the {called} {title_of(network)} was built or loaded under "
            f"torch.inference_mode(), whose tensors cannot be changed outside it: build it outside"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """UserError for a value that is not one of the choices."""
    if value not in choices:
        raise UserError(f"distill: {name}={value!r}; choose one of {', '.join(choices)}")


def check_callback(on_epoch: object) -> None:
    """UserError for a callback that cannot be called with a row."""
    if on_epoch is None:
        return
    if not callable(on_epoch):
        raise UserError(
            f"distill: on_epoch={on_epoch!r}; expected a function of one argument, an epoch's row "
            f"of metrics, as in on_epoch=lambda row: print(row['val_accuracy'])"
        )
    try:
        signature(on_epoch).bind({})
    except TypeError as error:
        raise UserError(
            f"distill: on_epoch is called with one argument, an epoch's row of metrics, which "
            f"{getattr(on_epoch, '__name__', on_epoch)} does not take ({error})"
        ) from None
    except ValueError:
        pass  # a builtin that does not say what it takes


def check_numbers(epochs: object, accumulate: object, ema: float | None) -> None:
    """UserError for a length below 1, or an average that never moves."""
    for name, number in (("epochs", epochs), ("accumulate", accumulate)):
        if not isinstance(number, int) or number < 1:
            raise UserError(f"distill: {name}={number!r}; expected a whole number above 0")
    if ema is not None and not 0 <= ema < 1:
        raise UserError(f"distill: ema={ema!r}; expected a decay from 0 to below 1, or None")


def networks_of(student: nn.Module, given: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The student and the list of teachers, without wrappers.

    Raises:
        UserError: one is not a network, or a teacher has layers that are trained as the student's.
    """
    # A name is a sequence too.
    several = isinstance(given, nn.ModuleList | Sequence) and not isinstance(given, str)
    teachers: list[Any] = list(given) if several else [] if given is None else [given]
    check_network("distill: student", student)
    for teacher in teachers:
        check_network("distill: teacher", teacher)
    student, teachers = unwrapped(student), [unwrapped(teacher) for teacher in teachers]
    trained = {parameter for parameter in student.parameters() if parameter.requires_grad}
    for teacher in teachers:
        if teacher is student or not trained.isdisjoint(teacher.parameters()):
            what = "are one object" if teacher is student else "share layers that are to be trained"
            raise UserError(
                f"distill: student and teacher {what}, and the teacher is frozen: give it its own "
                f"copy, copy.deepcopy(model)"
            )
    return student, teachers


def check_student(student: nn.Module) -> None:
    """UserError for a student that cannot be trained in fp32 as it is."""
    _check_made_for_training("student", student)
    types = {p.dtype for p in student.parameters() if p.is_floating_point()}
    quantised = is_quantised(student)
    if quantised or not any(True for _ in student.parameters()):
        raise UserError(
            f"distill: the student {title_of(student)} cannot be trained, its weights are "
            f"{'quantised' if quantised else 'missing or constants'}: give the network that it was "
            f"made of"
        )
    if others := types - {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        raise UserError(
            f"distill: weights of the student {title_of(student)} are {found}, and it is trained "
            f"in float32 (precision='bf16' computes in bf16): give student.float()"
        )
    try:
        student.train(student.training)
    except NotImplementedError:
        raise UserError(
            "distill: the student is an exported program, which cannot be switched between "
            "training and evaluation: give the network that it was exported from"
        ) from None


def loaded_teachers(teachers: Sequence[nn.Module], resolution: object) -> tuple[LoadedNet, ...]:
    """The teachers with the side of the images that each sees; None: that of the loader's."""
    sides: list[Any] = [resolution] * len(teachers)
    if isinstance(resolution, tuple | list):
        sides = list(resolution)
    for side in sides:
        if side is not None and (type(side) is not int or side < 1):
            raise UserError(
                f"distill: teacher_resolution={resolution!r}; expected a side in pixels such as "
                f"224, or a list with one for each teacher, None for that of the loader's images"
            )
    if len(sides) != len(teachers):
        raise UserError(
            f"distill: teacher_resolution={resolution!r} is for {len(sides)} teachers, there are "
            f"{len(teachers)}"
        )
    remedy = Remedy("give teacher_resolution={0}", "give precision='fp32'")
    return tuple(
        LoadedNet(model, name=title_of(model), resolution=side, remedy=remedy)
        for model, side in zip(teachers, sides, strict=True)
    )


def terms_of(losses: object) -> list[LossTerm]:
    """The losses as they were given, KD for None; UserError if they are not a list of LossTerms."""
    if losses is None:
        return [KD()]
    if isinstance(losses, nn.Module | type) or not isinstance(losses, Iterable):
        raise UserError(f"distill: losses={_called(losses)}; expected a list, such as [KD()]")
    terms = list[LossTerm]()
    for term in losses:
        if isinstance(term, KDLoss):
            raise UserError(
                "distill: KDLoss is a function of logits, for your own training loop; in "
                "losses=[..] the same loss is KD(temperature=.., weight=.., ce_weight=..)"
            )
        if isinstance(term, type) and issubclass(term, LossTerm):
            raise UserError(f"distill: losses=[{term.__name__}] has a class; call it, as in [KD()]")
        if not isinstance(term, LossTerm):
            raise UserError(
                f"distill: losses has {_called(term)}; expected LossTerms, such as KD() or "
                f"AT(pairs=..), or a class of your own derived from fastkd.losses.LossTerm"
            )
        terms.append(term)
    if not terms:
        raise UserError("losses=[] would train nothing: leave it out for KD, or give a loss")
    return terms


def _called(given: object) -> str:
    if isinstance(given, nn.Module):
        return f"{type(given).__name__}(..)"
    return given.__name__ if isinstance(given, type) else repr(given)


def label_use(terms: Sequence[LossTerm]) -> LabelUse:
    """What the losses do with the labels of the training images."""
    readers = [term for term in terms if term.label_kind]
    reads = next((term.name for term in readers), None)
    return LabelUse(
        reads=reads,
        multi=any(term.label_kind == "multi" for term in readers),
        soft=all(term.takes_soft_labels for term in readers if term.label_kind == "class"),
        needed=reads if len(readers) == len(terms) else None,
        ids=next((term.name for term in terms if term.uses_index), None),
        # The last: another loss than KD, which names itself as the way out.
        classes=next((t.name for t in reversed(readers) if not t.takes_no_label), None),
    )


def pick_config(pick: PickConfig | PickCriterion | None) -> PickConfig | None:
    """The pick with all of its settings; UserError for an unknown criterion."""
    criteria = get_args(PickCriterion)
    if pick is None or isinstance(pick, PickConfig):
        return pick
    if pick not in criteria:
        raise UserError(
            f"distill: pick={pick!r}; choose one of {', '.join(criteria)}, or give a PickConfig"
        )
    return PickConfig(criterion=pick)


def check_needs(terms: Sequence[LossTerm], *, has_teacher: bool, xprime: str, picks: bool) -> None:
    """UserError if a loss lacks its net or view, or no loss uses a view or a pick."""
    needs = {f"{number} {type(term).__name__}": term.needs for number, term in enumerate(terms)}
    unmet = first_unmet(needs, has_teacher=has_teacher, xprime=xprime, picks=picks)
    if unmet is not None:
        loss = unmet.loss.partition(" ")[2]
        raise UserError(_UNMET[unmet.rule].format(loss=loss, xprime=repr(xprime)))


def optim_config(optim: OptimConfig | None, epochs: int, lr: float | None) -> OptimConfig:
    """Optimizer and schedule, milestones in epochs of this run; UserError for a bad value."""
    config = optim or OptimConfig(schedule="cosine")
    keys = config.model_dump()
    keys["milestones"] = tuple(m * epochs if m < 1 else m for m in config.milestones)
    if lr is not None:
        keys["lr"] = lr
    try:
        return OptimConfig.model_validate(keys)
    except ValidationError as error:
        mistakes = explain(error, OptimConfig, keys, ())
        raise UserError(f"distill: {'; '.join(mistakes)}") from None
