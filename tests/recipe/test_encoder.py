"""Recipes of two stages: what the encoder is trained with, and what is refused."""

import pytest

from fastkd.errors import UserError
from fastkd.recipe.printing import valid_keys
from fastkd.recipes.loading import load_recipe
from fastkd.training.schedules import Schedule

PAIRS = "{stage1: stage1, stage2: stage2, stage3: stage3, stage4: stage4, stage5: stage5}"
ERFNET = (
    "student.name=erfnet",
    "student.width=null",
    "student.block=G:N",
    "teacher.name=erfnet",
    "data.name=camvid",
)
AT = ("losses.kd=null", "losses.ce.weight=1", "losses.at.weight=600", f"losses.at.pairs={PAIRS}")


def recipe(*words):
    return load_recipe("quickstart", overrides=[*ERFNET, *words])


def flat(one):
    return {key: value for key, value in one.dotted().items() if key != "description"}


def differing(one, other):
    ones, others = flat(one), flat(other)
    return {key for key in ones | others if ones.get(key, "-") != others.get(key, "-")}


def test_without_the_section_there_is_one_stage():
    plain = recipe()
    assert plain.encoder is None and plain.of_encoder() is None
    assert "encoder" not in plain.outcome()
    assert recipe("encoder.label_stride=8").digest() != plain.digest()
    assert recipe("encoder={}").digest() == recipe("encoder.label_stride=8").digest()
    assert {"encoder.epochs", "encoder.label_stride"} <= set(valid_keys())


def test_the_encoder_learns_from_the_same_data_with_the_same_losses():
    whole = recipe(*AT, "encoder={}", "baseline.lrs=0.1")
    first = whole.of_encoder()
    assert differing(whole, first) == {
        "name",
        "student.name",
        "data.label_stride",
        "losses.at.weight",
        "losses.at.pairs.stage4",
        "losses.at.pairs.stage5",
        "baseline.lrs",
        "encoder.epochs",
        "encoder.label_stride",
        "encoder.class_weights",
        "encoder",
    }
    assert (first.name, first.student.name) == ("quickstart/encoder", "erfnet_encoder")
    assert (first.student.block, first.data.label_stride) == ("G(N)", 8)
    assert first.teacher == whole.teacher
    # Moonshine: 600 with five layers, 1000 with the three of the encoder.
    assert first.losses["at"].weight == 1000.0
    assert list(first.losses["at"].pairs) == ["stage1", "stage2", "stage3"]
    assert first.of_encoder() is None


def test_a_loss_without_a_pair_in_the_encoder_is_for_the_second_stage():
    words = ("losses.sp.weight=3", "losses.sp.pairs.stage5=stage5")
    first = recipe(*words, "encoder={}").of_encoder()
    assert list(first.losses) == ["kd"]
    kept = recipe("losses.sp.weight=3", "losses.sp.pairs.logits=logits", "encoder={}").of_encoder()
    assert kept.losses["sp"].weight == 3


def test_the_schedule_follows_the_length_of_either_stage():
    words = ("epochs=20", "optim.schedule=poly", "encoder.epochs=10", "optim.warmup_epochs=4")
    whole = recipe(*words, "epoch_factor=0.5")
    first = whole.of_encoder()
    assert (whole.total_epochs, first.total_epochs) == (10, 5)
    assert first.optim.warmup_epochs == 2
    for one in (whole, first):
        schedule = Schedule.from_config(
            one.scaled_optim(), epochs=one.total_epochs, steps_per_epoch=3
        )
        last = one.total_epochs - 1
        assert schedule.lr_factor(3 * last) == pytest.approx((1 - last / (last + 1)) ** 0.9)


def test_the_teacher_and_the_student_alone_are_trained_so_too():
    whole = recipe("encoder.epochs=7", "teacher.epochs=30")
    teacher, alone = whole.as_teacher(), whole.without_teacher("alone")
    assert teacher.encoder == alone.encoder == whole.encoder
    lessons = [teacher.of_encoder(), alone.of_encoder()]
    assert [one.epochs for one in lessons] == [7, 7]
    assert [one.name for one in lessons] == ["teacher/camvid/erfnet/encoder", "alone/encoder"]
    assert [list(one.losses) for one in lessons] == [["ce"], ["ce"]]
    assert lessons[0].student.block is None
    assert recipe("encoder={}", "teacher.epochs=30").as_teacher().of_encoder().epochs == 30


def test_the_weights_of_the_classes_may_be_the_encoder_s_own():
    words = ("losses.ce.weight=1", "losses.kd.ce_weight=0", "losses.ce.class_weights=erfnet")
    whole = recipe("encoder.class_weights=erfnet_encoder", *words)
    teacher, alone = whole.as_teacher(), whole.without_teacher("alone")
    for one in (whole, teacher, alone):
        assert one.losses["ce"].class_weights == "erfnet"
        assert one.of_encoder().losses["ce"].class_weights == "erfnet_encoder"
    same = recipe("encoder={}", *words).of_encoder()
    assert same.losses["ce"].class_weights == "erfnet"
    listed = recipe("encoder.class_weights=1,2,0.5", *words).of_encoder()
    assert listed.losses["ce"].class_weights == (1, 2, 0.5)
    # KD has a cross entropy of its own.
    within = recipe("losses.kd.class_weights=erfnet").without_teacher("alone")
    assert within.losses["ce"].class_weights == "erfnet"


def test_a_network_that_has_no_encoder_is_trained_at_once():
    whole = recipe("encoder={}", "student.name=resnet8", "student.block=null")
    assert whole.of_encoder() is None
    assert whole.as_teacher().of_encoder().student.name == "erfnet_encoder"
    # One that is fine-tuned starts from its weights.
    fine = recipe("encoder={}", "teacher.weights=t.pt", "teacher.new_head=true")
    assert fine.as_teacher().encoder is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("student.name=resnet8", "student.block=null", "teacher.name=wrn_16_2"),
            "resnet8 has none that are trained by themselves, as erfnet has: leave it out",
        ),
        (
            ("student.name=resnet8", "student.block=null", "teacher.weights=t.pt"),
            "resnet8 has none that are trained by themselves",
        ),
        (("encoder.class_weights=erfnet",), "class_weights of a loss, and none of this recipe has"),
        (("data.name=digits",), "data.name=digits has labels of whole images: leave it out"),
        (("data.multiple=4",), "data.label_stride=8 does not divide data.multiple=4"),
        (
            ("losses.kd=null", "losses.sp.weight=1", "losses.sp.pairs.stage5=stage5"),
            "no loss of this recipe has a tap that erfnet_encoder has, .*: stem, stage1:preact",
        ),
        (("student.weights=s.pt",), "student.weights=s.pt would not be read: leave one of them"),
        (("teacher.cache=auto",), "teacher.cache keeps the answers of one training"),
        (("encoder.epochs=0",), "encoder.epochs"),
        (("encoder.stride=8",), "encoder.stride"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        recipe("encoder.label_stride=8", *words)
