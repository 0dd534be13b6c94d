"""What is exported, and how: a trained network with the facts that its file will hold."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd.compute.precision import Precision
from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.models import fuse, use_kernels
from fastkd.models.card import card_of, title_of
from fastkd.models.intake import Remedy, refusal, restored_after, to_evaluation
from fastkd.models.rewrite.result import copied
from fastkd.models.taps import logits_of
from fastkd.storage.description import NetworkFacts, facts_of

__all__ = [
    "HF_FILES",
    "Answers",
    "Choice",
    "Deployed",
    "Format",
    "Logits",
    "Source",
    "usual_size",
]

Format = Literal["onnx", "torch-export", "timm", "hf"]
Answers = Literal["logits", "pixels", "embedding"]
"""Logits of an image, of every pixel, or whatever a network without a classifier gives."""

GRAPHS = ("onnx", "torch-export")
"""Formats that hold the computation; the others hold weights by name."""
EXAMPLE = (128, 192)
"""Height and width of an image where any size will do."""
HF_FILES = ("config.json", "model.safetensors", "README.md")
"""All that the folder of format hf holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a network is exported."""

    format: Format = "onnx"
    fuse: bool | None = None
    """Fold batch norm; None: where the format holds the computation."""
    opset: int | None = None
    """ONNX opset; None: that of torch."""
    dynamic_batch: bool = False
    """Any number of images in a call, instead of one."""
    half: bool = False
    """fp16 weights and arithmetic; images and logits stay fp32 in files with the computation."""
    normalize: bool = False
    """Images in 0..1 go in, and are normalised inside."""

    @property
    def files(self) -> tuple[str, ...]:
        """What the folder of this format holds; () where it is one file."""
        return HF_FILES if self.format == "hf" else ()

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise UserError(
                f"there is no format {self.format!r}: choose {', '.join(get_args(Format))}"
            )
        if self.opset is not None and self.format != "onnx":
            raise UserError(f"an opset is of ONNX files, --format {self.format} has none")
        if self.format in GRAPHS:
            return
        for flag, given in (
            ("--fuse", self.fuse),
            ("--normalize", self.normalize),
            ("--dynamic-batch", self.dynamic_batch),
        ):
            if given:
                raise UserError(
                    f"{flag} changes the computation, and --format {self.format} holds only "
                    f"weights, for the network as it was built: leave it out, or use --format onnx"
                )

    @property
    def folds(self) -> bool:
        """Whether batch norm is folded."""
        return self.format in GRAPHS if self.fuse is None else self.fuse

    @property
    def bound(self) -> float:
        """How far the file may be from its source, as a share of the largest |logit|."""
        return 1e-2 if self.half else 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A trained network, and what is known about it."""

    model: nn.Module
    facts: NetworkFacts
    size: tuple[int, int]
    """Height and width of the images; where pixels are labelled only of an example."""
    answers: Answers = "logits"
    multiple: int = 1
    """Where pixels are labelled: of what height and width are multiples."""
    recipe: str | None = None
    digest: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What its training reported."""
    teacher: str | None = None
    command: str = ""
    """That exported it."""

    @classmethod
    def of(cls, model: nn.Module, *, size: int | None = None, **more: Any) -> "Source":
        """Of any network that takes images [N, 3, H, W].

        size: side of the images; by default what the network's card or timm says. more: fields.
        Raises UserError if the network refuses such images.
        """
        facts = more.pop("facts", None) or facts_of(model)
        shape = (size, size) if size and not _is_whole(facts) else usual_size(model, facts)
        answer = _tried(model, shape)
        answers: Answers = "logits" if facts.num_classes else "embedding"
        if answers == "logits" and answer.dim() == 4:
            answers, shape = "pixels", EXAMPLE
            more["multiple"] = max(_multiple(model), more.get("multiple", 1))
        return cls(model=model, facts=facts, size=shape, answers=answers, **more)

    @property
    def title(self) -> str:
        """For messages."""
        return title_of(self.model)

    @property
    def normalization(self) -> Normalization | None:
        """(mean, std) that its weights expect; None: not known."""
        return self.facts.normalization


class Logits(nn.Module):
    """A network whose answer is what fastkd counts as its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits, or an embedding."""
        return logits_of(self.network(images_NCHW))


class Deployed(Logits):
    """images [N, 3, H, W] fp32 -> fp32 logits: what a file with the computation computes."""

    def __init__(self, source: Source, choice: Choice) -> None:
        model = fuse(source.model) if choice.folds else copied(source.model)
        to_evaluation(model)
        super().__init__(use_kernels(model, "plain"))
        self.half_precision = choice.half
        if choice.half:
            self.network.half()
        self.normalizes = choice.normalize
        mean, std = source.normalization or ((0.0,) * 3, (1.0,) * 3)
        self.scale: Tensor
        self.shift: Tensor
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", (1 / torch.tensor(std)).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits, or an embedding."""
        if self.normalizes:
            images_NCHW = images_NCHW * self.scale + self.shift
        if self.half_precision:
            images_NCHW = images_NCHW.half()
        return super().forward(images_NCHW).float()


def usual_size(model: nn.Module, facts: NetworkFacts) -> tuple[int, int]:
    """Height and width of the images that a network was trained on, or else was made for.

    Of one that sees whole images, an example.
    """
    if _is_whole(facts):
        return EXAMPLE
    data = facts.data
    side = data and (data.evaluation.crop if data.evaluation else data.image_size)
    if side:
        return side, side
    config: Any = getattr(model, "pretrained_cfg", None)
    if config:
        height, width = config["input_size"][1:]
        return height, width
    card = card_of(model)
    return (224, 224) if card and card.name and ":" in card.name else (32, 32)


def _is_whole(facts: NetworkFacts) -> bool:
    framing = facts.data.evaluation if facts.data else None
    return framing is not None and str(framing.mode) == "whole"


def _multiple(model: nn.Module) -> int:
    """Of what height and width must be multiples."""
    for multiple in (1, 8, 16, 32):
        with suppress(UserError):
            _tried(model, (64 + multiple, 96 + multiple))
            return multiple
    return 1


def _tried(model: nn.Module, size: tuple[int, int]) -> Tensor:
    images_NCHW = torch.zeros(1, 3, *size)
    try:
        with restored_after(model), torch.no_grad():
            to_evaluation(model)
            return logits_of(model(images_NCHW))
    except UserError:
        raise
    except Exception as error:
        # Foreign code can fail in any way.
        raise refusal(
            error,
            title=title_of(model),
            model=model,
            run=model,
            images_NCHW=images_NCHW,
            precision=Precision("fp32", "cpu"),
            remedy=Remedy(size="data.image_size={0} exports it for images of that size"),
        ) from error
