"""Recipe keys for a network whose encoder is trained first, and the losses of that training.

`Recipe.of_encoder` makes the recipe of that training, `fastkd.runs.encoders` runs it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import PositiveInt

from fastkd.config.section import Section, Since
from fastkd.config.values import is_mapping
from fastkd.data.config import DataConfig
from fastkd.data.label_map_keys import wrong_data_key
from fastkd.data.normalization import LABEL_MAPS
from fastkd.losses.cross_entropy import ClassWeights
from fastkd.models.config import StudentConfig
from fastkd.models.zoo.families import encoder_of

__all__ = ["EncoderConfig", "losses_of_encoder", "weighs_classes", "wrong_encoder"]


class EncoderConfig(Section):
    """The encoder of a network, trained before the whole network, which starts from it: `erfnet`
    has one. The student alone and a teacher that the recipe trains are trained so, too."""

    epochs: Annotated[PositiveInt | None, Since("0.2")] = None
    """Length of that training; by default that of the training that follows."""
    label_stride: Annotated[PositiveInt, Since("0.2")] = 8
    """data.label_stride of that training."""
    class_weights: Annotated[ClassWeights | None, Since("0.2")] = None
    """Weights of the classes in that training, for the losses that have some; by default those of
    the training that follows."""


def wrong_encoder(
    config: EncoderConfig,
    data: DataConfig,
    student: StudentConfig,
    losses: Mapping[str, Section],
    *,
    trained: Sequence[str],
    cached: bool,
) -> str | None:
    """What does not go with the section in a recipe, in a sentence; None if all does.

    trained: names of the teachers that the recipe trains. cached: their answers are kept.
    """
    encoder = encoder_of(student.name)
    if data.name not in LABEL_MAPS:
        return (
            f"encoder trains a network for label maps, and data.name={data.name} has labels of "
            f"whole images: leave it out (encoder=null)"
        )
    if not (encoder or any(map(encoder_of, trained))):
        return (
            f"encoder trains the first layers of a network before the whole, and {student.name} "
            f"has none that are trained by themselves, as erfnet has: leave it out (encoder=null)"
        )
    if encoder and (student.blocks or student.depth):
        key = "blocks" if student.blocks else "depth"
        return (
            f"encoder trains the first layers of {student.name} alone, and student.{key} speaks of "
            f"the whole network: leave one of them out, or use student.block"
        )
    if student.weights and encoder:
        return (
            f"encoder trains what {student.name} starts from, so that student.weights="
            f"{student.weights} would not be read: leave one of them out"
        )
    if encoder and not losses_of_encoder(losses, encoder.taps, config):
        return (
            f"no loss of this recipe has a tap that {encoder.name} has, which encoder trains "
            f"first: {', '.join(encoder.taps)}"
        )
    if config.class_weights and not any(map(weighs_classes, losses.values())):
        return (
            "encoder.class_weights takes the place of the class_weights of a loss, and none of "
            "this recipe has any: set losses.ce.class_weights=erfnet, or leave it out"
        )
    if cached:
        return (
            "teacher.cache keeps the answers of one training, and encoder makes two of them: "
            "leave one of them out"
        )
    return wrong_data_key(data.model_copy(update={"label_stride": config.label_stride}))


def weighs_classes(loss: Section) -> bool:
    """Whether a loss has weights of the classes."""
    return getattr(loss, "class_weights", "none") != "none"


def losses_of_encoder(
    losses: Mapping[str, Section], taps: Collection[str], config: EncoderConfig
) -> dict[str, dict[str, Any]]:
    """The losses that an encoder with these taps can have; of their pairs of taps, its own.

    The weight of a loss that loses pairs grows, so that it counts as much as with all of them:
    Moonshine (arXiv:1711.02613, section 5.2) has 600 with five layers, and 1000 with three.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, section in losses.items():
        keys = section.model_dump()
        if config.class_weights is not None and weighs_classes(section):
            keys["class_weights"] = config.class_weights
        pairs = keys.get("pairs")
        if is_mapping(pairs):
            kept = {student: tap for student, tap in pairs.items() if student in taps}
            if not kept:
                continue
            keys |= {"pairs": kept, "weight": keys["weight"] * len(pairs) / len(kept)}
        found[name] = keys
    return found
