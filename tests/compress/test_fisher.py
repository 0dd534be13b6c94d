"""Fisher potential against autograd in float64, written out image by image."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastkd.compress.fisher import fisher_potential, sites_of
from fastkd.compress.space import space_of
from fastkd.models import create_model


class Two(nn.Module):
    """Two convolutions, the second of which is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, images_NCHW):
        hidden = self.two(torch.tanh(self.one(images_NCHW)))
        hidden.relu_()
        return self.fc(hidden.mean((2, 3)))


def test_it_is_the_formula_of_the_paper():
    torch.manual_seed(1)
    model = Two().double()
    images = torch.randn(6, 3, 7, 5, dtype=torch.float64)
    labels = torch.randint(0, 3, (6,))
    found = fisher_potential(model, ["one", "two"], [(images, labels)])

    one = model.one(images).detach().requires_grad_()
    two = model.two(torch.tanh(one))
    loss = F.cross_entropy(model.fc(torch.relu(two).mean((2, 3))), labels)
    grads = torch.autograd.grad(loss, [one, two])
    total = 0.0
    for act, grad in zip((one, two), grads, strict=True):
        for channel in range(act.shape[1]):
            for image in range(6):
                moved = (act[image, channel] * grad[image, channel]).sum().item()
                total += moved**2 / (2 * 6)
    assert found == pytest.approx(total, rel=1e-9)
    assert found > 0


def test_several_batches_are_their_mean():
    torch.manual_seed(1)
    model = Two()
    batches = [(torch.randn(4, 3, 6, 6), torch.randint(0, 3, (4,))) for _ in range(3)]
    each = [fisher_potential(model, ["two"], [batch]) for batch in batches]
    assert fisher_potential(model, ["two"], batches) == pytest.approx(sum(each) / 3, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet14", "vgg8", "timm:test_resnet"])
def test_every_part_of_a_student_has_one_site(name):
    space = space_of(name, 10, (3, 32, 32), {})
    picks = [space.original]
    with_last = tuple(
        tuple(tuple(len(s.choices) - 1 for s in part.slots) for part in stage.parts[: stage.least])
        for stage in space.stages
    )
    for pick in [*picks, with_last]:
        torch.manual_seed(0)
        model = create_model(name, 10, **space.options_of(pick))
        sites = sites_of(space, pick, model)
        assert len(sites) == sum(map(len, pick)) == len(set(sites))
        batch = (torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))
        assert fisher_potential(model, sites, [batch]) > 0
