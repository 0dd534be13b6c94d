"""Needs are text with parts, and known from the keys of a loss before anything is built."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.losses import LossTerm
from fastkd.losses.base.keys import LossKeys
from fastkd.losses.base.needs import XPRIME_TEACHER_LOGITS, Need
from fastkd.losses.base.registry import config_class, term_names
from fastkd.recipes.loading import load_recipe

PAIRS = {"stage1": "stage1", "stage2": "stage2"}
OTHERS: dict[str, list[dict[str, Any]]] = {
    "crd": [{"pairs": {"stage1": "stage2"}}],
    "kd": [
        {"ce_weight": 0},
        {"views": ["x", "xprime"]},
        {"views": ["xprime"]},
        {"views": ["xprime"], "xprime_target": "mixed_logits"},
        {"views": ["x", "xprime"], "xprime_target": "mixed_logits", "ce_weight": 0},
    ],
    "jointrd": [
        {"form": "released"},
        {"feature": "logits"},
        {"feature": "map", "stages": ["stage1", "stage2"]},
    ],
    "dist": [{"view": "xprime"}],
    "discriminator": [{"view": "xprime"}],
    "reviewkd": [{"student": ["stage1"], "teacher": ["stage2:preact"]}],
    "simkd": [{"student": "stage2", "teacher": "stage3:preact"}],
    "soft_ce": [{"view": "xprime"}],
}


def keys_of(name: str, given: dict[str, Any]) -> LossKeys:
    fields = config_class(name).model_fields
    values = {"weight": 0.7, "ce_weight": 0.1, "pairs": PAIRS}
    stated = {key: values[key] for key, field in fields.items() if field.is_required()}
    return config_class(name)(**stated | given)


CASES = [(name, given) for name in term_names() for given in ({}, *OTHERS.get(name, ()))]


@pytest.mark.parametrize(("name", "given"), CASES, ids=map(str, CASES))
def test_a_term_needs_and_weighs_what_its_keys_say(name: str, given: dict[str, Any]) -> None:
    keys = keys_of(name, given)
    term = keys.build(name)
    assert term.needs == keys.needs()
    assert list(term.weights.items()) == list(keys.weights(name).items())


def test_a_recipe_is_checked_without_building_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a loss was built")

    monkeypatch.setattr(LossTerm, "__init__", refuse)
    given = ["augment.xprime=cutmix", "losses.kd.views=x,xprime"]
    assert load_recipe("quickstart", overrides=given).losses


def test_a_need_is_its_text() -> None:
    need = Need("xprime/teacher/logits")
    assert (need.view, need.net, need.tap) == ("xprime", "teacher", "logits")
    assert need == "xprime/teacher/logits" == XPRIME_TEACHER_LOGITS
    assert {"xprime/teacher/logits": 1}[need] == 1
    assert type(str(need)) is str
    for other in (copy.deepcopy(need), Need(need), Need.of("xprime", "teacher", "logits")):
        assert (other, other.view, other.net, other.tap) == (need, "xprime", "teacher", "logits")
    assert Need("x/student/layer1/conv").tap == "layer1/conv"


def test_an_unknown_view_is_told_the_views() -> None:
    with pytest.raises(ValueError, match=r"view one of x, xprime.*got 'y/student/logits'"):
        Need("y/student/logits")


class LooksUp(LossTerm):
    """As a user may write it: by its needs."""

    def __init__(self) -> None:
        super().__init__("looks_up", ("x/student/logits", "x/teacher/logits"), {"looks_up": 1.0})

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        student_NC, teacher_NC = (tensors[need] for need in self.needs)
        return (student_NC - teacher_NC).square().mean()


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch.compile of 2.11 looks up plain text only: `self.wanted(inputs)` gives it that",
)
def test_looking_up_a_need_compiles_to_one_graph() -> None:
    term: nn.Module = LooksUp()
    tensors = {"x/student/logits": torch.ones(2, 3), "x/teacher/logits": torch.zeros(2, 3)}
    assert torch.compile(term, fullgraph=True, backend="eager")(tensors) == 1
