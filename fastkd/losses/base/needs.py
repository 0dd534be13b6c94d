"""Needs: the names under which the step hands tensors to a loss, `view/net/tap`.

The only definition of the vocabulary, except for taps, which each network defines
(`fastkd.models.taps`).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast, get_args

from fastkd.errors import UserError

__all__ = [
    "LOGITS",
    "MEAN_LOGITS",
    "MIXED_LABELS",
    "MIXED_LOGITS",
    "STUDENT_LOGITS",
    "TEACHER_LOGITS",
    "XPRIME_TEACHER_LOGITS",
    "Need",
    "NeedRule",
    "Net",
    "Unmet",
    "View",
    "both_logits",
    "first_unmet",
]

View = Literal["x", "xprime"]
"""x: the images; xprime: x', a second view of them."""

Net = Literal["student", "teacher", "mixed"]
"""Where a tensor comes from: a network or, for `mixed`, the images that x' is mixed from."""

MEAN_LOGITS = "mean_logits"
"""A tap of every teacher: the mean of the logits over all teachers; with one, its logits."""

LOGITS = ("logits", MEAN_LOGITS)
"""Taps whose values say something of every class."""

_MIXED_TAPS = ("labels", "logits")


class Need(str):
    """One tensor that a term needs: `view/net/tap`, such as `xprime/teacher/logits`.

    `x/teacher/stage3:preact` is a pre-activation tap; for a foreign network a tap is a module path.
    `xprime/mixed/labels` and `xprime/mixed/logits` come from no network: the labels (as one-hot
    rows, fp32) and the teacher's logits of the images that x' is mixed from, mixed like their
    pixels.

    Equal to its text and hashed like it: `tensors["x/student/logits"]` finds it. UserError if
    the text is not a need.
    """

    __slots__ = ("net", "tap", "view")
    view: View
    net: Net
    tap: str

    def __new__(cls, text: str) -> "Need":
        """The need that a text spells."""
        view, net, tap = (*text.split("/", 2), "", "")[:3]
        views, nets = get_args(View), get_args(Net)
        if view not in views or net not in nets or not tap:
            raise UserError(
                f"a need is spelled view/net/tap with view one of {', '.join(views)} and net one "
                f"of {', '.join(nets)}, such as x/student/stage3; got {text!r}"
            )
        if net == "mixed" and (view != "xprime" or tap not in _MIXED_TAPS):
            mixed = " or ".join(f"xprime/mixed/{tap}" for tap in _MIXED_TAPS)
            raise UserError(f"what x' inherits from its images is {mixed}; got {text!r}")
        need = super().__new__(cls, text)
        need.view, need.net, need.tap = cast(View, view), cast(Net, net), tap
        return need

    @classmethod
    def of(cls, view: str, net: Net, tap: str) -> "Need":
        """The need with these parts."""
        return cls(f"{view}/{net}/{tap}")


STUDENT_LOGITS = Need("x/student/logits")
TEACHER_LOGITS = Need("x/teacher/logits")
XPRIME_TEACHER_LOGITS = Need("xprime/teacher/logits")
MIXED_LABELS = Need("xprime/mixed/labels")
MIXED_LOGITS = Need("xprime/mixed/logits")


def both_logits(view: View) -> tuple[Need, Need]:
    """The logits of student and teacher on one view."""
    return Need.of(view, "student", "logits"), Need.of(view, "teacher", "logits")


NeedRule = Literal["pick", "xprime unused", "frozen", "teacher", "xprime"]
"""What a run must fulfil, in the order in which it is checked: a pick is seen by a loss, x' is seen
by a loss, a loss reaches a layer that is trained, a loss has its teacher, a loss has its x'."""


class Unmet(NamedTuple):
    """A rule that a run breaks."""

    rule: NeedRule
    loss: str = ""
    """The loss that lacks something; empty where no loss is to blame."""
    taps: tuple[str, ...] = ()
    """The student's taps that this loss uses."""


def first_unmet(
    needs: Mapping[str, Sequence[Need]],
    *,
    has_teacher: bool,
    xprime: str,
    picks: bool = False,
    frozen: bool = False,
) -> Unmet | None:
    """The first rule that the needs of the losses break, by name of the loss; None if none.

    xprime is how x' is made, "none" if it is not; frozen, whether only the classifier is trained.
    The words of the message, with what to change, are the caller's.
    """
    every = {need for own in needs.values() for need in own}
    if picks and XPRIME_TEACHER_LOGITS not in every:
        return Unmet("pick")
    if xprime != "none" and not any(need.view == "xprime" for need in every):
        return Unmet("xprime unused")
    for loss, own in needs.items():
        taps = tuple(need.tap for need in own if need.net == "student")
        if frozen and "logits" not in taps:
            return Unmet("frozen", loss, taps)
        if not has_teacher and any(need.net == "teacher" for need in own):
            return Unmet("teacher", loss)
        if xprime == "none" and any(need.view == "xprime" for need in own):
            return Unmet("xprime", loss)
    return None
