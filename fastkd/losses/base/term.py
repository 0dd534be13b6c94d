"""The contract of a loss: what it needs, what it returns, what it owns.

`fastkd.training.step` collects what all terms need once, calls each, and adds up the named parts
with their weights. A term never sees the trainer, the recipe or another term.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.losses.base.arguments import check_argument, checked
from fastkd.losses.base.needs import Need

__all__ = ["BindContext", "LossTerm", "TermInputs", "TermOutput", "check_names", "check_parts"]


class TermInputs(NamedTuple):
    """What a term sees of one batch."""

    tensors: Mapping[str, Tensor]
    """One tensor per need, keyed by its spelling. Teacher tensors carry no gradient."""
    labels_N: Tensor
    """int64 class ids; for images with several labels float32 [N, C] (`fastkd.data.batch`). A term
    with `takes_soft_labels` may get float32 rows of probabilities [N, C], one with `takes_pixels`
    the class of every pixel [N, H, W]; all logits then have that height and width."""
    index_N: Tensor
    """int64 sample ids, stable over epochs, in 0..num_samples-1."""
    schedule: Mapping[str, Tensor]
    """The term's scheduled values at this step, 0-dim float32, keyed as in `schedules()`."""
    rows_of_ranks: tuple[int, ...] = ()
    """Rows of this batch on every rank, for `fastkd.compute.collectives.join_rows`: a term that
    compares samples with each other may use the rows of all ranks. At most one entry in one
    process.
    Counts rows of the term's only view (fewer after a pick); of x if it reads several."""


class TermOutput(NamedTuple):
    """What a term returns."""

    parts: dict[str, Tensor]
    """Unweighted scalars by name; `weights` gives the factor of each in the total."""
    carry: dict[str, Tensor] | None = None
    """Detached tensors passed to `commit` once the step is known to be good."""
    logits_NC: Tensor | None = None
    """Logits on x of the network from `export`, if the term changes the student's head: the
    training accuracy is then measured on them."""


@dataclass(frozen=True)
class BindContext:
    """What a term may know about the run; passed once, before the first step."""

    num_samples: int
    num_classes: int
    train_labels_N: Tensor
    """int64 labels of all training samples by sample id, on the CPU."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every need of the term without the batch axis."""
    count_pixels: Callable[[], Tensor] | None = None
    """Training pixels of each class, int64 [C], where pixels are labelled and can be counted."""
    teacher_stages: Callable[[Tensor, str, Iterable[str]], dict[str, Tensor]] | None = None
    """stages(features, after, taps): the frozen teacher's layers after tap `after`, applied to
    features with gradient; the values of `taps`, stopping at the last (JointRD). None if
    the teacher has no stages, such as one from outside the zoo."""
    teacher_head: nn.Linear | None = None
    """The teacher's frozen classifier, its outputs in the class order of the data (SimKD)."""
    teacher_norm: nn.BatchNorm2d | None = None
    """The teacher's last batch norm that is not in a shortcut (JointRD)."""
    teacher_pooled: Callable[[], tuple[str, ...]] | None = None
    """The teacher's taps that feed its classifier through pooling alone (SimKD)."""


class LossTerm(nn.Module):
    """Base of all losses.

    Parameters are trained with the student and buffers (memory banks) are saved with it, without
    being named anywhere else. `forward` must not change state: it returns what it wants to write
    as `carry`, and `commit` writes it if the step was good.
    """

    name: str
    needs: tuple[Need, ...]
    weights: dict[str, float]
    banks: tuple[str, ...] = ()
    """Names of the buffers that only `commit` writes, from values that `join_rows` made equal on
    all ranks."""
    label_kind: Literal["class", "multi"] | None = None
    """Which labels the term reads: class ids [N], or [N, C]; None if it reads none."""
    takes_no_label: bool = False
    """Whether the loss accepts unlabelled images (label -100)."""
    takes_soft_labels: bool = False
    """Whether class ids may also come as rows of probabilities [N, C], as after MixUp."""
    takes_classes: bool = False
    """Whether a term on several labels per image, [N, C], also takes class ids [N], and the rows
    that mixing x makes of them."""
    takes_pixels: bool = False
    """Whether class ids may also come for every pixel, [N, H, W], with logits [N, C, H, W]."""
    uses_index: bool = False
    """True if the term keeps state per sample id, so that every batch must carry real ids."""

    uses_stages: bool = False
    """True if the term runs the teacher's stages, which only networks of the zoo expose."""
    uses_head: bool = False
    """True if the term takes over the teacher's classifier."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, name: str, needs: Iterable[str], weights: dict[str, float]) -> None:
        super().__init__()
        for part, weight in weights.items():
            what = "weight" if part == name else f"the weight of {part}"
            check_argument(name, what, float, weight)
        self.name = name
        self.needs = tuple(map(Need, needs))
        # Of type str: torch.compile looks tensors up by them.
        self._keys = tuple(map(str, self.needs))
        self.weights = weights

    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        """What a term with these recipe keys needs; a recipe is checked without building it."""
        raise TypeError(f"{cls.__name__} must define needs_of(**keys) to be a loss of a recipe")

    @classmethod
    def weights_of(cls, name: str, *, weight: float, **keys: Any) -> dict[str, float]:
        """Factor of each part in the total, from the recipe keys."""
        return {name: weight}

    @property
    def weight(self) -> float:
        """Factor of the term's first part, usually its only one."""
        return next(iter(self.weights.values()))

    def wanted(self, inputs: TermInputs) -> list[Tensor]:
        """The tensors of `needs`, in their order."""
        return [inputs.tensors[key] for key in self._keys]

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
        """Write state after the step. `ok` is a 0-dim bool on the device, equal on all ranks;
        nothing may change if it is false, and it must not be read on the host."""

    def export(self, student: nn.Module) -> nn.Module:
        """The network to keep after training: the student, unless the term changed its head."""
        return student

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Scalars of this batch; see `TermOutput`."""
        raise TypeError(f"{type(self).__name__} must define forward(inputs) -> TermOutput")


def check_names(terms: Iterable[LossTerm]) -> None:
    """`check_parts` of terms that are built."""
    check_parts((term.name, term.weights) for term in terms)


def check_parts(losses: Iterable[tuple[str, Iterable[str]]]) -> None:
    """UserError if two losses share a name or report parts with the same name.

    Checkpoint, schedules and metrics know a term and its parts by name only.
    """
    owner: dict[str, str] = {}
    names: set[str] = set()
    for name, parts in losses:
        if name in names:
            raise UserError(f"two losses are named {name!r}: give one of them another name=")
        names.add(name)
        for part in parts:
            if part in owner:
                raise UserError(
                    f"the losses {owner[part]} and {name} both report a part named {part!r}: "
                    f"drop one of them (in a recipe losses.ce=null, or losses.kd.ce_weight=0)"
                )
            owner[part] = name
