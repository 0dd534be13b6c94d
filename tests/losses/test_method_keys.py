"""Recipe keys of the losses with keys of their own: what they build, what they refuse."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

import fastkd.losses
from fastkd.errors import UserError
from fastkd.losses.base.registry import build_terms
from fastkd.recipes.loading import load_recipe

# Name of the loss -> its class, and keys in another value than the default with what they set.
KEYS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "kd": ("KD", {"ce_weight": 0.1, "standardize": True}, lambda t: t.standardize),
    "soft_ce": (
        "SoftCE",
        {"temperature": 3.0},
        lambda t: t.loss.temperature == 3 and t.loss.keep_teacher_entropy,
    ),
    "dkd": (
        "DKD",
        {"alpha": 2.0, "beta": 3.0, "temperature": 5.0, "warmup_epochs": 7, "standardize": True},
        lambda t: (
            (t.alpha, t.beta, t.temperature, t.warmup_epochs, t.standardize) == (2, 3, 5, 7, True)
        ),
    ),
    "dist": (
        "DIST",
        {"temperature": 1.0, "gather": False},
        lambda t: (t.temperature, t.gather) == (1, False),
    ),
    "reviewkd": (
        "ReviewKD",
        {"student": ["stage1"], "teacher": ["stage2:preact"], "max_width": 64, "warmup_epochs": 1},
        lambda t: (
            t.needs == ("x/student/stage1", "x/teacher/stage2:preact")
            and (t.max_width, t.warmup_epochs) == (64, 1)
        ),
    ),
    "ab": (
        "AB",
        {"pairs": {"stage1:preact": "stage2:preact"}, "margin": 2.0},
        lambda t: (
            t.needs == ("x/student/stage1:preact", "x/teacher/stage2:preact") and t.margin == 2
        ),
    ),
    "fsp": (
        "FSP",
        {"pairs": {"stem": "stem", "stage2": "stage2", "stage1": "stage1"}},
        # In the order given: consecutive taps belong together.
        lambda t: (
            [need.rpartition("/")[2] for need in t.needs[::2]] == ["stem", "stage2", "stage1"]
        ),
    ),
    "ft": (
        "FT",
        {"pairs": {"stage3": "stage3"}, "rate": 0.25},
        lambda t: t.rate == 0.25 and t.weights["ft_reconstruction"] == 1,
    ),
    "simkd": (
        "SimKD",
        {"student": "stage2", "teacher": "stage3:preact", "factor": 4},
        lambda t: t.needs == ("x/student/stage2", "x/teacher/stage3:preact") and t.factor == 4,
    ),
    "stage_mse": (
        "StageMSE",
        {"pairs": {"stage1": "stage2"}, "reduction": "sum", "eta_epochs": 10, "eta_end": 0.25},
        lambda t: (
            t.needs == ("x/student/stage1", "x/teacher/stage2")
            and t.reduction == "sum"
            and (t.eta(0), t.eta(10)) == (1, 0.25)
        ),
    ),
    "jointrd": (
        "JointRD",
        {
            **{"stages": ["stage1", "stage2"], "feature_weight": 0.5, "form": "released"},
            **{"eta_epochs": 10, "eta_end": 0.25},
        },
        lambda t: (
            t.stages == ("stage1", "stage2")
            and t.form == "released"
            and t.weights["jointrd_features"] == 0.5 * t.weight
            and (t.eta(0), t.eta(10)) == (1, 0.25)
        ),
    ),
    "discriminator": (
        "Discriminator",
        {"mode": "reversed", "hidden": [32, 8], "last_relu": True, "lr_rule": "paper"},
        lambda t: (
            (t.mode, t.hidden, t.last_relu, t.lr_rule) == ("reversed", (32, 8), True, "paper")
        ),
    ),
}


def recipe(losses: dict[str, Any], keys: Sequence[str] = ()) -> Any:
    values = {
        "name": "test",
        "data": {"name": "digits"},
        "student": {"name": "resnet8"},
        "teacher": {"name": "resnet8", "train": True},
        "losses": losses,
    }
    return load_recipe(None, values=values, overrides=list(keys))


@pytest.mark.parametrize("name", KEYS)
def test_keys_reach_the_term(name: str) -> None:
    class_name, keys, holds = KEYS[name]
    (term,) = build_terms(recipe({name: {"weight": 0.7, **keys}}).losses)
    assert type(term) is getattr(fastkd.losses, class_name)
    assert term.name == name
    assert term.weights[name] == 0.7
    assert holds(term)


@pytest.mark.parametrize("name", KEYS)
def test_no_loss_without_its_weight(name: str) -> None:
    with pytest.raises(UserError, match=rf"losses\.{name}\.weight"):
        recipe({name: {key: value for key, value in KEYS[name][1].items() if key != "weight"}})


@pytest.mark.parametrize(
    "losses",
    [
        {"mixed_ce": {"weight": 0.3}},
        {
            "kd": {
                **{"weight": 1, "ce_weight": 0.1, "views": ["xprime"]},
                "xprime_target": "mixed_logits",
            }
        },
    ],
    ids=["mixed_ce", "mixed_logits"],
)
def test_mixed_targets_need_a_second_view(losses: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"needs the view x': set augment\.xprime"):
        recipe(losses)
    for kind in ("cutmix", "mixup", "cutout", "randaugment"):
        (term,) = build_terms(recipe(losses, [f"augment.xprime={kind}"]).losses)
        assert any("xprime/mixed/" in need for need in term.needs)


def test_a_target_on_a_view_that_is_not_used_is_refused() -> None:
    keys = {"weight": 1.0, "ce_weight": 0, "xprime_target": "mixed_logits"}
    with pytest.raises(UserError, match="which is missing from views: give views x and xprime"):
        recipe({"kd": keys}, ["augment.xprime=cutmix"])


@pytest.mark.parametrize("name", ["soft_ce", "dist", "discriminator"])
def test_other_view(name: str) -> None:
    with pytest.raises(UserError, match=r"needs the view x': set augment\.xprime"):
        recipe({name: {"weight": 1.0, "view": "xprime"}})
    made = recipe({name: {"weight": 1.0, "view": "xprime"}}, ["augment.xprime=cutmix"])
    (term,) = build_terms(made.losses)
    tap = "mean_logits" if name == "discriminator" else "logits"
    assert term.needs == ("xprime/student/logits", f"xprime/teacher/{tap}")


def test_wrong_values_are_named() -> None:
    with pytest.raises(UserError, match="got 2 taps of the student and 1 of the teacher: name as"):
        recipe({"reviewkd": {"weight": 1, "student": ["stage1", "stage2"], "teacher": ["stage1"]}})
    with pytest.raises(UserError, match=r"losses\.fsp\.pairs=.*at least 2 entries"):
        recipe({"fsp": {"weight": 1.0, "pairs": {"stage1": "stage1"}}})
    with pytest.raises(UserError, match=r"losses\.jointrd\.form=text: .*paper.*released"):
        recipe({"jointrd": {"weight": 1.0, "form": "text"}})
    with pytest.raises(UserError, match=r"losses\.dkd\.warmup_epoch\b.*warmup_epochs"):
        recipe({"dkd": {"weight": 1.0, "warmup_epoch": 3}})
