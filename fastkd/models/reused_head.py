"""What SimKD leaves: a student's body, a projector, and the teacher's classifier.

    images -> student up to a tap -> [average pool] -> projector -> global average -> linear

The SimKD loss makes one to evaluate and keep; `create_model("simkd:NAME", ...)` rebuilds it
from the metadata of its weight file. Chen et al. 2022, arXiv:2203.14001.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.models.card import Card, card_of, sign
from fastkd.models.taps import Tapped, ZooNetwork, check_taps

__all__ = ["Projector", "ReusedHead", "build", "pooled_to"]


class Projector(nn.Sequential):
    """1x1 conv to teacher / factor channels, 3x3, 1x1 to the teacher's; BN and ReLU after each."""

    def __init__(self, student: int, teacher: int, factor: int) -> None:
        inner = teacher // factor
        layers: list[nn.Module] = []
        for inputs, outputs, side in ((student, inner, 1), (inner, inner, 3), (inner, teacher, 1)):
            conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)
        self.widths = {"student_channels": student, "teacher_channels": teacher, "factor": factor}


class ReusedHead(nn.Module):
    """images [N, 3, H, W] -> logits [N, num_classes] of the teacher's classifier.

    size: size of the teacher's map in training, to which a larger map of the student is pooled. The
    student's own classifier remains, unused. A weight file can rebuild this network if it could
    rebuild the student.
    """

    def __init__(
        self,
        student: nn.Module,
        projector: Projector,
        head: nn.Linear,
        *,
        tap: str,
        size: Sequence[int],
    ) -> None:
        super().__init__()
        self.student = student
        self.projector = projector
        self.head = head
        self.tap, self.size = tap, tuple(size)
        self.num_classes = head.out_features
        card = card_of(student)
        if card is not None and card.name is not None:
            options = {
                "student": card.options,
                "tap": tap,
                "size": list(size),
                "bias": head.bias is not None,
                **projector.widths,
            }
            sign(
                self,
                Card(
                    name=f"simkd:{card.name}",
                    options=options,
                    num_classes=head.out_features,
                    normalization=card.normalization,
                ),
            )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        map_NCHW = pooled_to(self._map(images_NCHW), self.size)
        return self.head(self.projector(map_NCHW).mean((2, 3)))

    def _map(self, images_NCHW: Tensor) -> Tensor:
        if isinstance(self.student, ZooNetwork):
            return self.student.forward_between(images_NCHW, "images", self.tap)
        # Leave no hook of ours on other people's networks.
        tapped = Tapped(self.student, (self.tap,))
        try:
            return tapped(images_NCHW)[self.tap]
        finally:
            tapped.remove()


def build(
    body: nn.Module,
    num_classes: int,
    *,
    tap: str,
    size: Sequence[int],
    bias: bool,
    student_channels: int,
    teacher_channels: int,
    factor: int,
) -> ReusedHead:
    """The network with fresh weights, around the student `body`."""
    # The options of a weight file, which may come from a stranger.
    check_taps((tap,), body)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"size={size!r}: expected height and width of a map")
    projector = Projector(student_channels, teacher_channels, factor)
    head = nn.Linear(teacher_channels, num_classes, bias=bias)
    return ReusedHead(body, projector, head, tap=tap, size=size)


def pooled_to(map_NCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Average-pooled to `size` (height, width) if the map is larger."""
    own = (map_NCHW.shape[2], map_NCHW.shape[3])
    smaller = (min(own[0], size[0]), min(own[1], size[1]))
    return map_NCHW if smaller == own else F.adaptive_avg_pool2d(map_NCHW, smaller)
