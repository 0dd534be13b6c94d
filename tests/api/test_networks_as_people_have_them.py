"""fastkd.distill with networks and images of every form and type: the right loss, or a sentence."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import kernels
from fastkd.augment.config import PickConfig
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.errors import UserError
from fastkd.losses import AT, KD, BinaryCrossEntropy, CrossEntropy, ReviewKD
from fastkd.losses.base.term import LossTerm, TermOutput
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher

PLAIN: dict[str, Any] = {"device": "cpu", "precision": "fp32", "quiet": True}
BF16 = PLAIN | {"precision": "bf16"}


class Net(nn.Module):
    def __init__(self, num_classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(images_NCHW))).mean((2, 3)))


def net(seed: int = 0, kind: type[nn.Module] = Net, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**options)


def teacher(kind: type[nn.Module] = Net) -> Any:
    """Statistics as no fresh network has them, so that training and evaluation differ."""
    model = net(1, kind)
    nn.init.uniform_(model.norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    with torch.no_grad():
        model.fc.weight.mul_(5)
    return model.eval()


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def loader(
    images: Tensor = IMAGES, labels: Tensor = LABELS, batch_size: int = 8, **more: Any
) -> Any:
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, **more)


def distill(student: Any, taught: Any, train: Any = None, val: Any = None, **options: Any) -> Any:
    given = {"epochs": 1} | PLAIN | options
    return fastkd.distill(student, taught, train or loader(), val or loader(), **given)


def first_loss(student: Any, taught: Any, **options: Any) -> float:
    """The mean loss of the only step."""
    return distill(student, taught, **options).metrics["history"][0]["train_loss"]


def kd_loss(student_NC: Tensor, teacher_NC: Tensor) -> float:
    """KD at its defaults, by hand."""
    student_NC, teacher_NC = student_NC.double(), teacher_NC.double()
    log_p, q = F.log_softmax(student_NC / 4, 1), F.softmax(teacher_NC / 4, 1)
    kl = F.kl_div(log_p, q, reduction="batchmean") * 16
    return (0.9 * kl + 0.1 * F.cross_entropy(student_NC, LABELS)).item()


def expected(student: Any, answer_NC: Tensor, autocast: bool = False) -> float:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return kd_loss(student.train()(IMAGES), answer_NC)


def quantised(model: Any) -> nn.Module:
    layers = (model.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    whole = nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()).eval()
    whole.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)  # type: ignore[assignment]
    prepared = quantization.prepare(whole)
    prepared(IMAGES)
    return quantization.convert(prepared)


DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)
FORMS = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, IMAGES[:2]),
    "frozen script": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "export": lambda model: torch.export.export(
        model, (IMAGES[:2],), dynamic_shapes=DYNAMIC
    ).module(),
    "DataParallel": nn.DataParallel,
    "quantised": quantised,
    "quantised at run time": lambda model: quantization.quantize_dynamic(model, {nn.Linear}),
}


@pytest.mark.filterwarnings("ignore")  # torch.ao and torch.jit announce their end
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_of_any_form_teaches_what_it_answers(
    form: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FORMS[form](teacher())
    monkeypatch.setattr("fastkd.compute.precision.computes_in_bf16", lambda device: True)
    autocast = precision != "fp32"
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast and "quantised" not in form),
    ):
        answer_NC = made(IMAGES)
    wanted = expected(net(), answer_NC, autocast)
    found = first_loss(net(), made, precision=precision)
    assert found == pytest.approx(wanted, rel=0.02 if autocast else 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["script", "trace", "DataParallel"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_student_in_another_form_is_trained(form: str, ema: float | None) -> None:
    student = FORMS[form](net())
    before = [p.clone() for p in student.parameters()]
    result = distill(student, teacher(), ema=ema)
    assert result.metrics["history"][0]["train_loss"] == pytest.approx(
        first_loss(net(), teacher()), rel=1e-5
    )
    assert not any(map(torch.equal, before, student.parameters()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: FORMS["export"](net()), "an exported program, which cannot be switched"),
        (
            lambda: FORMS["frozen script"](net().eval()),
            "cannot be trained, its weights are missing",
        ),
        (lambda: quantised(net()), "cannot be trained, its weights are quantised"),
        (lambda: FORMS["quantised at run time"](net()), "its weights are quantised"),
        (lambda: net().requires_grad_(False), "it would train nothing.*requires_grad_"),
        (lambda: net().bfloat16(), r"are bfloat16, .* float32 .* give student.float\(\)"),
        (lambda: net().half(), r"are float16, .* give student.float\(\)"),
        (lambda: net().double(), r"are float64, .* give student.float\(\)"),
    ],
)
def test_a_student_that_cannot_be_trained_is_refused(student: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill(student(), teacher())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.jit.trace(teacher().train(), IMAGES), "traced or exported in training mode"),
        (lambda: FORMS["export"](teacher().train()), "traced or exported in training mode"),
        (
            lambda: torch.jit.trace(
                nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 4)), IMAGES
            ),
            "traced or exported in training mode",
        ),
        *[
            (
                lambda rows=rows: torch.export.export(teacher(), (IMAGES[:rows],)).module(),
                "exported for one number of images: .* export it with dynamic_shapes",
            )
            for rows in (2, 3, 8)
        ],
    ],
)
def test_a_program_that_gives_wrong_answers_is_refused(made: Any, message: str) -> None:
    for precision in ("fp32", "bf16"):
        with pytest.raises(UserError, match=message):
            distill(net(), made(), precision=precision)


@pytest.mark.parametrize("losses", [None, [KD(), AT(pairs={"norm": "norm"})]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_computes_in_the_type_it_was_built_in(
    dtype: torch.dtype, precision: str, losses: Any
) -> None:
    made = teacher().to(dtype)
    seen = []
    made.fc.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    found = distill(net(), made, losses=losses, precision=precision).metrics["history"][0]
    assert set(seen) == {dtype}
    with torch.no_grad():
        answer_NC = made(IMAGES.to(dtype))
    wanted = expected(net(), answer_NC, precision == "bf16")
    kd = 0.9 * found["train_kd"] + 0.1 * found["train_ce"]
    assert kd == pytest.approx(wanted, rel=1e-2 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_every_floating_type_count_as_fp32(dtype: torch.dtype) -> None:
    images = IMAGES.to(dtype)
    plain = distill(net(), teacher(), loader(images.float()), loader(images.float()))
    mixed = [(images, images.float()), (images.float(), images), (images, images)]
    for train, val in mixed:
        found = distill(net(), teacher(), loader(train), loader(val))
        for key in ("train_loss", "val_loss", "val_accuracy"):
            assert found.metrics["history"][0][key] == plain.metrics["history"][0][key]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
@pytest.mark.parametrize("which", ["train", "val"])
def test_images_of_whole_numbers_are_refused(dtype: torch.dtype, which: str) -> None:
    with pytest.raises(UserError, match=r"floating point and normalised .*v2.ToDtype\(torch.flo"):
        distill(net(), teacher(), **{which: loader(IMAGES.abs().to(dtype))})


def resized(images_NCHW: Tensor) -> Tensor:
    return F.interpolate(images_NCHW, (6, 6), mode="bilinear", antialias=True)


def by_numpy(images_NCHW: Tensor) -> Tensor:
    return torch.from_numpy(images_NCHW.numpy()[..., ::-1].copy())


def deformed(images_NCHW: Tensor) -> Tensor:
    offset = torch.full((len(images_NCHW), 2, 8, 8), 0.5)
    return torchvision.ops.deform_conv2d(images_NCHW, offset, torch.eye(3)[:, :, None, None])


def cubic(images_NCHW: Tensor) -> Tensor:
    return F.interpolate(images_NCHW, (5, 5), mode="bicubic", antialias=True)


def spectrum(images_NCHW: Tensor) -> Tensor:
    return torch.fft.rfft2(images_NCHW).abs()


def clipped(images_NCHW: Tensor) -> Tensor:
    return images_NCHW.clamp(max=torch.quantile(images_NCHW, 0.9))


def eigen(images_NCHW: Tensor) -> Tensor:
    return images_NCHW - torch.linalg.matrix_norm(images_NCHW, 2)[..., None, None] / 64


FP32_ONLY = (resized, by_numpy, deformed, cubic, spectrum, clipped, eigen)


class Prepares(Net):
    """Does with the images what a CPU does in fp32 only."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.first = first

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return super().forward(self.first(images_NCHW))


@pytest.mark.parametrize("first", FP32_ONLY, ids=lambda first: first.__name__)
def test_images_come_as_autocast_expects_them(first: Any) -> None:
    """Either network answers what it answers under torch.autocast alone, the images in fp32."""
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    made = teacher()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer_NC = made(first(images))
        student_NC = net().train()(first(images))
        plain_NC = net().train()(images)
    wrapped = Prepares(first)
    wrapped.load_state_dict(made.state_dict())
    world = World(0, 0, 1, torch.device("cpu"), None)
    placement = Placement(world, Precision("bf16", "cpu"), foreign=True)
    none = ((0.0,) * 3, (1.0,) * 3)
    asked = Teacher(
        LoadedNet(wrapped), {}, placement, data_normalization=none, fold_batch_norm=False
    )
    assert torch.equal(asked.logits(images), answer_NC)
    # In a run its batch norms are folded, which rounds differently.
    assert first_loss(net(), wrapped, **BF16) == pytest.approx(
        kd_loss(plain_NC, answer_NC), rel=2e-3
    )
    torch.manual_seed(0)
    student = Prepares(first)
    found = distill(student, None, losses=[CrossEntropy()], **BF16)
    assert found.metrics["history"][0]["train_loss"] == pytest.approx(
        F.cross_entropy(student_NC.float(), LABELS).item(), rel=1e-6
    )


class NeedsFp32(Net):
    """Fails under torch.autocast itself."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features = self.norm(self.conv(images_NCHW)).mean((2, 3))
        return self.fc(features + torch.from_numpy(features.detach().numpy()))


def test_what_fails_under_autocast_is_told_to_compute_in_fp32() -> None:
    for student, taught in ((net(), teacher(NeedsFp32)), (net(0, NeedsFp32), teacher())):
        with pytest.raises(UserError, match=r"fails under autocast to bf16 .*precision='fp32'$"):
            distill(student, taught, **BF16)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_auto_avoids_autocast_where_it_fails(
    which: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkd.compute.precision.computes_in_bf16", lambda device: True)
    nets = {"student": net(), "teacher": teacher()}
    nets[which] = net(0, NeedsFp32) if which == "student" else teacher(NeedsFp32)
    given = [nets["student"], nets["teacher"]]
    found = first_loss(*given, precision="auto", quiet=False)
    said = capsys.readouterr().out
    assert f"precision=auto is fp32 here: under autocast the {which} NeedsFp32 fails (Got" in said
    nets["student"] = net(0, NeedsFp32 if which == "student" else Net)
    assert found == first_loss(nets["student"], nets["teacher"])
    assert first_loss(net(), teacher(), precision="auto") == first_loss(net(), teacher(), **BF16)


def test_a_network_that_leaves_autocast_keeps_its_weights() -> None:
    class Leaves(Net):
        def forward(self, images_NCHW: Tensor) -> Tensor:
            features = torch.relu(self.norm(self.conv(images_NCHW))).mean((2, 3))
            with torch.autocast("cpu", enabled=False):
                return self.fc(features.float())

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer_NC = teacher(Leaves)(IMAGES)
    found = first_loss(net(), teacher(Leaves), **BF16)
    assert found == pytest.approx(expected(net(), answer_NC, True), rel=5e-3)


def test_the_channels_are_named() -> None:
    for student, taught in ((net(channels=1), teacher()), (net(), net(channels=1))):
        with pytest.raises(UserError, match=r"fails on images of \[3, 8, 8\]: .*1 channels, but g"):
            distill(student, taught)


class Fixed(Net):
    """As a vision transformer: one size only."""

    side = 12

    def forward(self, images_NCHW: Tensor) -> Tensor:
        assert images_NCHW.shape[-1] == self.side, f"expected {self.side} pixels"
        return super().forward(images_NCHW)


def test_a_teacher_sees_images_of_its_own_size() -> None:
    made = teacher(Fixed)
    side = F.interpolate(IMAGES, (12, 12), mode="bilinear", antialias=True)
    with torch.no_grad():
        answer_NC = made(side)
    for given in (12, [12], (12,)):
        found = first_loss(net(), made, teacher_resolution=given)
        assert found == pytest.approx(expected(net(), answer_NC), rel=1e-5)
    with torch.no_grad():
        log_p = torch.stack([made(side).softmax(1), teacher()(IMAGES).softmax(1)]).mean(0).log()
    two = first_loss(net(), [made, teacher()], teacher_resolution=[12, None])
    assert two == pytest.approx(expected(net(), log_p), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_resolution": 0}, "teacher_resolution=0; expected a side in pixels"),
        ({"teacher_resolution": "224"}, "expected a side in pixels"),
        ({"teacher_resolution": True}, "expected a side in pixels"),
        ({"teacher_resolution": [12, 12]}, "is for 2 teachers, there are 1"),
    ],
)
def test_a_wrong_resolution_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill(net(), teacher(), **options)


def test_a_network_of_a_fixed_size_is_told_which() -> None:
    class At64(Fixed):
        side = 64

    with pytest.raises(UserError, match=r"those of 64x64: give teacher_resolution=64$"):
        distill(net(), teacher(At64))
    with pytest.raises(UserError, match="those of 64x64: resize the images of the loaders"):
        distill(net(0, At64), teacher())


def test_one_class_teaches_nothing() -> None:
    alone = loader(IMAGES, torch.zeros(8, dtype=torch.int64))
    for losses in (None, [CrossEntropy()]):
        with pytest.raises(UserError, match=r"there is one class only.*, or give labels \[N, 1\]"):
            distill(net(num_classes=1), net(num_classes=1), alone, alone, losses=losses)


@pytest.mark.parametrize("name", ["KD", "SoftCE", "DIST"])
def test_the_softmax_of_one_logit_teaches_nothing(name: str) -> None:
    one = loader(IMAGES, (LABELS % 2).float()[:, None])
    loss = KD(ce_weight=0) if name == "KD" else getattr(fastkd.losses, name)()
    with pytest.raises(UserError, match=r"give one logit, whose softmax is always 1"):
        distill(
            net(num_classes=1), net(num_classes=1), one, one, losses=[BinaryCrossEntropy(), loss]
        )
    features = AT(pairs={"norm": "norm"})
    losses = [BinaryCrossEntropy(), features]
    found = distill(net(num_classes=1), net(num_classes=1), one, one, losses=losses)
    with torch.no_grad():
        logits = net(num_classes=1).train()(IMAGES)
    wanted = F.binary_cross_entropy_with_logits(logits, (LABELS % 2).float()[:, None]).item()
    assert found.metrics["history"][0]["train_bce"] == pytest.approx(wanted, rel=1e-5)


class OnePixel(Net):
    """Batch norm on maps of one pixel."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        pooled = self.conv(images_NCHW).mean((2, 3), keepdim=True)
        return self.fc(torch.relu(self.norm(pooled)).flatten(1))


class WithoutLength:
    """Nobody knows its batches."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


LAST = "the last batch of an epoch has one image only.*give the train_loader drop_last=True"


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (loader(batch_size=7), {}, LAST),
        (list(loader(batch_size=7)), {}, LAST),
        (loader(batch_size=1), {}, "every batch has one image only.*give .* a larger batch_size"),
        (loader(batch_size=4), {"accumulate": 4}, "with accumulate=4 a micro-batch of every batch"),
        (
            loader(batch_size=4),
            {
                "xprime": "cutmix",
                "losses": [KD(views=("x", "xprime"))],
                "pick": PickConfig(images=1),
            },
            "x' of every batch has one image only.*let the pick choose more images",
        ),
        # Found in the run, in the same words as torch's.
        (WithoutLength(loader(batch_size=7)), {}, "a batch of one image cannot be trained on"),
    ],
)
def test_a_batch_of_one_under_batch_norm(batches: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill(net(0, OnePixel), teacher(), batches, **options)


def test_a_batch_of_one_is_fine_without_batch_norm() -> None:
    for batches in (loader(batch_size=7), loader(batch_size=1)):
        assert distill(net(), teacher(), batches).metrics["skipped_steps"] == 0
    dropping = loader(batch_size=7, drop_last=True)
    assert distill(net(0, OnePixel), teacher(), dropping).metrics["skipped_steps"] == 0


@pytest.mark.parametrize(("tap", "refused"), [("norm", False), ("fc", True)])
def test_reviewkd_on_a_batch_of_one(tap: str, refused: bool) -> None:
    """Its own batch norms see one value where the map has one pixel."""
    losses = [CrossEntropy(), ReviewKD(student=("conv", tap), teacher=("conv", tap))]
    if not refused:
        assert distill(net(), teacher(), loader(batch_size=7), losses=losses)
        return
    with pytest.raises(UserError, match="the loss reviewkd cannot be trained on one"):
        distill(net(), teacher(), loader(batch_size=7), losses=losses)


def test_a_trial_leaves_no_trace() -> None:
    student, taught = net(), teacher()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(UserError, match="the loss odd: odd rows only"):
        distill(student, taught, losses=[CrossEntropy(), Odd()])
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert student.training
    assert torch.equal(torch.rand(1), wanted)


class Odd(LossTerm):
    """Raises a plain error, as a kernel or a user's own loss does."""

    def __init__(self) -> None:
        super().__init__("odd", ("x/student/logits",), {"odd": 1.0})

    def forward(self, inputs: Any) -> Any:
        (logits_NC,) = self.wanted(inputs)
        if len(logits_NC) % 2 == 0:
            raise ValueError("odd rows only")
        return TermOutput({"odd": logits_NC.float().mean()})


def test_a_loss_of_ones_own_may_need_other_batches_than_two() -> None:
    found = distill(net(), teacher(), loader(IMAGES[:7], LABELS[:7], 7), losses=[Odd()])
    assert found.metrics["skipped_steps"] == 0


class Late(LossTerm):
    """Calls a kernel on one class, but not in the trial, which is of two images."""

    def __init__(self) -> None:
        super().__init__("late", ("x/student/logits",), {"late": 1.0})

    def forward(self, inputs: Any) -> Any:
        (logits_NC,) = self.wanted(inputs)
        some_NC = logits_NC if len(logits_NC) == 2 else logits_NC[:, :1]
        return TermOutput({"late": kernels.kd_loss(some_NC, some_NC.detach())[0].mean()})


def test_a_kernel_that_refuses_later_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^the loss late: kd_loss: got 1 classes"):
        distill(net(), teacher(), losses=[CrossEntropy(), Late()])


def test_an_exported_program_inside_a_network_leaves_no_part_in_training() -> None:
    made = nn.Sequential(FORMS["export"](teacher()), nn.Dropout())
    with torch.no_grad():
        answer_NC = made[0](IMAGES)
    assert first_loss(net(), made) == pytest.approx(expected(net(), answer_NC), rel=1e-5)
    assert not made[1].training


class Shrinking(nn.Module):
    """Its last convolution sees a map of 1x1 where images have `side` pixels, or one of 2x2."""

    def __init__(self, kernel: int = 3, stride: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(2))
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(8, 16, kernel, stride, kernel // 2, groups=groups)
        self.fc = nn.Linear(16, 4)
        self.pools = True

    def forward(self, images_NCHW: Tensor) -> Tensor:
        maps_NCHW = self.body(images_NCHW)
        maps_NCHW = self.pool(maps_NCHW) if self.pools else maps_NCHW
        return self.fc(self.last(maps_NCHW).mean((2, 3)))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 1), (7, 2)])
def test_a_gradient_that_torch_gets_wrong_in_bf16_is_not_computed(
    kernel, stride, monkeypatch, capsys
):
    student = net(kind=Shrinking, kernel=kernel, stride=stride)
    with pytest.raises(UserError, match=r"its layer last sees a map of 1x1.*give precision='fp32'"):
        fastkd.distill(student, None, loader(), loader(), epochs=1, losses=[CrossEntropy()], **BF16)
    monkeypatch.setattr("fastkd.compute.precision.computes_in_bf16", lambda device: True)
    given = {"device": "cpu", "epochs": 1, "losses": [CrossEntropy()]}
    result = fastkd.distill(student, None, loader(), loader(), **given)
    assert "precision=auto is fp32 here" in capsys.readouterr().out
    assert result.history[0]["skipped"] == 0


@pytest.mark.parametrize(
    ("options", "pools"), [({"kernel": 3, "stride": 1}, True), ({"kernel": 3, "stride": 2}, False)]
)
def test_layers_whose_gradient_is_right_in_bf16_stay_in_it(options, pools):
    student = net(kind=Shrinking, **options)
    student.pools = pools
    result = fastkd.distill(
        student, None, loader(), loader(), epochs=1, losses=[CrossEntropy()], **BF16
    )
    assert result.history[0]["skipped"] == 0
