"""Hints: the student's maps predict the teacher's through a connector trained with them.

FitNet (one convolution, mean square), VID (a small network and a trained variance) and AB (the
signs of the teacher's neurons).
"""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.pairs import Pairs, PairTerm, Shape, pool_alike
from fastkd.losses.base.term import BindContext

__all__ = ["AB", "VID", "FitNet"]

# Sides of a connector's kernel: from the first on, a map of about twice the size is halved instead;
# beyond the second, which the maps of 32 pixels in the papers do not need, it would be all weights.
_LARGE, _LARGEST = 8, 32


class FitNet(PairTerm):
    """Hint training: the student's map predicts the teacher's.

        loss = mean of (connector(student) - teacher)^2

    connector = convolution, batch norm, ReLU. The convolution brings the student's map to the
    teacher's size: 3x3 of stride 2 from twice the size, transposed 4x4 of stride 2 from half of
    it, else unpadded with a kernel as large as the difference plus 1. It has no bias, which the
    batch norm would cancel. Large maps have two rules of their own: where half of an odd size was
    rounded up (45 and 23), a transposed kernel of 3 leads up, and 3x3 of stride 2 down if the other
    kernel were larger than 8; a kernel larger than 32 is refused.

    Source: Romero et al. 2014, arXiv:1412.6550, section 2.2, as one term of the total and not as
    its first stage of training; HobbitLong/RepDistiller distiller_zoo/FitNet.py and ConvReg of
    HobbitLong/RepDistiller models/util.py.
    Needs: pairs of taps on x, maps; in the reference stage2.
    Weight: 100, the reference's.
    Tests: tests/losses/test_hints.py, test_terms_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(self, pairs: Pairs, *, weight: Weight = 100.0, name: str = "fitnet") -> None:
        super().__init__(name, pairs, weight)

    @override
    def bind(self, context: BindContext) -> None:
        """Make the connectors; UserError if no convolution of the list fits."""
        self.connectors = nn.ModuleList(
            nn.Sequential(*_resizing(self.name, *pair), nn.ReLU())
            for pair in self.map_shapes(context)
        )

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_like(student):
            predicted_NCHW = self.connectors[number](student)
        return F.mse_loss(widened(predicted_NCHW), widened(teacher))


class VID(PairTerm):
    """Variational information distillation: Gaussian negative log-likelihood of the teacher's map.

        mu = W3 relu(W2 relu(W1 student)) per pixel,   v_c = log(1 + exp(rho_c)) + 1e-5,
        loss = mean of [(mu - teacher)^2 / v + log v] / 2

    W are 1x1 convolutions without bias; rho is trained, one value per channel of the teacher, and
    starts where v = `variance`. Where the sizes differ the larger map is average-pooled.

    Args:
        variance: Where the trained variances start.

    Source: Ahn et al. 2019, arXiv:1904.05835, section 2; HobbitLong/RepDistiller
    distiller_zoo/VID.py.
    Needs: pairs of taps on x, maps; in the reference all stages.
    Weight: 1, the reference's.
    Tests: tests/losses/test_hints.py, test_terms_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 1.0,
        variance: Annotated[float, Gt(1e-5)] = 5.0,
        name: str = "vid",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.variance = variance

    @override
    def bind(self, context: BindContext) -> None:
        """Make regressors and variances."""
        self.regressors, self.rho = nn.ModuleList(), nn.ParameterList()
        start = math.log(math.expm1(self.variance - 1e-5))
        for student, teacher in self.map_shapes(context):
            s, t = student[0], teacher[0]
            first, second, third = (nn.Conv2d(c, t, 1, bias=False) for c in (s, t, t))
            self.regressors.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            self.rho.append(nn.Parameter(torch.full((t,), start)))

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = pool_alike(student, teacher)
        with autocast_like(student):
            mean_NCHW = self.regressors[number](student)
        variance_C11 = (F.softplus(self.rho[number]) + 1e-5)[:, None, None]
        error_NCHW = (widened(mean_NCHW) - widened(teacher)).square()
        return 0.5 * (error_NCHW / variance_C11 + variance_C11.log()).mean()


class AB(PairTerm):
    """Activation boundaries: the student's neurons take the signs of the teacher's, by a margin.

        sign = 1 where teacher > 0, else -1
        loss = 0.003 sum over pairs i < n of 2^(i - n + 1) mean over images of
               sum of max(0, margin - sign * connector(student))^2

    `pairs` go from the shallowest to the deepest, whose factor is 1. connector = convolution (as in
    `FitNet`) and batch norm; maps of equal shape need none. 0.003 is the reference's.

    Its authors train the student's body with this loss alone first (30 epochs in the reference) and
    then with cross entropy alone. fastkd has no such first stage: here it is added to the other
    losses for the whole run, so expect results to differ from the published ones.

    Args:
        margin: How far a neuron must be on its side of 0.

    Source: Heo et al. 2019, arXiv:1811.03233; HobbitLong/RepDistiller distiller_zoo/AB.py, its
    first stage in HobbitLong/RepDistiller helper/pretrain.py.
    Needs: pairs of taps on x, maps; in the reference all stages before their activation
    (stage1:preact, ..) of both networks.
    Weight: 1, the reference's.
    Tests: tests/losses/test_hints.py, test_terms_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 1.0,
        margin: PositiveFloat = 1.0,
        name: str = "ab",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.margin = margin

    @override
    def bind(self, context: BindContext) -> None:
        """Make the connectors; UserError if no convolution of `FitNet`'s list fits."""
        self.connectors = nn.ModuleList(
            nn.Identity() if student == teacher else _resizing(self.name, student, teacher)
            for student, teacher in self.map_shapes(context)
        )

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_like(student):
            student_NCHW = widened(self.connectors[number](student))
        short_NCHW = self.margin - torch.where(teacher > 0, student_NCHW, -student_NCHW)
        factor = 0.003 * 2.0 ** (number + 1 - len(self.connectors))
        return factor * F.relu(short_NCHW).square().sum((1, 2, 3)).mean()


def _resizing(name: str, student: Shape, teacher: Shape) -> nn.Sequential:
    """Convolution and batch norm from one shape to the other; UserError if none fits."""
    channels = (student[0], teacher[0])
    sizes = list(zip(student[1:], teacher[1:], strict=True))
    height, width = (1 + s - t for s, t in sizes)
    convolution: nn.Module
    if all(s == 2 * t for s, t in sizes) or (
        max(height, width) > _LARGE and all(s in (2 * t - 1, 2 * t) for s, t in sizes)
    ):
        convolution = nn.Conv2d(*channels, 3, stride=2, padding=1, bias=False)
    elif all(t in (2 * s - 1, 2 * s) for s, t in sizes) and min(height, width) < 1:
        tall, wide = (4 - (t % 2) for _, t in sizes)
        convolution = nn.ConvTranspose2d(*channels, (tall, wide), 2, padding=1, bias=False)
    elif min(height, width) >= 1 and max(height, width) <= _LARGEST:
        convolution = nn.Conv2d(*channels, (height, width), bias=False)
    else:
        raise UserError(
            f"losses.{name} cannot bring a student's map of {student[1]}x{student[2]} to the "
            f"teacher's {teacher[1]}x{teacher[2]}: pair taps where the student's is half as large, "
            f"as large, twice as large, or at most {_LARGEST - 1} pixels larger"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]))
