"""Other people's networks: what a loss computes on them is right, or it is refused before training.

Each has a trap of real ones: checkpoints, layers skipped at random, wrappers, outputs that are no
tensor, channels last. The truth is the formula on the plain network.
"""

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import SwinTransformer

import fastkd
from fastkd.compute.precision import Precision
from fastkd.errors import UserError
from fastkd.losses import AT, KD, RKD, SP, CrossEntropy, FitNet
from fastkd.losses.base.needs import Need
from fastkd.models.taps import Tapped, logits_of
from fastkd.models.unwrap import unwrapped
from fastkd.testing import bind_pair
from fastkd.training.answers import look_at_training
from fastkd.training.config import OptimConfig
from fastkd.training.step import DistillStep

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
FP32 = Precision("fp32", "cpu")
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LOADER = [(X, torch.arange(8) % 4)]


class Net(nn.Module):
    """Two convolutions; how the second one runs in training is up to a subclass."""

    def __init__(self, seed: int = 1, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)

    def second(self, x: Tensor) -> Tensor:
        return self.conv2(x).relu()

    def forward(self, images: Tensor) -> Any:
        x = self.conv1(images).relu()
        x = self.trained(x) if self.training else self.second(x)
        return self.fc(x.mean((2, 3)))

    def trained(self, x: Tensor) -> Tensor:
        return self.second(x)


class Reentrant(Net):
    def trained(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, x, use_reentrant=True)


class Replayed(Net):
    def trained(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, x, use_reentrant=False)


class NoGrad(Net):
    def trained(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.second(x)


class Inferred(Net):
    def trained(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            found = self.second(x)
        return x + found.clone().mean()


class InEvaluationOnly(Net):
    def trained(self, x: Tensor) -> Tensor:
        return x


class Skips(Net):
    """LayerDrop, drawn by torch as in Hugging Face."""

    p = 0.5
    runs = 0

    def trained(self, x: Tensor) -> Tensor:
        if torch.rand(()) < self.p:
            return x
        self.runs += 1
        return self.second(x)


class SkipsByPython(Skips):
    def trained(self, x: Tensor) -> Tensor:
        return x if random.random() < self.p else self.second(x)


AT_CONV2 = {"pairs": {"conv2": "conv2"}, "weight": 1000}


def distill(student: nn.Module, losses: Any, teacher: nn.Module | None = None, **more: Any) -> Any:
    given: dict[str, Any] = {"epochs": 1, "losses": losses, "optim": SGD} | QUIET | more
    teacher = Net(2) if teacher is None else teacher
    return fastkd.distill(student, teacher, LOADER, LOADER, **given)


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in unwrapped(model).state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Reentrant, "tap 'conv2' of the student carries no gradient in training.*use_reentrant=F"),
        (NoGrad, r"carries no gradient in training mode.*torch.no_grad\(\)"),
        (Inferred, "carries no gradient in training mode"),
        (InEvaluationOnly, "conv2.*runs in evaluation, but not once in 20 training passes"),
    ],
)
@pytest.mark.parametrize(
    "losses", [[KD(), AT(**AT_CONV2)], [AT(**AT_CONV2)]], ids=["beside", "alone"]
)
def test_a_tap_that_teaches_nothing_in_training_is_refused(
    kind: type[Net], message: str, losses: Any
) -> None:
    student = kind()
    before = weights(student)
    with pytest.raises(UserError, match=message):
        distill(student, losses)
    assert same(weights(student), before)
    assert not any(module._forward_hooks for module in student.modules())


def test_one_of_two_taps_without_gradient_is_refused_too() -> None:
    with pytest.raises(UserError, match="tap 'conv2' of the student carries no gradient"):
        distill(Reentrant(), [AT(pairs={"conv1": "conv1", "conv2": "conv2"})])


def test_a_checkpoint_that_replays_trains_as_without() -> None:
    plain, replayed = Net(), Replayed()
    for student in (plain, replayed):
        distill(student, [KD(), AT(**AT_CONV2)])
    for one, other in zip(weights(plain), weights(replayed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    # A reentrant one is fine where nothing inside it is tapped.
    reentrant, plain = Reentrant(), Net()
    for student in (plain, reentrant):
        distill(student, [KD(), AT(pairs={"conv1": "conv1"}, weight=1000)])
    for one, other in zip(weights(plain), weights(reentrant), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [Skips, SkipsByPython])
@pytest.mark.parametrize("p", [0.05, 0.6])
def test_a_run_outlives_layers_that_are_skipped_at_random(kind: type[Skips], p: float) -> None:
    student = kind()
    student.p = p
    losses = [CrossEntropy(), AT(**AT_CONV2)]
    found = distill(student, losses, epochs=20)
    assert found.metrics["skipped_steps"] == 0
    row = [one["train_at"] for one in found.metrics["history"]]
    assert max(row) > 0
    if p == 0.6:
        assert 0.0 in row


@pytest.mark.parametrize("beside", [True, False])
def test_a_skipped_tap_teaches_nothing_in_that_step(beside: bool) -> None:
    terms = [
        *([CrossEntropy()] if beside else []),
        AT(**AT_CONV2),
        FitNet(pairs={"conv2": "conv2"}),
    ]
    student, teacher = Skips(), Net(2)
    shape = torch.zeros(2, 4, 8, 8)
    for term in terms[-2:]:
        bind_pair(term, shape, shape)
    step = DistillStep(student, terms, FP32).train()
    found_t = Tapped(teacher, ["conv2"])(X)["conv2"].detach()
    for p in (1.0, 0.0):
        student.p = p
        step.zero_grad()
        out = step({"x": X}, LOADER[0][1], torch.arange(8), {"x/teacher/conv2": found_t}, {})
        out.loss.backward()
        metrics = dict(zip(step.metric_names, out.metrics_M.tolist(), strict=True))
        x = student.conv1(X).relu()
        ce = F.cross_entropy(student.fc((x if p else student.second(x)).mean((2, 3))), LOADER[0][1])
        if p:
            expected = ce.item() if beside else 0.0
            assert out.loss.item() == pytest.approx(expected, abs=1e-7)
            assert metrics["at"] == metrics["fitnet"] == 0
            assert student.conv2.weight.grad is None
        else:
            maps = [F.normalize(m.square().mean(1).flatten(1)) for m in (student.conv2(x), found_t)]
            at = (maps[0] - maps[1]).square().mean()
            assert metrics["at"] / 8 == pytest.approx(at.item(), rel=1e-4)
            assert student.conv2.weight.grad is not None


def test_looking_leaves_everything_as_it_was() -> None:
    class Counting(Skips):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.register_buffer("seen", torch.zeros(()))

        def trained(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return super().trained(self.norm(x))

    student = Counting().eval()
    student.norm.train()
    before, state, own = weights(student), torch.get_rng_state(), random.getstate()
    taught = frozenset({Need("x/student/conv2"), Need("x/student/logits")})
    look_at_training(student, taught, X[:2], FP32)
    assert same(weights(student), before)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == own
    assert not student.training and student.norm.training
    assert look_at_training(Reentrant(), frozenset(), X[:2], FP32, ranks=2).may_idle is False
    assert look_at_training(Replayed(), taught, X[:2], FP32).may_idle


def partly(model: Net) -> Net:
    model.conv2 = torch.compile(model.conv2, backend="eager")  # type: ignore[assignment]
    return model


def in_place(model: Net) -> Net:
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "parallel of compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "averaged": AveragedModel,
    "partly compiled": partly,
    "compiled in place": in_place,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_networks_are_tapped_by_their_own_names(wrap: Any) -> None:
    losses = [KD(), AT(**AT_CONV2)]
    plain, wrapped, teacher = Net(), wrap(Net()), wrap(Net(2))
    wrapped(X)  # whatever is compiled is compiled without our hooks
    names = list(wrapped.state_dict())
    distill(plain, losses)
    # With a run before that taps nothing, as in a notebook.
    distill(wrap(Net()), [KD()], wrap(Net(2)))
    found = distill(wrapped, losses, teacher)
    assert same(weights(found.student), weights(plain))
    assert list(wrapped.state_dict()) == names
    assert same(weights(wrapped), weights(plain))
    torch.testing.assert_close(wrapped.eval()(X), plain.eval()(X))


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_an_average_of_timm_teaches_as_its_network(name: str) -> None:
    import timm.utils

    one, other, losses = Net(), Net(), [KD(), AT(**AT_CONV2)]
    distill(one, losses)
    distill(other, losses, getattr(timm.utils, name)(Net(2)))
    assert same(weights(one), weights(other))


class Output(dict[str, Any]):
    """As Hugging Face's: a mapping that has its keys as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Heads(NamedTuple):
    logits: Any
    aux: Any


FORMS = {
    "mapping": lambda z: {"logits": z, "hidden_states": (z + 1,)},
    "out": lambda z: {"out": z, "aux": z + 1},
    "model output": lambda z: Output(loss=None, logits=z, hidden=(z + 1,)),
    "named tuple": lambda z: Heads(z, z + 1),
    "reversed fields": lambda z: NamedTuple("R", [("aux", Any), ("logits", Any)])(z + 1, z),
    "tuple": lambda z: (z, {"feats": z + 1}),
    "list": lambda z: [z, z + 1, z + 2],
    "tuple of mapping": lambda z: ({"logits": z}, z + 1),
    "object": lambda z: SimpleNamespace(logits=z, other=z + 1),
}


class Packed(Net):
    form = "tuple"

    def forward(self, images: Tensor) -> Any:
        return FORMS[self.form](super().forward(images))


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_what_a_network_returns(form: str) -> None:
    logits = torch.randn(2, 4)
    assert logits_of(FORMS[form](logits)) is logits
    plain, packed, teacher = Net(), Packed(), Packed(2)
    packed.form = teacher.form = form
    one = distill(plain, [KD()])
    other = distill(packed, [KD()], teacher)
    assert same(weights(packed), weights(plain))
    assert other.metrics["accuracy_last"] == one.metrics["accuracy_last"]
    assert other.metrics["history"][0]["val_loss"] == one.metrics["history"][0]["val_loss"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"last_hidden_state": X}, "returned dict with last_hidden_state; expected a tensor"),
        (([X, X], X), "the model returned tuple"),
        ((), "the model returned tuple"),
        (None, "the model returned NoneType"),
        ({"logits": None}, "the model returned dict with logits"),
    ],
)
def test_what_holds_no_logits_is_said(output: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        logits_of(output)


class InTraining(Net):
    """Adds heads in training, as Inception and GoogLeNet do."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return Heads(logits, logits + 1) if self.training else logits


def test_heads_that_training_adds_are_left_aside() -> None:
    plain, student = Net(), InTraining()
    for each in (plain, student):
        distill(each, [CrossEntropy()])
    assert same(weights(student), weights(plain))


class Encoder(nn.Module):
    """As DINO and CLIP: features of any width, in a form of their own; no classes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.form = form
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Any:
        x = self.conv(images)
        outputs = {
            "wide": x.flatten(1),
            "map": x,
            "hidden": {"last_hidden_state": x},
            "list": [[x], x],
            "none": None,
        }
        return outputs[self.form]


@pytest.mark.parametrize("form", ["wide", "map", "hidden", "list", "none"])
@pytest.mark.parametrize("loss", [AT, SP, FitNet, RKD], ids=lambda loss: loss.__name__)
def test_logits_that_nobody_reads_may_be_anything(form: str, loss: Any) -> None:
    found = distill(Net(), [loss(pairs={"conv2": "conv"})], Encoder(form))
    assert found.metrics["skipped_steps"] == 0
    if loss in (AT, SP):
        student = Net()
        x = student.conv2(student.conv1(X).relu())
        t = Encoder(form).conv(X)
        if loss is AT:
            maps = [F.normalize(m.square().mean(1).flatten(1)) for m in (x, t)]
        else:
            maps = [F.normalize(m.flatten(1) @ m.flatten(1).T) for m in (x, t)]
        expected = (maps[0] - maps[1]).square().mean().item()
        (row,) = found.metrics["history"]
        assert row[f"train_{loss.__name__.lower()}"] == pytest.approx(expected, rel=1e-4)


def test_an_embedding_is_compared_as_a_feature() -> None:
    found = distill(Net(), [RKD(pairs={"fc": "logits"})], Encoder("wide"))
    assert found.metrics["history"][0]["train_rkd"] > 0
    with pytest.raises(UserError, match=r"the teacher gives logits of shape \(256,\)"):
        distill(Net(), [KD()], Encoder("wide"))


class Ends(nn.Module):
    def __init__(self, seed: int, end: nn.Module) -> None:
        super().__init__()
        self.net, self.end = Net(seed), end

    def forward(self, images: Tensor) -> Tensor:
        return self.end(20 * self.net(images))


@pytest.mark.parametrize(
    "end",
    [nn.Softmax(1), nn.Sequential(nn.Softmax(1), nn.Identity()), nn.Softmax(-1)],
    ids=["softmax", "nested", "last"],
)
def test_probabilities_in_place_of_logits_are_refused(end: nn.Module) -> None:
    with pytest.raises(
        UserError, match=r"the teacher returns probabilities .*remove its last softmax"
    ):
        distill(Net(), [KD()], Ends(2, end))
    with pytest.raises(UserError, match="the teacher returns probabilities"):
        fastkd.distill(
            Net(), [Net(2), Ends(2, end)], LOADER, LOADER, epochs=1, losses=[KD()], **QUIET
        )
    with pytest.raises(UserError, match="the student returns probabilities"):
        distill(Ends(1, end), [CrossEntropy()])
    # Nobody takes another softmax of them here.
    assert distill(Net(), [AT(pairs={"conv2": "net.conv2"})], Ends(2, end))


@pytest.mark.parametrize(
    ("end", "note"),
    [
        (nn.LogSoftmax(1), "gives log-probabilities"),
        (nn.Sigmoid(), "as after a sigmoid"),
        (nn.Identity(), ""),
    ],
)
def test_other_last_layers_are_noted(end: nn.Module, note: str, capsys: Any) -> None:
    distill(Net(), [KD()], Ends(2, end), quiet=False)
    said = capsys.readouterr().out
    assert note in said
    assert note or ("gives" not in said and "sigmoid" not in said)


def test_the_softmax_of_log_probabilities_is_that_of_the_logits() -> None:
    one, other = Net(), Net()
    distill(one, [KD()], Ends(2, nn.Identity()))
    distill(other, [KD()], Ends(2, nn.LogSoftmax(1)))
    for mine, theirs in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def swin() -> nn.Module:
    torch.manual_seed(6)
    return SwinTransformer([2, 2], 12, [1, 1], [1, 2], [2, 2], num_classes=4)


class LastAxis(nn.Module):
    """A norm over channels that come last, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize(
    ("build", "tap", "shape"),
    [
        (swin, "features.1", (12, 4, 4)),
        (swin, "features.3", (24, 2, 2)),
        (LastAxis, "norm", (6, 6, 6)),
        (LastAxis, "conv", (6, 6, 6)),
    ],
)
def test_maps_with_their_channels_last_are_turned(build: Any, tap: str, shape: Any) -> None:
    teacher = build().eval()
    raw: list[Tensor] = []
    teacher.get_submodule(tap).register_forward_hook(lambda *hooked: raw.append(hooked[2]))
    found = Tapped(teacher, [tap])(X)[tap]
    if tap != "norm":  # as many channels as rows: the proportions say nothing
        assert found.shape[1:] == shape
    expected = raw[0].permute(0, 3, 1, 2) if tap.startswith("features") else raw[0]
    assert torch.equal(found, expected)
    if tap.startswith("features"):
        history = distill(Net(), [AT(pairs={"conv2": tap})], build()).metrics["history"]
        student = Net()
        x = F.adaptive_avg_pool2d(student.conv2(student.conv1(X).relu()), shape[1:])
        maps = [F.normalize(m.square().mean(1).flatten(1)) for m in (x, expected)]
        truth = (maps[0] - maps[1]).square().mean().item()
        assert history[0]["train_at"] == pytest.approx(truth, rel=1e-3)


def test_maps_of_images_that_are_not_square_are_turned_too() -> None:
    images = torch.randn(2, 3, 16, 8)
    assert Tapped(swin().eval(), ["features.1"])(images)["features.1"].shape == (2, 12, 8, 4)
    assert Tapped(Net().eval(), ["conv2"])(images)["conv2"].shape == (2, 4, 16, 8)


class Sequence(Net):
    """Positions before images, as torch's transformers without batch_first, and CLIP."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.tokens, self.windows, self.kept = nn.Identity(), nn.Identity(), nn.Identity()

    def second(self, x: Tensor) -> Tensor:
        self.tokens(x.flatten(2).permute(2, 0, 1))
        self.windows(x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1))
        self.kept(x.argmax(1))
        return super().second(x)


@pytest.mark.parametrize("tap", ["tokens", "windows", "kept"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_tap_without_a_row_per_image_is_refused(tap: str, side: str) -> None:
    pairs = {tap: "conv2"} if side == "student" else {"conv2": tap}
    student, teacher = (Sequence(), Net(2)) if side == "student" else (Net(), Sequence(2))
    with pytest.raises(
        UserError, match=rf"the loss sp uses x/{side}/{tap}.*one row per image|would"
    ):
        distill(student, [SP(pairs=pairs)], teacher)


class InferenceTeacher(Net):
    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(images)


def test_a_teacher_in_inference_mode_teaches_as_any_other() -> None:
    one, other = Net(), Net()
    losses = [KD(), AT(**AT_CONV2)]
    distill(one, losses)
    distill(other, losses, InferenceTeacher(2))
    assert same(weights(one), weights(other))


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "levit_128s", "efficientformer_l1"]
)
def test_a_second_head_that_training_leaves_out_is_refused(name: str) -> None:
    import timm

    taught = frozenset({Need("x/student/logits")})
    student = timm.create_model(name, num_classes=4)
    assert look_at_training(student, taught, X, FP32).skipped == ()
    student.set_distilled_training(True)
    with pytest.raises(UserError, match=r"call student.set_distilled_training\(False\)"):
        look_at_training(student, taught, X, FP32)


class NoReturn(Net):
    """Overrides train() and returns nothing, as some detectors do."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.conv1.eval()


def test_an_overridden_train_need_not_return_the_network() -> None:
    one, other = Net(), NoReturn()
    for student in (one, other):
        distill(student, [CrossEntropy()])
    assert same(weights(one), weights(other))
