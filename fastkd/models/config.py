"""Recipe keys for one network: which one, from which weights, which part is trained."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastkd.config.section import NoEffect, Section, Since
from fastkd.config.values import is_list, is_mapping
from fastkd.errors import UserError
from fastkd.models.blocks.genotype import (
    canonical_blocks,
    canonical_depth,
    genotype_in_words,
)
from fastkd.models.blocks.grammar import parse_block
from fastkd.models.blocks.layers import Shortcuts
from fastkd.models.planner import DEFAULT_KERNELS, KernelChoice

__all__ = ["NETWORK_OPTIONS", "StudentConfig"]

NETWORK_OPTIONS = (
    "width",
    "block",
    "blocks",
    "depth",
    "shortcuts",
    "stem",
    "dropout",
    "drop_path",
)
"""Keys of student and teacher that are options of `fastkd.models.create_model`."""


class StudentConfig(Section):
    """The network that is trained (`fastkd.models`)."""

    name: str
    """Zoo name, timm:NAME or torchvision:NAME; `fastkd models` lists them."""
    width: PositiveFloat | None = None
    """Factor on all widths of a zoo residual network."""
    block: str | None = None
    """Cheap block in place of its 3x3 convolutions: G:4, G:N:8, G:N, B:2, BG:2:4, BG:2:M, S-2x2."""
    blocks: Annotated[dict[str, str] | None, Since("0.2")] = None
    """Instead of block: one for each module path, stage or pattern, such as {layer1: G:4,
    layer3.*: BG:2:M:8}; the most specific one counts, what none names stays."""
    depth: Annotated[dict[str, PositiveInt] | tuple[PositiveInt, ...] | None, Since("0.2")] = None
    """Residual blocks that a stage keeps, its first ones: {stage2: 3}, or 5,3,5 for all stages in
    order. The others are left out."""
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
    """Initial weights: a .safetensors, .pt or .pth file, a run folder, or one of transformers.
    With blocks or depth those of the whole network do, too: what fits is taken."""
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

    @field_validator("blocks", "depth", mode="before")
    @classmethod
    def _entries(cls, value: object, info: ValidationInfo) -> object:
        """Without entries that `blocks.layer1=null` removes; blocks in their canonical form."""
        if not is_mapping(value):
            return value  # null, a list, or what pydantic refuses
        left = {key: one for key, one in value.items() if one is not None}
        if value and not left:
            return None
        if info.field_name == "depth":
            return left
        try:
            return canonical_blocks(left)
        except UserError as error:
            raise ValueError(str(error)) from None

    @field_validator("depth", mode="after")
    @classmethod
    def _canonical_depth(
        cls, value: dict[str, int] | tuple[int, ...] | None
    ) -> dict[str, int] | tuple[int, ...] | None:
        if value is not None:
            try:
                canonical_depth(value)
            except UserError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _is_one_network(self) -> "StudentConfig":
        if self.block and self.blocks:
            raise ValueError(
                f"block={self.block} gives every layer the same block, blocks those that it names: "
                f"set one of them, block=null removes a recipe's own"
            )
        key = "blocks" if self.blocks else "depth" if self.depth else None
        if key and self.frozen and self.pretrained and not self.weights:
            raise ValueError(
                f"frozen=backbone keeps the layers as they are, and {key} changes them: leave out "
                f"one of them, or set weights=FILE of a network that was trained like this"
            )
        return self

    @property
    def genotype(self) -> str:
        """For display: `G(4)`, or what blocks and depth say in short; empty if none is set."""
        words = self.block, genotype_in_words(self.blocks, self.depth)
        return " ".join(word for word in words if word)

    @property
    def label(self) -> str:
        """For display: `wrn_40_2 G(4)`, with the blocks only if the recipe sets them."""
        return f"{self.name} {self.genotype}" if self.genotype else self.name

    def options(self) -> dict[str, Any]:
        """The options of `create_model` that are set."""
        chosen = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        plain = {name: list(one) if is_list(one) else one for name, one in chosen.items()}
        return {name: value for name, value in plain.items() if value is not None}
