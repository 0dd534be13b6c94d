"""Every sample counts once, whatever the batch size and the number of ranks."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd.evaluation.evaluate
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.sources.image_set import ImageSet
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluate, evaluating

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")


def loader(num, batch_size, rank=0, world_size=1, classes=7):
    generator = torch.Generator().manual_seed(num)
    images = torch.randint(0, 256, (num, 4, 4, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (num,), generator=generator)
    return ResidentLoader(
        ImageSet("random/val", images.numpy(), labels.numpy(), tuple(map(str, range(classes)))),
        Loading(
            batch_size=batch_size,
            seed=0,
            train=False,
            normalization=((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
            placement=Placement(world(rank, world_size), FP32),
        ),
    )


def linear(classes=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def world(rank=0, size=1):
    return World(rank, rank, size, CPU, "gloo" if size > 1 else None)


def truth(model, num, classes=7):
    """The whole split in one batch, in float64, by other formulas."""
    (batch,) = loader(num, num, classes=classes).epoch(0)
    with torch.no_grad():
        logits_NC = model(batch.images_NCHW).double()
    own_N = logits_NC.gather(1, batch.labels_N[:, None])
    rank_N = (logits_NC > own_N).sum(1)
    return {
        "accuracy": (rank_N < 1).double().mean().item(),
        "top5": (rank_N < 5).double().mean().item(),
        "loss": F.nll_loss(logits_NC.log_softmax(1), batch.labels_N).item(),
        "samples": num,
    }


def over_ranks(model, num, batch_size, size, monkeypatch):
    """What each of `size` ranks finds when their sums are added up."""
    shares = []
    monkeypatch.setattr(
        fastkd.evaluation.evaluate, "all_reduce_sum", lambda sums: shares.append(sums.clone())
    )
    for rank in range(size):
        # A rank without samples must not be an error before the sums are added.
        try:
            evaluate(model, loader(num, batch_size, rank, size), FP32, world(rank, size))
        except UserError:
            assert shares[-1][3] == 0
    total = torch.stack(shares).sum(0)
    monkeypatch.setattr(
        fastkd.evaluation.evaluate, "all_reduce_sum", lambda sums: sums.copy_(total)
    )
    return [
        evaluate(model, loader(num, batch_size, rank, size), FP32, world(rank, size))
        for rank in range(size)
    ]


@pytest.mark.parametrize("num", [1, 5, 8, 23])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 50])
def test_every_sample_counts_once(num, batch_size):
    model = linear()
    found = evaluate(model, loader(num, batch_size), FP32, world())
    assert found == pytest.approx(truth(model, num), rel=1e-6)
    assert isinstance(found["samples"], int)


@pytest.mark.parametrize("num", [1, 5, 8, 23])
@pytest.mark.parametrize(("batch_size", "size"), [(4, 2), (4, 3), (8, 3), (2, 4), (50, 2)])
def test_and_so_over_any_number_of_ranks(num, batch_size, size, monkeypatch):
    model = linear()
    found = over_ranks(model, num, batch_size, size, monkeypatch)
    assert all(each == pytest.approx(truth(model, num), rel=1e-6) for each in found)


def test_fewer_than_five_classes_are_all_in_the_top_five():
    model = linear(3)
    found = evaluate(model, loader(11, 4, classes=3), FP32, world())
    assert found["top5"] == 1
    assert found == pytest.approx(truth(model, 11, 3), rel=1e-6)


def test_samples_without_a_label_are_not_wrong_answers():
    model = linear()
    (batch,) = loader(9, 9).epoch(0)
    labels_N = batch.labels_N.clone()
    labels_N[[2, 3, 7]], labels_N[8] = -100, -1

    class Some:
        def epoch(self, epoch, start_step=0):
            yield batch._replace(labels_N=labels_N)

    class Labelled:
        def epoch(self, epoch, start_step=0):
            kept = labels_N >= 0
            yield type(batch)(batch.images_NCHW[kept], batch.labels_N[kept], batch.index_N[kept])

    found = evaluate(model, Some(), FP32, world())
    assert found["samples"] == 5
    assert found == pytest.approx(evaluate(model, Labelled(), FP32, world()), rel=1e-6)
    labels_N.fill_(-100)
    with pytest.raises(UserError, match="none has a label"):
        evaluate(model, Some(), FP32, world())


def test_sums_are_exact_where_float32_would_not_be():
    class Many:
        def epoch(self, epoch, start_step=0):
            from fastkd.data.batch import Batch

            for _ in range(200):
                yield Batch(torch.zeros(100_000, 1), torch.zeros(100_000, dtype=torch.int64), None)

    found = evaluate(lambda images: torch.zeros(len(images), 2), Many(), FP32, world())
    assert (found["samples"], found["accuracy"]) == (20_000_000, 1.0)  # 2^24 is 16.8 million


def test_nothing_to_evaluate_is_an_error():
    class Empty:
        def epoch(self, epoch, start_step=0):
            return iter(())

    message = "there is no validation sample to evaluate on.*give validation images"
    with pytest.raises(UserError, match=message) as refused:
        evaluate(linear(), Empty(), FP32, world())
    assert refused.value.exit_code == 2


class Spoiled:
    """Nine images in batches of four, of which some are not finite."""

    def __init__(self, spoiled):
        self.spoiled = spoiled

    def epoch(self, epoch, start_step=0):
        for batch in loader(9, 4).epoch(0):
            images_NCHW = batch.images_NCHW.clone()
            for row, id in enumerate(batch.index_N.tolist()):
                if id in self.spoiled:
                    images_NCHW[row, 0, 3, 1] = self.spoiled[id]
            yield batch._replace(images_NCHW=images_NCHW)


def test_images_that_are_not_finite_are_told():
    spoiled = Spoiled({1: float("nan"), 8: float("-inf")})
    with pytest.warns(UserWarning, match="^2 of 9 validation images hold pixels that are NaN"):
        found = evaluate(linear(), spoiled, FP32, world())
    assert found["samples"] == 9 and not math.isfinite(found["loss"])


def test_and_not_blamed_for_what_the_network_does():
    def diverged(images_NCHW):
        return images_NCHW.flatten(1)[:, :7] * float("nan")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not math.isfinite(evaluate(diverged, Spoiled({}), FP32, world())["loss"])
        evaluate(linear(), Spoiled({}), FP32, world())


@pytest.mark.parametrize("kind", ["multi", "pixel"])
def test_with_every_kind_of_label(kind):
    class Labelled(Spoiled):
        def epoch(self, epoch, start_step=0):
            for batch in super().epoch(epoch):
                num = len(batch.labels_N)
                shape = (num, 7) if kind == "multi" else (num, 4, 4)
                labels = torch.arange(num * math.prod(shape[1:])).reshape(shape) % 2
                yield batch._replace(labels_N=labels.float() if kind == "multi" else labels)

    def forward(images_NCHW):
        maps_NCHW = images_NCHW.repeat(1, 3, 1, 1)[:, :7]
        return maps_NCHW.mean((2, 3)) if kind == "multi" else maps_NCHW

    with pytest.warns(UserWarning, match="^1 of 9 validation images"):
        evaluate(forward, Labelled({4: float("inf")}), FP32, world(), kind)


def test_no_graph_is_kept():
    model = linear()
    seen = []

    def forward(images):
        seen.append(model(images))
        return seen[-1]

    evaluate(forward, loader(4, 4), FP32, world())
    assert not seen[0].requires_grad


def test_the_forward_pass_runs_in_the_precision_of_the_run():
    dtypes = []

    def forward(images):
        logits = model(images)
        dtypes.append(logits.dtype)
        return logits

    model = linear()
    evaluate(forward, loader(4, 4), Precision("bf16", "cpu"), world())
    assert dtypes == [torch.bfloat16]


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model) as inside:
        assert inside is model
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before


def test_also_after_an_error():
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError, match="no"), evaluating(model):
        raise RuntimeError("no")
    assert model.training
