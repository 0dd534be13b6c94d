"""Which code is left plain, and who decides where the op is used."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.errors import UserError
from fastkd.kernels import status
from fastkd.models import card, create_model, kernels_report, use_kernels
from fastkd.models.config import StudentConfig
from fastkd.models.fused import chain, choice
from fastkd.models.fused.method import fused_methods
from fastkd.models.planner import DEFAULT_KERNELS, Choice
from fastkd.teachers.config import TeacherConfig
from fastkd.training.checkpointing import keep_plain


class Unit(nn.Module):
    """3x3, norm, ReLU, 1x1; subclasses run them in other ways."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4, **options)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)

    def inner(self, x):
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.last(self.inner(x))


class ReadTwice(Unit):
    def forward(self, x):
        inner = self.inner(x)
        return self.last(inner) + inner


class Overwritten(Unit):
    def forward(self, x):
        inner = self.conv(x)
        return self.last(F.relu(self.norm(inner))) + F.relu_(x)


class Switching(Unit):
    def forward(self, x):
        with torch.no_grad():
            x = x + 1
        return self.last(self.inner(x))


class Branching(Unit):
    def forward(self, x):
        return self.last(self.inner(x)) if x.sum() > 0 else x


class Optional(Unit):
    def forward(self, x, scale=None):
        return self.last(self.inner(x if scale is None else x * scale))


class WithConstant(Unit):
    def forward(self, x):
        return self.last(self.inner(x)) + torch.tensor(1.0)


class Functional(Unit):
    def forward(self, x):
        return F.conv2d(self.inner(x), self.last.weight, self.last.bias)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (ReadTwice, {}, "alone read it"),
        (Overwritten, {}, "overwritten in place"),
        (Switching, {}, "switches gradients"),
        (Branching, {}, "cannot be traced"),
        (Optional, {}, "optional arguments"),
        (WithConstant, {}, "tensors or attributes of its own"),
        (Functional, {}, "is not followed by"),
        (Unit, {"padding_mode": "reflect"}, "mode reflect"),
        (Unit, {"stride": (1, 2)}, "in height than in width"),
        (Unit, {"stride": 3}, "stride above 2"),
    ],
)
def test_why_a_chain_stays_plain(kind, options, reason):
    model = nn.Sequential(kind(**options))
    names = set(vars(model[0]))
    report = kernels_report(use_kernels(model, "fused"))
    assert not report.changed and reason in report.left["0.conv"]
    assert set(vars(model[0])) == names
    assert torch.isfinite(model(torch.ones(2, 8, 9, 9))).all()


def test_a_plain_unit_is_taken_and_given_back():
    model = nn.Sequential(Unit())
    assert kernels_report(model) is None
    assert use_kernels(model, "fused") is model
    assert list(kernels_report(model).changed) == ["0.conv"]
    assert "forward" in vars(model[0])
    report = kernels_report(use_kernels(model, "plain"))
    assert not report.changed and report.left == {"0.conv": "kernels=plain"}
    assert "forward" not in vars(model[0])


def test_wide_groups_are_never_asked_for():
    model = nn.Sequential(nn.Conv2d(128, 128, 3, groups=2), nn.BatchNorm2d(128), nn.ReLU())
    model.append(nn.Conv2d(128, 8, 1))
    assert kernels_report(use_kernels(model)).left == {
        "0": "has 64 channels a group: torch is as fast"
    }
    assert kernels_report(use_kernels(model, "fused")).changed


def test_other_words_are_refused():
    with pytest.raises(UserError, match=r"kernels='on'; expected one of auto, fused, plain"):
        use_kernels(nn.Sequential(Unit()), "on")
    with pytest.raises(UserError, match="expected a network"):
        use_kernels("wrn_16_2")


@pytest.mark.skipif(
    status()["grouped_pointwise"]["cpu"].startswith("reference"), reason="no C++ core"
)
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_auto_does_what_the_planner_says(kind, monkeypatch):
    asked = []

    def choose(case):
        asked.append((case.spec.groups, case.shape, case.channels_last))
        return Choice(kind)

    called = []
    monkeypatch.setattr(choice, "CHOOSER", SimpleNamespace(choose=choose))
    op = chain.grouped_pointwise
    monkeypatch.setattr(chain, "grouped_pointwise", lambda *a, **k: called.append(1) or op(*a, **k))
    model = use_kernels(nn.Sequential(Unit()))
    x_NCHW = torch.randn(2, 8, 6, 6)
    expected = use_kernels(model, "plain")(x_NCHW)
    use_kernels(model)
    for _ in range(2):
        torch.testing.assert_close(model(x_NCHW), expected)
    assert asked == 2 * [(4, (2, 8, 6, 6), False)]
    assert len(called) == 2 * (kind == "fused")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_chain_that_stays_plain_runs_in_the_layout_of_its_input(layout, monkeypatch):
    """As the planner has timed it."""
    seen = []
    monkeypatch.setattr(chain, "kind_for", lambda *facts: "plain")
    monkeypatch.setattr(chain.ModuleChain, "plain", lambda self, x, residual: seen.append(x) or x)
    x_NCHW = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
    assert use_kernels(nn.Sequential(Unit()))(x_NCHW) is x_NCHW
    assert len(seen) == 1


@pytest.mark.skipif(
    status()["grouped_pointwise"]["cpu"].startswith("reference"), reason="no C++ core"
)
def test_the_planner_is_told_of_gradients_frozen_norms_and_biases(monkeypatch):
    asked = []

    def choose(case):
        asked.append((case.training, case.batch_statistics, case.spec.biases))
        return Choice("plain")

    monkeypatch.setattr(choice, "CHOOSER", SimpleNamespace(choose=choose))
    unit, x_NCHW = Unit(bias=False), torch.randn(2, 8, 6, 6)
    model = use_kernels(nn.Sequential(unit)).requires_grad_(False)
    model(x_NCHW)
    unit.norm.bias.requires_grad = True
    model(x_NCHW)
    unit.norm.eval()
    model(x_NCHW)
    with torch.no_grad():
        model(x_NCHW)
    unit.norm.requires_grad_(False)
    model(x_NCHW.requires_grad_())
    assert asked == [
        (False, True, True),
        (True, True, True),
        (True, False, True),
        (False, False, True),
        (True, False, True),
    ]
    unit.last.bias = None
    use_kernels(nn.Sequential(unit))(x_NCHW)
    assert asked[5:] == [(True, False, False)]


class Ran(Exception):
    """Which kind computes, where SyncBatchNorm itself cannot: it takes tensors on GPUs only."""


@pytest.mark.skipif(
    status()["grouped_pointwise"]["cpu"].startswith("reference"), reason="no C++ core"
)
@pytest.mark.parametrize(
    ("kernels", "images", "kind"),
    [("auto", 2, "plain"), ("auto", 0, "plain"), ("fused", 2, "fused"), ("plain", 0, "plain")],
)
def test_with_synchronised_statistics_auto_means_plain(kernels, images, kind, synchronised):
    model = use_kernels(synchronised, kernels)
    with pytest.raises(Ran, match=kind):
        model(torch.randn(images, 8, 6, 6))
    with pytest.raises(Ran, match="fused" if kernels == "auto" else kernels):
        model.eval()(torch.randn(2, 8, 6, 6))


def test_a_rank_without_images_does_not_leave_the_others_waiting(synchronised):
    model = use_kernels(synchronised, "fused")
    with pytest.raises(UserError, match=r"SyncBatchNorm got \[0, 8, 6, 6\].*on every rank"):
        model(torch.randn(0, 8, 6, 6))


@pytest.fixture
def synchronised(monkeypatch):
    """A unit as one of two ranks has it; the planner finds the op faster."""

    def ran(kind):
        def run(*given, **more):
            raise Ran(kind)

        return run

    def gather_of(norm):
        return torch.Tensor.unsqueeze if norm.training else None

    monkeypatch.setattr(chain, "_gather_of", gather_of)
    monkeypatch.setattr(chain, "_is_off_gpu", lambda *given: False)
    monkeypatch.setattr(chain, "kind_for", lambda *facts: "fused")
    monkeypatch.setattr(chain.ModuleChain, "fused", ran("fused"))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Unit()))
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", ran("plain"))
    return model


def test_a_run_that_began_before_kernels_stays_plain():
    nets = [create_model("wrn_10_1", 4, block="G(4)", kernels=one) for one in ("auto", "fused")]
    keep_plain(SimpleNamespace(state={"decisions": {"compile": "off", "kernels": "{}"}}), nets)
    assert [card.card_of(net).kernels for net in nets] == ["auto", "fused"]
    keep_plain(SimpleNamespace(state={"decisions": {"compile": "off"}}), nets)
    assert [card.card_of(net).kernels for net in nets] == ["plain", "fused"]


def test_nothing_is_fused_unless_it_is_asked_for():
    assert DEFAULT_KERNELS == "plain"
    for section in (StudentConfig, TeacherConfig):
        assert section.model_fields["kernels"].default == DEFAULT_KERNELS
    net = create_model("wrn_10_1", 4, block="G(4)")
    assert card.card_of(net).kernels == "plain" and not list(fused_methods(net))
    assert card.card_of(use_kernels(net)).kernels == "auto" and list(fused_methods(net))


def test_the_choice_is_no_part_of_the_outcome():
    outcomes = [
        StudentConfig(name="wrn_16_2", kernels=one).outcome() for one in ("auto", "fused", "plain")
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    options = card.card_of(create_model("wrn_10_1", 4, kernels="plain")).options
    assert "kernels" not in options
