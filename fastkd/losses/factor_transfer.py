"""FT: factor transfer. The translated student imitates a paraphrase of the teacher."""

from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.kernels import attention_map
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.pairs import Pairs, PairTerm
from fastkd.losses.base.term import BindContext, TermInputs, TermOutput

__all__ = ["FT"]


class FT(PairTerm):
    """Factor transfer: the student's translator imitates the factor of the teacher's paraphraser.

        a(f) = mean over channels of f^2, over its pixels of length 1
        factor_t = encoder(teacher),   factor_s = translator(student)
        loss = mean |a(factor_s) - a(factor_t)|,   no gradient from it to the encoder
        reconstruction = mean of (decoder(factor_t) - teacher)^2,   no gradient to the student

    Means over images and pixels; where the factors differ in size the larger is average-pooled.
    A factor has `rate` times the teacher's channels. Encoder and translator are three 3x3
    convolutions, the channels changing in the second, the decoder is their mirror of transposed
    ones, each with a leaky ReLU of slope 0.1; the translator's have batch norms, so no bias.
    Parts: `<name>` and `<name>_reconstruction`, of weight 1, which trains only the paraphraser.

    Its authors train the paraphraser before the student (30 epochs in the reference) and then
    freeze it. fastkd has no such first stage: here both learn together, and the target moves
    until the paraphraser has settled, so expect results to differ from the published ones. The
    paraphraser has a fifth of the student's learning rate, 0.01 for 0.05, as in the reference's
    first stage for ResNets and wide ResNets.

    Args:
        rate: Channels of the factor divided by the teacher's channels; k in the paper.

    Source: Kim et al. 2018, arXiv:1802.04977; HobbitLong/RepDistiller distiller_zoo/FT.py, the
    modules in HobbitLong/RepDistiller models/util.py, the first stage in HobbitLong/RepDistiller
    helper/pretrain.py.
    Needs: pairs of taps on x, maps; in the reference the last stage of each network.
    Weight: 200, the reference's.
    Tests: tests/losses/test_factor_transfer.py, test_terms_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 200.0,
        rate: Annotated[float, Gt(0), Le(1)] = 0.5,
        name: str = "ft",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.weights = self.weights_of(name, weight=weight)
        self.reconstruction = list(self.weights)[1]
        self.rate = rate

    @override
    @classmethod
    def weights_of(cls, name: str, *, weight: float, **keys: Any) -> dict[str, float]:
        return {name: weight, f"{name}_reconstruction": 1.0}

    @override
    def bind(self, context: BindContext) -> None:
        """Make translators and paraphrasers."""
        self.translators, self.encoders, self.decoders = (nn.ModuleList() for _ in range(3))
        for (student, *_), (teacher, *_) in self.map_shapes(context):
            factor = max(1, int(self.rate * teacher))
            self.translators.append(_narrowing(student, factor, norms=True))
            self.encoders.append(_narrowing(teacher, factor, norms=False))
            sizes = ((factor, factor), (factor, teacher), (teacher, teacher))
            layers = ((nn.ConvTranspose2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)) for a, b in sizes)
            self.decoders.append(nn.Sequential(*(module for pair in layers for module in pair)))

    @override
    def param_groups(self) -> list[dict[str, Any]]:
        """The translators at the student's rate, the paraphrasers at a fifth of it."""
        slow = [*self.encoders.parameters(), *self.decoders.parameters()]
        return [
            {"params": list(self.translators.parameters()), "lr_scale": 1.0},
            {"params": slow, "lr_scale": 0.2},
        ]

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Sums over the pairs."""
        transfers, errors = [], []
        modules = zip(self.translators, self.encoders, self.decoders, strict=True)
        for (translator, encoder, decoder), (student, teacher) in zip(
            modules, self.features(inputs), strict=True
        ):
            with autocast_like(student):
                student_NFHW = translator(student)
            with autocast_like(teacher):
                teacher_NFHW = encoder(teacher)
                again_NCHW = decoder(teacher_NFHW)
            transfers.append(_distance(student_NFHW, teacher_NFHW.detach()))
            errors.append(F.mse_loss(widened(again_NCHW), widened(teacher)))
        parts = {self.name: transfers, self.reconstruction: errors}
        return TermOutput({part: torch.stack(losses).sum() for part, losses in parts.items()})


def _narrowing(channels: int, factor: int, *, norms: bool) -> nn.Sequential:
    """Three convolutions with leaky ReLUs from a map to its factor."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, channels), (channels, factor), (factor, factor)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norms))
        layers += [nn.BatchNorm2d(outputs)] if norms else []
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


def _distance(student_NFHW: Tensor, teacher_NFHW: Tensor) -> Tensor:
    """Mean absolute difference of the factors' attention maps at the smaller size."""
    sizes = (student_NFHW.shape[2:], teacher_NFHW.shape[2:])
    height, width = (min(sides) for sides in zip(*sizes, strict=True))
    student, teacher = (
        attention_map(factor, size=(height, width)) for factor in (student_NFHW, teacher_NFHW)
    )
    return F.l1_loss(student, teacher)
