"""Arguments with which a loss could only fail are refused where it is built, not in the run."""

from inspect import signature
from typing import Any

import pytest

import fastkd.losses
from fastkd.errors import UserError
from fastkd.losses import (
    AT,
    CRD,
    DIST,
    FSP,
    KD,
    MGD,
    BinaryCrossEntropy,
    CrossEntropy,
    JointRD,
    KDLoss,
)
from fastkd.losses.base.term import LossTerm

NAN, INF = float("nan"), float("inf")

LOSSES = [
    kind
    for name in fastkd.losses.__all__
    if isinstance(kind := getattr(fastkd.losses, name), type)
    and (issubclass(kind, LossTerm) or kind is KDLoss)
    and kind is not LossTerm
]


def numbers(loss: Any) -> list[str]:
    """Its arguments that are numbers."""
    given = signature(loss).parameters
    kinds = {name: type(one.default) for name, one in given.items()}
    found = [name for name, kind in kinds.items() if kind in (int, float)]
    return [*found, "ce_weight", "kd_weight"] if loss is KDLoss else found


BELOW_1 = (
    (BinaryCrossEntropy, "label_smoothing"),
    (CrossEntropy, "label_smoothing"),
    (KD, "label_smoothing"),
    (CRD, "momentum"),
    (MGD, "mask_ratio"),
)
PLACES = ("ignore_index", "class_dim")
CASES = [(loss, name) for loss in LOSSES for name in numbers(loss) if name not in PLACES]


@pytest.mark.parametrize(
    ("loss", "name"), CASES, ids=[f"{loss.__name__}.{name}" for loss, name in CASES]
)
def test_every_number_of_a_loss_must_be_a_finite_one(loss: Any, name: str) -> None:
    given: dict[str, Any] = {}
    if "pairs" in signature(loss).parameters:
        given["pairs"] = {"a": "b"} if loss is CRD else {"a": "b", "c": "d"}
    if (loss, name) in BELOW_1:
        with pytest.raises(ValueError, match=f"{name}=1; expected a finite .* and below 1"):
            loss(**given | {name: 1})
        assert loss(**given | {name: 0})
    else:
        assert loss(**given | {name: 1})
    for wrong in (NAN, INF, -INF):
        with pytest.raises(ValueError, match=f"{name}={wrong}; expected a finite number"):
            loss(**given | {name: wrong})
    for unfit in ("4", True, [1.0]):
        with pytest.raises(TypeError, match=rf"{name}=.*; expected a finite number"):
            loss(**given | {name: unfit})


@pytest.mark.parametrize("loss", [AT, CRD, FSP], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("pairs", [["b1"], ["b1", "b2"], "b1", ("b1", "b2")])
def test_pairs_are_a_mapping(loss: Any, pairs: Any) -> None:
    with pytest.raises(TypeError, match=r"pairs=.*b1.*; expected a mapping from taps of the stud"):
        loss(pairs=pairs)


COOLED = [loss for loss in LOSSES if "temperature" in signature(loss).parameters]


@pytest.mark.parametrize("loss", COOLED, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("wrong", [0, -1.0])
def test_a_temperature_is_above_0(loss: Any, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={wrong}; expected a finite number above 0"):
        loss(temperature=wrong)
    with pytest.raises(TypeError, match="temperature=None; expected a finite number above 0"):
        loss(temperature=None)


@pytest.mark.parametrize(
    ("loss", "wrong", "message"),
    [
        (KD, {"weight": -1}, r"kd: got weight=-1; expected a finite number above 0"),
        (JointRD, {"weight": 0}, r"jointrd: got weight=0; expected a finite number above 0"),
        (JointRD, {"feature_weight": -1}, r"feature_weight=-1; expected a finite number above 0"),
        (JointRD, {"form": "text"}, r"form='text'; expected one of 'paper', 'released'"),
        (JointRD, {"stages": ("stage1",)}, r"stages=\('stage1',\); expected a tuple of at least 2"),
        (CRD, {"dim": 2.5}, r"dim=2\.5; expected a finite number above 0, a whole one"),
        (DIST, {"view": "y"}, r"dist: got view='y'; expected one of 'x', 'xprime'"),
        (KD, {"views": ("x", "y")}, r"views=.*; expected a tuple, each entry one of 'x', 'xprime'"),
    ],
)
def test_python_refuses_what_a_recipe_refuses(loss: Any, wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loss(**wrong)


def test_there_are_losses_with_a_temperature() -> None:
    found = {loss.__name__ for loss in COOLED}
    assert found == {"KDLoss", "KD", "SoftCE", "DKD", "DIST", "CRD", "CWD"}
