"""The contract of a loss: what it needs, what it returns, what it owns.

`fastkd.training.step` collects what all terms need once, calls each, and adds up the named parts
with their weights. A term never sees the trainer, the recipe or another term.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "BindContext",
    "LossTerm",
    "Need",
    "TermInputs",
    "TermOutput",
    "autocast_like",
    "check_names",
    "check_numbers",
    "widened",
]

_NETS = ("student", "teacher", "mixed")
_MIXED_TAPS = ("labels", "logits")


class Need(NamedTuple):
    """One tensor a term asks for: `view/net/tap`, such as `xprime/teacher/logits`.

    `x/teacher/stage3:preact` is a pre-activation tap; for a foreign network a tap is a module path.
    `xprime/mixed/labels` and `xprime/mixed/logits` come from no network: the labels (as one-hot
    rows, fp32) and the teacher's logits of the images that x' is mixed of, mixed like their pixels.
    """

    view: str
    net: str
    tap: str

    @classmethod
    def parse(cls, text: str) -> "Need":
        """Split a need; ValueError shows the form."""
        parts = text.split("/", 2)
        if len(parts) != 3 or parts[1] not in _NETS or not parts[0] or not parts[2]:
            raise ValueError(
                f"a need is spelled view/net/tap with net one of {', '.join(_NETS)}, such as "
                f"x/student/stage3; got {text!r}"
            )
        if parts[1] == "mixed" and (parts[0] != "xprime" or parts[2] not in _MIXED_TAPS):
            raise ValueError(
                f"what x' has of its images is xprime/mixed/labels or xprime/mixed/logits; "
                f"got {text!r}"
            )
        return cls(*parts)


class TermInputs(NamedTuple):
    """What a term sees of one batch."""

    tensors: Mapping[str, Tensor]
    """One tensor per need, keyed by its spelling. Teacher tensors carry no gradient."""
    labels_N: Tensor
    """int64 class ids; of images with several labels float32 [N, C] (`fastkd.data.batch`)."""
    index_N: Tensor
    """int64 sample ids, stable over epochs, in 0..num_samples-1."""
    schedule: Mapping[str, Tensor]
    """The term's scheduled values at this step, 0-dim float32, keyed as in `schedules()`."""
    rows_of_ranks: tuple[int, ...] = ()
    """Rows of this batch on every rank, for `fastkd.compute.ranks.join_rows`: a term that compares
    samples with each other may see those of all ranks. One entry, or none, in one process. They
    are those of the view that the term looks at, which a pick may have made fewer, and those of x
    where it looks at several."""


class TermOutput(NamedTuple):
    """What a term returns."""

    parts: dict[str, Tensor]
    """Unweighted scalars by name; `weights` says with which factor each enters the total."""
    carry: dict[str, Tensor] | None = None
    """Detached tensors handed to `commit` once the step is known to be good."""
    logits_NC: Tensor | None = None
    """What the network of `export` answers on x, where the term changes the student's head: the
    training accuracy is then counted on it."""


@dataclass(frozen=True)
class BindContext:
    """What a term may know of the run; given once, before the first step."""

    num_samples: int
    num_classes: int
    train_labels_N: Tensor
    """int64 labels of all training samples by sample id, on the CPU."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every need of the term without the batch axis."""
    teacher_stages: Callable[[Tensor, str, Iterable[str]], dict[str, Tensor]] | None = None
    """stages(features, after, taps): the frozen teacher's layers after tap `after`, applied to
    features with gradient; the values of `taps`, of which the last ends the run (JointRD). None if
    the teacher has no stages, as one from outside the zoo."""
    teacher_head: nn.Linear | None = None
    """The teacher's frozen classifier, its outputs in the class order of the data (SimKD)."""
    teacher_norm: nn.BatchNorm2d | None = None
    """The teacher's last batch norm that is not in a shortcut (JointRD)."""
    teacher_pooled: Callable[[], tuple[str, ...]] | None = None
    """The teacher's taps that are nothing but pooled before its classifier (SimKD)."""


def autocast_like(features: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the type of `features`, for connectors and teacher stages inside a term.

    Terms run outside of autocast, so that their sums are exact, and get what the networks gave:
    bf16 under autocast, which layers with fp32 weights refuse.
    """
    if features.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(features.device.type, dtype=features.dtype)
    return nullcontext()


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64: the types in which terms sum."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LossTerm(nn.Module):
    """Base of all losses.

    Parameters are trained with the student, buffers (memory banks) are saved with it; neither
    needs to be named anywhere else. `forward` must not change state: what it wants to write it
    returns as `carry`, and `commit` writes it where the step was good.
    """

    name: str
    needs: tuple[str, ...]
    weights: dict[str, float]
    banks: tuple[str, ...] = ()
    """Names of the buffers that only `commit` writes, with what `join_rows` made alike on all
    ranks."""
    label_kind: Literal["class", "multi"] | None = None
    """Which labels the term reads: class ids [N], or [N, C]; None where it reads none."""
    takes_no_label: bool = False
    """Whether it can do with class ids of -100, images of unknown class."""
    uses_index: bool = False
    """True where the term keeps state per sample id, so that every batch must carry real ids."""

    uses_stages: bool = False
    """True where the term runs the teacher's stages, which only networks of the zoo expose."""

    def __init__(self, name: str, needs: tuple[str, ...], weights: dict[str, float]) -> None:
        super().__init__()
        for need in needs:
            Need.parse(need)
        for part, weight in weights.items():
            check_numbers(name, **{"weight" if part == name else f"the weight of {part}": weight})
        self.name = name
        self.needs = needs
        self.weights = weights

    @property
    def weight(self) -> float:
        """Factor of the term's first part, for most its only one."""
        return next(iter(self.weights.values()))

    def bind(self, context: BindContext) -> None:
        """Create connectors and banks; called once, before the optimizer is built."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the term's own parameters; `lr_scale` multiplies the base rate."""
        own = [p for p in self.parameters() if p.requires_grad]
        return [{"params": own, "lr_scale": 1.0}] if own else []

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Values that change over the run, as functions of the epoch (a float, from 0)."""
        return {}

    def commit(self, carry: Mapping[str, Tensor], index_N: Tensor, ok: Tensor) -> None:
        """Write state after the step. `ok` is a 0-dim bool on the device, alike on all ranks;
        nothing may change where it is false, and it must not be read on the host."""

    def export(self, student: nn.Module) -> nn.Module:
        """The network to keep after training: the student, unless the term changed its head."""
        return student

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Scalars of this batch; see `TermOutput`."""
        raise TypeError(f"{type(self).__name__} must define forward(inputs) -> TermOutput")


def check_numbers(
    owner: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    **numbers: object,
) -> None:
    """Refuse arguments of a loss with which every step would be a bad one, when it is built.

    TypeError for what is no number, ValueError for one that is not finite or out of the bounds.
    """
    bounds = ((above, "above"), (least, "of at least"), (most, "at most"))
    words = [f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound)]
    expected = " ".join(["a finite number", " and ".join(words)]).strip()
    for name, value in numbers.items():
        message = f"{owner}: got {name}={value!r}; expected {expected}"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(message)
        number = float(value)
        if not math.isfinite(number) or number <= above or not least <= number <= most:
            raise ValueError(message)


def check_names(terms: Iterable[LossTerm]) -> None:
    """ValueError where two terms share a name or report parts of one name.

    Checkpoint, schedules and metrics know a term and its parts by name only.
    """
    owner: dict[str, str] = {}
    names: set[str] = set()
    for term in terms:
        if term.name in names:
            raise ValueError(f"two losses are called {term.name!r}: give one of them another name=")
        names.add(term.name)
        for part in term.weights:
            if part in owner:
                raise ValueError(
                    f"the losses {owner[part]} and {term.name} both report a part called {part!r}: "
                    f"drop one of them (in a recipe losses.ce=null, or losses.kd.ce_weight=0)"
                )
            owner[part] = term.name
