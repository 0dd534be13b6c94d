"""Recipe keys for one network: which one, from which weights, which part is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from fastkd.config.section import NoEffect, Section, Since
from fastkd.errors import UserError
from fastkd.models.blocks.grammar import parse_block
from fastkd.models.blocks.layers import Shortcuts
from fastkd.models.planner import DEFAULT_KERNELS, KernelChoice

__all__ = ["NETWORK_OPTIONS", "StudentConfig"]

NETWORK_OPTIONS = ("width", "block", "shortcuts", "stem", "dropout", "drop_path")
"""Keys of student and teacher that are options of `fastkd.models.create_model`."""


class StudentConfig(Section):
    """The network that is trained (`fastkd.models`)."""

    name: str
    """Zoo name, timm:NAME or torchvision:NAME; `fastkd models` lists them."""
    width: PositiveFloat | None = None
    """Factor on all widths of a zoo residual network."""
    block: str | None = None
    """Cheap block in place of its 3x3 convolutions: G:4, G:N:8, G:N, B:2, BG:2:4, BG:2:M, S-2x2."""
    shortcuts: Shortcuts | None = None
    """false: none; projection: only where the shape changes; pad: there without weights."""
    stem: str | None = None
    """First layers of a ResNet-18 or 34: cifar, imagenet, or imagenet-nopool."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability inside the residual blocks of a WRN."""
    drop_path: Annotated[float | None, Since("0.2")] = Field(default=None, ge=0, lt=1)
    """Stochastic depth of a timm or torchvision network: the chance of its last block to be
    skipped, of earlier ones in proportion."""
    kernels: Annotated[KernelChoice, NoEffect] = DEFAULT_KERNELS
    """Grouped 3x3 and 1x1 convolutions as one op: plain (nowhere), auto (where it is measured to be
    faster), fused (wherever it can be)."""
    weights: str | None = None
    """Initial weights: a .safetensors, .pt or .pth file, a run folder, or one of transformers."""
    weights_key: Annotated[str | None, Since("0.2")] = Field(default=None, min_length=1)
    """Which network in the weight file, if several fit: a dotted path, such as state_dict or
    model.teacher; by default the only one that fits, an average (EMA) before others."""
    pretrained: bool = False
    """Download the published weights of a timm or torchvision network; weights=... overrides it."""
    new_head: bool = False
    """Load all but the classifier from these weights; the classifier is newly initialised."""
    frozen: Literal["backbone"] | None = None
    """backbone: train only the classifier; the rest, with batch norms, runs as in evaluation."""

    @model_validator(mode="after")
    def _has_a_body(self) -> "StudentConfig":
        if (self.new_head or self.frozen) and not (self.weights or self.pretrained):
            what = "new_head=true replaces the classifier"
            if not self.new_head:
                what = "frozen=backbone keeps the layers"
            raise ValueError(
                f"{what} of a trained network: set weights=FILE or a run folder, or (timm and "
                f"torchvision) pretrained=true as well"
            )
        return self

    @model_validator(mode="after")
    def _has_a_file(self) -> "StudentConfig":
        if self.weights_key and not self.weights:
            raise ValueError(
                f"weights_key={self.weights_key} names a network in a weight file: set "
                f"weights=FILE as well"
            )
        return self

    @field_validator("block", mode="before")
    @classmethod
    def _canonical(cls, value: object) -> object:
        if value is None:
            return None
        try:
            return str(parse_block(value))  # type: ignore[arg-type]
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def label(self) -> str:
        """For display: `wrn_40_2 G(4)`, with the block only if the recipe sets it."""
        return f"{self.name} {self.block}" if self.block else self.name

    def options(self) -> dict[str, Any]:
        """The options of `create_model` that are set."""
        chosen = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}
