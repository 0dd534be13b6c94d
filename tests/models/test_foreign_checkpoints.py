"""Checkpoints of other repositories: their names load strictly and give their numbers.

foreign_checkpoints.json: names, shapes, logits and features of RepDistiller, akamaster's, weiai-
cunzai's and Eromera's networks on fixed weights, by make_foreign_checkpoints.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.errors import UserError
from fastkd.models import Tapped, create_model
from fastkd.storage.weights import load_into
from fastkd.testing import fixed_state, hashed_values

CASES = json.loads(Path(__file__).with_name("foreign_checkpoints.json").read_text())


def checkpoint(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    lines = (line.partition(" ") for line in case["state"])
    shapes = {name: [int(n) for n in dims.split("x") if n] for name, _, dims in lines}
    state = fixed_state(shapes)
    return {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()
    }


def case_of(repository: str, name: str) -> dict[str, Any]:
    return next(c for c in CASES if c["repository"] == repository and c["name"] == name)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['repository']}-{case['name']}-{case['side']}"
)
def test_their_weights_give_their_numbers_here(case: dict[str, Any], tmp_path: Path) -> None:
    classes = case["taps"]["logits"]["shape"][1]
    file = tmp_path / "theirs.pth"
    wrapped = {f"module.{key}": value for key, value in checkpoint(case, torch.float32).items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, file)
    model = create_model(case["name"], classes, weights=file, **case["options"]).eval()
    images = hashed_values((2, 3, case["side"], case["side"]), -1).float()
    with torch.no_grad():
        found = Tapped(model, [*case["taps"]])(images)
    for tap, theirs in case["taps"].items():
        ours = found[tap].double()
        assert list(ours.shape) == theirs["shape"], tap
        # fp32 here, fp64 there, up to 110 layers between; a wrong channel order is off by O(norm).
        close = 1e-5 * theirs["norm"]
        assert abs(float(ours.norm()) - theirs["norm"]) < close, tap
        product = float((ours * hashed_values(ours.shape, 0)).sum())
        assert abs(product - theirs["product"]) < close, tap
        first = torch.tensor(theirs["first"], dtype=torch.float64)
        assert (ours.flatten()[:10] - first).norm() < close, tap


def test_a_file_of_ours_is_read_as_it_is() -> None:
    """`conv1` and `conv2` are also names of another repository, for other layers."""
    model = create_model("mobilenetv2", 10)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    state = fixed_state(shapes)
    load_into(model, state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key


def test_projections_that_a_file_lacks_are_explained() -> None:
    model = create_model("resnet20", 10)
    with pytest.raises(UserError, match=r'no projections: build the network with shortcuts="pad"'):
        load_into(model, checkpoint(case_of("pytorch_resnet_cifar10", "resnet20")))


def test_a_missing_tensor_of_theirs_is_named_as_here() -> None:
    state = checkpoint(case_of("RepDistiller", "vgg8"))
    del state["block2.0.bias"]
    with pytest.raises(UserError, match=r"1 missing \(blocks.2.0.bias\)"):
        load_into(create_model("vgg8", 10), state)


def test_a_wrong_class_count_is_explained_under_their_names() -> None:
    state = checkpoint(case_of("RepDistiller", "shufflenetv2"))
    with pytest.raises(UserError, match=r"class counts differ.*num_classes=10"):
        load_into(create_model("shufflenetv2", 100), state)
