"""What a recipe may say of further teachers, by file and by the command line."""

from pathlib import Path
from typing import Any

import pytest

from fastkd.errors import UserError
from fastkd.recipe.printing import annotated_yaml
from fastkd.recipes.loading import load_recipe

READY = ("teacher.train=false", "teacher.weights=a.pt")
SECOND = ("teacher.ensemble.0.name=resnet8", "teacher.ensemble.0.weights=b.pt")


def ensemble_of(*keys: str) -> Any:
    recipe = load_recipe("quickstart", overrides=[*READY, *keys])
    assert recipe.teacher is not None
    return recipe


def test_members_are_added_and_changed_by_their_number(tmp_path: Path) -> None:
    recipe = ensemble_of(
        *SECOND,
        "teacher.ensemble.1.name=timm:resnet18.tv_in1k",
        "teacher.ensemble.1.pretrained=true",
        "teacher.ensemble.0.precision=fp32",
        "teacher.ensemble.0.compile=off",
        "teacher.ensemble.0.class_map=3",
    )
    first, second = recipe.teacher.ensemble
    assert (first.name, first.weights, first.precision) == ("resnet8", "b.pt", "fp32")
    assert (first.compile, first.class_map) == ("off", (3,))
    assert (second.name, second.pretrained) == ("timm:resnet18.tv_in1k", True)
    # A saved recipe comes back as it was, and can be changed in the same way.
    (tmp_path / "config.yaml").write_text(annotated_yaml(recipe))
    again = load_recipe(None, config=tmp_path / "config.yaml")
    assert again == recipe
    assert again.digest() == recipe.digest()
    other = load_recipe(
        None, config=tmp_path / "config.yaml", overrides=["teacher.ensemble.1.resolution=64"]
    )
    assert other.teacher.ensemble[1].resolution == 64
    assert other.digest() != recipe.digest() != ensemble_of().digest()
    assert ensemble_of(*SECOND, "teacher.ensemble=").teacher.ensemble == ()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            (*SECOND, "teacher.ensemble.0.wieghts=c.pt"),
            "unknown key teacher.ensemble.0.wieghts, did you mean teacher.ensemble.0.weights?",
        ),
        (
            (*SECOND, "teacher.ensemble.1.name=resnet14", "teacher.ensemble.1.wieghts=c.pt"),
            "unknown key teacher.ensemble.1.wieghts, did you mean teacher.ensemble.1.weights?",
        ),
        (
            (*SECOND, "teacher.ensemble.2.name=resnet8"),
            "unknown key teacher.ensemble.2.name: teacher.ensemble is a list that holds "
            "teacher.ensemble.0; teacher.ensemble.1 would add to it",
        ),
        (
            ("teacher.ensemble.name=resnet8",),
            "teacher.ensemble is a list that holds nothing; teacher.ensemble.0 would add to it",
        ),
        (
            (*SECOND, "teacher.ensemble.0.width=0"),
            "teacher.ensemble.0.width=0: expected a number above 0, or null",
        ),
        (
            (*SECOND, "teacher.ensemble.0.precision=bf61"),
            "teacher.ensemble.0.precision=bf61: expected one of bf16, fp16, fp32, or null; did",
        ),
        (
            ("teacher.ensemble.0.weights=b.pt",),
            "teacher.ensemble.0.name is missing and has no default: set it, text",
        ),
        (
            SECOND[:1],
            "the teacher resnet8 has no weights: set teacher.ensemble.0.weights=FILE or a run",
        ),
        (
            (*SECOND, "teacher.ensemble.0.std=1,1,1"),
            "teacher.ensemble.0.mean and teacher.ensemble.0.std come together",
        ),
        (
            (*SECOND, "teacher.ensemble.0.ensemble.0.name=resnet8"),
            "unknown key teacher.ensemble.0.ensemble, did you mean teacher.ensemble?",
        ),
        (("teacher.ensemble=resnet8",), "teacher.ensemble=resnet8: expected a list such as [{na"),
        (
            # Neither how it computes nor what it would have learned in makes it another.
            (
                *SECOND,
                "teacher.name=resnet8",
                "teacher.weights=b.pt",
                "teacher.epochs=null",
                "teacher.precision=fp32",
                "teacher.compile=on",
            ),
            "teacher.ensemble.0 is teacher again (resnet8, the same weights): an ensemble "
            "needs another network or other weights",
        ),
    ],
)
def test_mistakes_name_the_member(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ensemble_of(*keys)
    assert message in str(caught.value)
