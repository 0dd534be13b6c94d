"""The arguments of `fastkd.distill`: checked, and converted to what the trainer takes."""

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any, get_args

from pydantic import ValidationError
from torch import nn

from fastkd.augment.config import PickConfig
from fastkd.augment.pick import PickCriterion
from fastkd.config.mistakes import explain
from fastkd.errors import UserError
from fastkd.losses.base.needs import XPRIME_TEACHER_LOGITS
from fastkd.losses.base.term import LossTerm
from fastkd.losses.drop_in import KDLoss
from fastkd.losses.logits import KD
from fastkd.models.taps import check_network
from fastkd.training.config import OptimConfig

__all__ = [
    "check_callback",
    "check_choice",
    "check_needs",
    "check_numbers",
    "optim_config",
    "pick_config",
    "teachers_of",
    "terms_of",
]


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


def teachers_of(student: nn.Module, given: Any) -> list[nn.Module]:
    """The teachers as a list; UserError if one is not a network, or is trained as the student."""
    # A name is a sequence too.
    several = isinstance(given, nn.ModuleList | Sequence) and not isinstance(given, str)
    teachers: list[Any] = list(given) if several else [] if given is None else [given]
    check_network("distill: student", student)
    for teacher in teachers:
        check_network("distill: teacher", teacher)
    trained = {parameter for parameter in student.parameters() if parameter.requires_grad}
    for teacher in teachers:
        if teacher is student or not trained.isdisjoint(teacher.parameters()):
            what = "are one object" if teacher is student else "share layers that are to be trained"
            raise UserError(
                f"distill: student and teacher {what}, and the teacher is frozen: give it its own "
                f"copy, copy.deepcopy(model)"
            )
    return teachers


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
    """UserError if a loss lacks its net or view, or no loss uses a view or a pick.

    The rules of a recipe (`fastkd.losses.base.registry.check_needs`), with remedies for a call.
    """
    needs = {need for term in terms for need in term.needs}
    sees_xprime = any(need.view == "xprime" for need in needs)
    if not has_teacher and any(need.net == "teacher" for need in needs):
        raise UserError("a loss needs a teacher but teacher is None; use losses=[CrossEntropy()]")
    if xprime == "none" and sees_xprime:
        raise UserError("a loss needs the view x': give xprime='cutmix' or xprime='mixup'")
    if picks and XPRIME_TEACHER_LOGITS not in needs:
        raise UserError(
            "pick chooses x' by the teacher's answers to it, which no loss uses: give "
            "xprime='cutmix' and losses=[KD(views=('x', 'xprime'))]"
        )
    if xprime != "none" and not sees_xprime:
        raise UserError(
            f"xprime={xprime!r} would make a view x' that no loss uses: give "
            f"losses=[KD(views=('x', 'xprime'))], or leave it out"
        )


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
