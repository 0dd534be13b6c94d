"""`fastkd.distill` on label maps: the step is the formula's, or one sentence says why not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.compute.ranks import World
from fastkd.data.loaders.label_rules import LabelRules, LabelUse, kind_on_ranks
from fastkd.data.loaders.map_rules import pixel_counter
from fastkd.errors import RunFailed, UserError
from fastkd.evaluation.confusion import confused, of_confusion
from fastkd.losses import AT, KD, BinaryCrossEntropy, CrossEntropy, MixedCE
from fastkd.training.config import OptimConfig

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
SGD = OptimConfig(name="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
NONE = -100
CLASSES = 4
DRAWN = torch.Generator().manual_seed(5)
X = torch.randn(6, 3, 8, 12, generator=DRAWN)
MAPS = torch.randint(0, CLASSES, (6, 8, 12), generator=DRAWN)
MAPS[:, :2] = NONE
PLAIN = [(X, MAPS)]


class Dense(nn.Module):
    """Answers at `1/stride` of the size, as torchvision's networks do if `named`."""

    def __init__(self, seed: int, classes: int = CLASSES, stride: int = 1, named: bool = False):
        super().__init__()
        torch.manual_seed(seed)
        self.layer1 = nn.Conv2d(3, 5, 3, stride, 1)
        self.layer2 = nn.Conv2d(5, classes, 1)
        self.named = named

    def forward(self, images: Tensor) -> Any:
        logits = self.layer2(self.layer1(images).tanh())
        return {"out": logits, "aux": logits} if self.named else logits


ONE_HOT = F.one_hot(MAPS.clamp(min=0)).permute(0, 3, 1, 2)


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(288, CLASSES))


def distill(train: Any, val: Any = PLAIN, student: Any = None, **options: Any) -> Any:
    given = {"epochs": 1, "losses": [CrossEntropy()], "optim": SGD} | QUIET | options
    teacher = given.pop("teacher", None)
    return fastkd.distill(student or Dense(1), teacher, train, val, **given)


def stepped(train: Any, losses: Any, val: Any = PLAIN, **net: Any) -> Tensor:
    student = Dense(1, **net)
    distill(train, val, student, losses=losses, teacher=Dense(2))
    return student.layer2.weight.detach()


def formula(loss: Any, labels: Tensor = MAPS, **net: Any) -> Tensor:
    """The weights after one step, in float64."""
    student, teacher = Dense(1, **net).double(), Dense(2).double()
    size = labels.shape[1:]
    answers = []
    for model in (student, teacher):
        given = model(X.double())
        logits = given["out"] if isinstance(given, dict) else given
        answers.append(F.interpolate(logits, size, mode="bilinear", align_corners=False))
    weight = student.layer2.weight
    value = loss(answers[0], answers[1].detach())
    return (weight - 0.5 * torch.autograd.grad(value, weight)[0]).detach().float()


def ce(s: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(s, MAPS, ignore_index=NONE)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, Dense(1).layer2.weight, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_label_maps_of_any_form_are_the_classes_they_name(dtype, channel, as_numpy):
    labels = MAPS.to(dtype)
    labels = labels[:, None] if channel else labels
    given = [(X, labels.numpy() if as_numpy else labels)]
    close(stepped(given, [CrossEntropy()], given), formula(ce))


def test_bytes_have_no_negative_number_and_are_taken_without_one():
    whole = MAPS.clamp(min=0)
    given = [(X, whole.to(torch.uint8))]
    expected = formula(lambda s, _: F.cross_entropy(s, whole))
    close(stepped(given, [CrossEntropy()], given), expected)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_logits_come_to_the_size_of_the_labels(stride, named):
    close(
        stepped(PLAIN, [CrossEntropy()], stride=stride, named=named),
        formula(ce, stride=stride, named=named),
    )


def test_so_does_the_teachers_answer_pixel_by_pixel():
    def kl(s: Tensor, t: Tensor) -> Tensor:
        pixels = F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="none").sum(1)
        known = MAPS != NONE
        return 16 * pixels[known].mean()

    found = stepped(PLAIN, [KD()])
    close(found, formula(lambda s, t: 0.9 * kl(s, t) + 0.1 * ce(s, t)))


@pytest.mark.parametrize("factor", [2, 4])
def test_label_maps_may_be_a_whole_fraction_of_the_images(factor):
    small = MAPS[:, ::factor, ::factor]
    given = [(X, small)]
    expected = formula(lambda s, _: F.cross_entropy(s, small, ignore_index=NONE), small)
    close(stepped(given, [CrossEntropy()], given), expected)


def test_without_a_loss_that_reads_them_there_need_be_no_labels():
    for train in ([(X, MAPS)], [X], [(X, None)], [(X, ["a.png"] * 6)]):
        result = distill(train, losses=[KD(ce_weight=0)], teacher=Dense(2), student=Dense(1))
        assert result.label_kind == "pixel"
        assert 0 <= result.metrics["miou_last"] <= 1


def test_a_batch_of_ignored_pixels_alone_teaches_nothing():
    nothing = torch.full_like(MAPS, NONE)
    student = Dense(1)
    before = [p.detach().clone() for p in student.parameters()]
    rows: list[dict[str, Any]] = []
    train = [(X, nothing), (X, MAPS)]
    distill(train, student=student, on_epoch=rows.append, losses=[CrossEntropy()])
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert rows[0]["skipped"] == 0
    assert rows[0]["train_loss"] > 0
    student = Dense(1)
    with pytest.raises(RunFailed, match="none of its images has a label"):
        distill([(X, nothing)], student=student)
    for one, own in zip(student.parameters(), before, strict=True):
        assert torch.equal(one.detach(), own)


def test_what_is_measured_is_what_the_network_reaches(tmp_path):
    result = distill(PLAIN, epochs=3, teacher=Dense(2), losses=[KD()], out=tmp_path / "run")
    metrics = result.metrics
    logits = result.predict(X)
    assert logits.shape == (6, CLASSES, 8, 12)
    truth = of_confusion(confused(logits.argmax(1), MAPS, CLASSES))
    assert metrics["miou_last"] == pytest.approx(truth["miou"])
    named = {str(number): iou for number, iou in enumerate(truth["class_iou"])}
    assert metrics["class_iou_last"] == pytest.approx(named)
    assert list(metrics["class_iou_best"]) == ["0", "1", "2", "3"]
    assert metrics["chance"] == pytest.approx(truth["chance"])
    assert not [key for key in result.history[0] if "class_iou" in key]
    assert result.history[0]["val_miou"] >= 0
    assert set(metrics["teacher"]) == {"name", "miou", "class_iou"}
    assert result.teacher_accuracy == metrics["teacher"]["miou"]
    shares = result.predict(X, probabilities=True)
    torch.testing.assert_close(shares.sum(1), torch.ones(6, 8, 12))
    assert "mIoU" in repr(result)
    best = of_confusion(confused(result.predict(X, best=True).argmax(1), MAPS, CLASSES))
    assert metrics["miou_best"] == pytest.approx(best["miou"])


def test_a_resumed_run_knows_the_scores_of_its_best_epoch(tmp_path):
    whole = distill(PLAIN, epochs=4, out=tmp_path / "whole", lr=2.0).metrics

    def stop(row):
        if row["epoch"] == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        distill(PLAIN, epochs=4, out=tmp_path / "two", lr=2.0, on_epoch=stop)
    again = distill(PLAIN, epochs=4, out=tmp_path / "two", lr=2.0, resume=True).metrics
    for key in ("class_iou_best", "class_iou_last", "best_epoch", "miou_best", "chance"):
        assert again[key] == whole[key]


def test_predictions_of_one_size_are_one_tensor():
    result = distill(PLAIN)
    assert result.predict([X, X[:2]]).shape == (8, CLASSES, 8, 12)
    with pytest.raises(UserError, match=r"have several sizes \(4x12, 8x12\): call it for the"):
        result.predict([X, X[:, :, :4]])


RGB = torch.randint(0, 256, (6, 3, 8, 12), generator=DRAWN)
WITH_255 = MAPS.clone()
WITH_255[WITH_255 == NONE] = 255


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (MAPS.float(), r"whole numbers: .*got \[6, 8, 12\] of torch.float32: labels.long\(\)"),
        (MAPS.clamp(min=0) / 255, r"of torch.float32: v2.ToDtype or ToTensor scales them to 0..1"),
        (RGB, r"\[6, 3, 8, 12\] of torch.int64 looks like an RGB picture of the labels: load it "),
        (RGB / 255, r"looks like an RGB picture of the labels: load it without convert\('RGB'\)"),
        (RGB.permute(0, 2, 3, 1), r"\[6, 8, 12, 3\] .* looks like an RGB picture of the labels"),
        (WITH_255, r"hold 255, which is not .* network with 4, .*labels\[labels == 255\] = -100"),
        (WITH_255.to(torch.uint8), r"labels = labels.long\(\); labels\[labels == 255\] = -100"),
        (MAPS + 1, r"the label maps hold (4|-99), which is not a class of a network with 4"),
        (MAPS[:, :7], r"have 7x12 pixels \(height x width\) and their images 8x12: resize both"),
        (MAPS[:, ::2], r"have 4x12 pixels .* 8x12: resize both together, the maps by nearest"),
        (MAPS[:, ::2, ::4], "have 4x3 pixels"),
        (F.interpolate(MAPS[:, None].float(), scale_factor=2).long(), "have 16x24 pixels"),
        (MAPS[:4], r"got \[4, 8, 12\] of torch.int64, for 6 images"),
        (ONE_HOT, r"\[6, 4, 8, 12\] of torch.int64 is one-hot, .*: labels.argmax\(1\)"),
        (ONE_HOT.permute(0, 2, 3, 1).float(), r"is one-hot, .*: labels.argmax\(3\)"),
        (F.one_hot(MAPS.clamp(min=0)).permute(0, 3, 1, 2)[:, :2], r"got \[6, 2, 8, 12\] of"),
        (MAPS[:, 0, 0].clamp(min=0), "one answer per pixel, and the data labels whole images: giv"),
        (F.one_hot(MAPS[:, 4, 0]), "and the data labels whole images: give a classifier, or label"),
        ([m.numpy() for m in MAPS], "got list: make it a tensor"),
    ],
    ids=lambda given: f"{given.dtype}{list(given.shape)}" if isinstance(given, Tensor) else "",
)
def test_labels_that_are_no_label_maps_are_refused_in_one_sentence(labels, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        distill([(X, labels)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (RGB, "val_loader: label maps must be .* looks like an RGB picture"),
        (WITH_255, "val_loader: the label maps hold 255"),
        (MAPS[:, :7], "val_loader: the label maps have 7x12"),
        (torch.full_like(MAPS, NONE), r"the images of val_loader have no label \(all are -100\)"),
    ],
)
def test_so_are_those_of_the_validation(labels, sentence):
    with pytest.raises(UserError, match=sentence):
        distill(PLAIN, [(X, labels)])
    student, teacher = Dense(1), Dense(2)
    with pytest.raises(UserError, match=sentence):
        distill([X], [(X, labels)], student, teacher=teacher, losses=[KD(ce_weight=0)])


class ChannelsLast(Dense):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).permute(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_classes_that_come_last_are_said_of_whose_they_are(stride):
    last = ChannelsLast(1, stride=stride)
    with pytest.raises(UserError, match=r"the student gives .* classes come last: .*permute"):
        distill(PLAIN, student=last)
    with pytest.raises(UserError, match=r"the teacher gives .* classes come last: .*permute"):
        distill(PLAIN, teacher=last, losses=[KD()])


@pytest.mark.parametrize("key", ["mask", "masks", "label_map"])
def test_label_maps_have_the_names_that_libraries_give_them(key):
    named = [{"image": X, key: MAPS}]
    one, other = Dense(1), Dense(1)
    distill(named, named, one)
    distill(PLAIN, student=other)
    assert torch.equal(one.layer2.weight, other.layer2.weight)
    boxes = [{"image": X, "label": MAPS, key: MAPS.clamp(max=0)}]  # a label is a label
    again = Dense(1)
    distill(boxes, boxes, again)
    assert torch.equal(again.layer2.weight, other.layer2.weight)


def test_teachers_of_several_sizes_are_averaged_at_the_largest():
    teachers = [Dense(2), Dense(3, stride=2)]
    student, expected = Dense(1), Dense(1).double()
    kd = [KD(ce_weight=0, temperature=1.0)]
    distill([X], None, student, teacher=teachers, losses=kd)
    large, small = (teacher.double()(X.double()) for teacher in teachers)
    small = F.interpolate(small, (8, 12), mode="bilinear", align_corners=False)
    mean = (large.softmax(1) + small.softmax(1)) / 2
    answer = expected(X.double()).log_softmax(1)
    loss = 0.9 * F.kl_div(answer, mean, reduction="none").sum(1).mean()
    weight = expected.layer2.weight
    wanted = weight - 0.5 * torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(student.layer2.weight.double(), wanted, rtol=1e-4, atol=1e-6)


def test_networks_and_labels_of_two_kinds_are_refused():
    with pytest.raises(UserError, match=r"logits of shape \(4,\) per image, and the data labels p"):
        distill(PLAIN, student=classifier())
    with pytest.raises(UserError, match=r"the teacher gives logits of shape \(4,\) per image, and"):
        distill(PLAIN, teacher=classifier(), losses=[KD()])
    with pytest.raises(UserError, match=r"gives labels \[N, H, W\], a class id for every pixel, a"):
        distill(PLAIN, [(X, MAPS[:, 4, 0])])
    with pytest.raises(UserError, match=r"bce needs labels \[N, classes\], the data has one class"):
        distill(PLAIN, losses=[BinaryCrossEntropy()])


def test_what_answers_for_whole_images_is_refused():
    both = {"views": ("x", "xprime"), "ce_weight": 0}
    given: dict[str, Any] = {"teacher": Dense(2), "xprime": "cutmix"}
    with pytest.raises(UserError, match=r"the loss kd mixes the teacher's answers to whole images"):
        distill(PLAIN, losses=[KD(**both, xprime_target="mixed_logits")], **given)
    with pytest.raises(UserError, match=r"the pick chooses images by one answer for each, and"):
        distill(PLAIN, losses=[KD(**both)], pick="kl", **given)
    with pytest.raises(UserError, match="mixed_ce needs one class id per image"):
        distill(PLAIN, losses=[MixedCE()], **given)
    # The teacher's answers to mixed images are labels enough.
    assert distill(PLAIN, losses=[KD(**both)], **given).metrics["miou_last"] >= 0


def test_a_classifier_that_reads_no_labels_may_get_any():
    boxes = torch.rand(6, 5, 4)
    ids = [(X, MAPS[:, 4, 0])]
    result = distill(
        [(X, boxes)], ids, classifier(1), teacher=classifier(2), losses=[KD(ce_weight=0)]
    )
    assert result.label_kind == "class"


def test_all_ranks_have_one_kind(monkeypatch):
    import fastkd.data.loaders.label_rules as rules

    two = World(0, 0, 2, torch.device("cpu"), "gloo")
    use = LabelUse(reads="ce")
    for other in ("pixel", "class", "multi"):
        monkeypatch.setattr(rules, "on_ranks", lambda own, world, other=other: [own, other])
        if other == "pixel":
            assert kind_on_ranks(MAPS, use, CLASSES, two, dense=True) == "pixel"
            with pytest.raises(UserError, match=r"gives labels \[N\], one .* \[N, H, W\], a class"):
                kind_on_ranks(MAPS[:, 0, 0], use, CLASSES, two)
        else:
            with pytest.raises(UserError, match=r"gives labels \[N, H, W\], a class id for every"):
                kind_on_ranks(MAPS, use, CLASSES, two, dense=True)


def test_the_pixels_of_each_class_are_counted_where_no_image_is_read():
    world = World(0, 0, 1, torch.device("cpu"), None)
    known = MAPS[MAPS != NONE]
    expected = torch.bincount(known, minlength=CLASSES)
    for loader in (PLAIN, DataLoader(TensorDataset(X, MAPS), batch_size=2)):
        count = pixel_counter(loader, CLASSES, world)
        assert count is not None
        assert torch.equal(count(), expected)
    count = pixel_counter([(X, WITH_255.to(torch.uint8))], CLASSES, world)
    assert count is not None
    assert torch.equal(count(), expected)
    pairs: Any = list(zip(X, MAPS, strict=True))
    assert pixel_counter(DataLoader(pairs, batch_size=2), CLASSES, world) is None
    assert pixel_counter(PLAIN, CLASSES, World(0, 0, 2, torch.device("cpu"), "gloo")) is None


def test_labels_of_a_classifier_are_as_before():
    rules = LabelRules(num_classes=CLASSES)
    assert rules.of(None, X).tolist() == [NONE] * 6
    assert LabelRules(kind="pixel").of(None, X).shape == (6, 8, 12)
    with pytest.raises(UserError, match=r"labels must be class ids .* got \[6, 8, 12\]"):
        rules.of(MAPS, X)


def test_a_feature_loss_on_taps_needs_no_labels_of_pixels():
    pairs = {"layer1": "layer1"}
    result = distill(PLAIN, teacher=Dense(2), losses=[CrossEntropy(), AT(pairs=pairs)])
    assert result.metrics["miou_last"] >= 0
