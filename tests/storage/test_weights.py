"""Weight files: every layout people have, honest errors, atomic writing."""

import argparse
import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from fastkd.errors import RunFailed, UserError
from fastkd.models import Tapped, create_model, model_from_file
from fastkd.models.card import card_of, sign
from fastkd.storage.weights import WeightFile, describe, load_into, load_weights, save_weights


def small() -> nn.Module:
    torch.manual_seed(1)
    return create_model("resnet8", 10, width=0.25)


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def other_of(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    card = card_of(model)
    return create_model(card.name, card.num_classes, **card.options)


NAMESPACE = argparse.Namespace(lr=0.1, milestones=[150, 180], name="kd", mean=np.float32(0.5))
NUMPY = {
    "best": np.float64(0.75),
    "epoch": np.int64(3),
    "flag": np.bool_(True),
    "half": np.float16(1.5),
    "label": np.str_("cat"),
    "raw": np.bytes_(b"ab"),
    "curve": np.arange(6, dtype=np.float32).reshape(2, 3),
    "counts": np.arange(3),
    "complex": np.complex64(1j),
}

LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model+optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "net": lambda state: {"net": state, "acc": 93.1},
    "ema only": lambda state: {"ema": state},
    "nested": lambda state: {"model": {"state_dict": state, "best": torch.tensor(0.5)}},
    "one unknown key": lambda state: {"my_network": state, "epoch": 3},
    "scalar tensor beside": lambda state: {"acc": torch.tensor(0.5), "state_dict": state},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "_orig_mod.module.": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "module._orig_mod.module.": lambda state: {
        "model": {f"module._orig_mod.module.{k}": v for k, v in state.items()}
    },
    "inner _orig_mod.": lambda state: {
        key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()
    },
    "averaged": lambda state: (
        {"n_averaged": torch.tensor(7)} | {f"module.{key}": value for key, value in state.items()}
    ),
    "lightning": lambda state: {"state_dict": {f"model.{key}": v for key, v in state.items()}},
    "parameters": lambda state: {
        key: nn.Parameter(value, requires_grad=value.is_floating_point())
        for key, value in state.items()
    },
    "namespace": lambda state: {"model": state, "opt": NAMESPACE},
    "numpy": lambda state: {"model": state, **NUMPY},
    "containers": lambda state: {
        "model": state,
        "paths": {Path("data"), Path("runs")},
        "classes": frozenset([1, 2]),
    },
    "no batch counters": lambda state: {
        key: value for key, value in state.items() if "num_batches" not in key
    },
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_strictly(layout: str, legacy: bool, tmp_path: Path) -> None:
    model = small()
    content = LAYOUTS[layout](model.state_dict())
    path = tmp_path / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    target = other_of(model)
    report = load_into(target, path)
    assert report.complete
    assert_same(target, model.state_dict())


def test_numpy_1_names_are_admitted(tmp_path: Path) -> None:
    model = small()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), **NUMPY}, buffer, _use_new_zipfile_serialization=False)
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    before = buffer.getvalue()
    written = before.replace(new, old) if new in before else before.replace(old, new)
    assert written != before
    (tmp_path / "model.pth").write_bytes(written)
    assert load_into(other_of(model), tmp_path / "model.pth").complete


def test_admitting_leaves_the_users_own_list_alone(tmp_path: Path) -> None:
    torch.save({"model": small().state_dict(), "opt": NAMESPACE}, tmp_path / "model.pth")
    before = set(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        load_weights(tmp_path / "model.pth")
        assert argparse.Namespace in torch.serialization.get_safe_globals()
        assert set(torch.serialization.get_safe_globals()) == before | {argparse.Namespace}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def test_missing_file_and_file_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt: no such weight file"):
        load_weights(tmp_path / "nowhere.pt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "log.pt")
    with pytest.raises(UserError, match="no state dict found, the file holds the keys epoch, lr"):
        load_weights(tmp_path / "log.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="the file holds a list"):
        load_weights(tmp_path / "list.pt")


def test_two_networks_under_unknown_keys_are_not_guessed(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save({"generator": state, "critic": state}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="the keys generator, critic"):
        load_weights(tmp_path / "two.pt")


def test_the_format_is_recognised_without_its_suffix(tmp_path: Path) -> None:
    model = small()
    save_weights(tmp_path / "weights.bin", model)
    state, metadata = load_weights(tmp_path / "weights.bin")
    assert metadata["architecture"] == "resnet8"
    assert_same(model, state)


def test_mismatch_lists_missing_unexpected_and_wrong_shapes() -> None:
    model = small()
    state = dict(model.state_dict())
    before = {key: value.clone() for key, value in state.items()}
    del state["conv1.weight"]
    state["extra.weight"] = torch.zeros(2)
    state["fc.weight"] = torch.zeros(10, 3)
    with pytest.raises(UserError) as caught:
        load_into(model, state)
    assert str(caught.value) == (
        "the state dict does not fit resnet8 with 10 classes: 1 missing (conv1.weight), "
        "1 unexpected (extra.weight), 1 of wrong shape (fc.weight: file 10x3, network 10x16)"
    )
    assert_same(model, before)


def test_long_lists_are_cut() -> None:
    with pytest.raises(UserError, match="looks like another network") as caught:
        load_into(small(), create_model("wrn_40_2", 10).state_dict())
    assert len(str(caught.value)) < 1200
    assert "; ..)" in str(caught.value)


def test_class_count_is_recognised(tmp_path: Path) -> None:
    torch.save(create_model("resnet8", 100).state_dict(), tmp_path / "model.pt")
    message = r"model\.pt does not fit resnet8 with 10.*num_classes=100\..*new_head=true.*class_map"
    with pytest.raises(UserError, match=message):
        create_model("resnet8", 10, weights=tmp_path / "model.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["conv1.weight", "bn1.running_var", "fc.bias"])
def test_values_that_are_not_finite_are_refused(key: str, value: float, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    key = next(name for name in state if name.endswith(key.partition(".")[2]))
    state[key].view(-1)[0] = value
    torch.save({"state_dict": state}, tmp_path / "nan.pth")
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"nan\.pth: {key} is not finite \(NaN or inf\)"):
        load_into(model, tmp_path / "nan.pth")
    assert_same(model, before)


def test_a_mask_of_the_network_may_be_infinite() -> None:
    def masked() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
        return model

    given, model = masked(), masked()
    load_into(model, given.state_dict())
    assert_same(model, given.state_dict())


def test_metadata_name_the_network_the_file_holds(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", create_model("resnet14", 100))
    with pytest.raises(UserError, match="The file holds resnet14 with 100 classes: build that one"):
        create_model("resnet8", 100, weights=tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"build the network with num_classes=100\."):
        create_model("resnet14", 10, weights=tmp_path / "a.safetensors")


def test_not_strict_takes_what_fits_and_reports_the_rest() -> None:
    source = create_model("resnet8", 100, width=0.25)
    target = small()
    head = target.get_submodule("fc").weight.clone()
    report = load_into(target, source.state_dict(), strict=False)
    assert (report.missing, report.unexpected) == ((), ())
    assert report.wrong_shape == (
        "fc.weight: file 100x16, network 10x16",
        "fc.bias: file 100, network 10",
    )
    assert torch.equal(target.get_submodule("fc").weight, head)
    assert torch.equal(target.state_dict()["conv1.weight"], source.state_dict()["conv1.weight"])
    with pytest.raises(UserError, match="does not fit"):
        load_into(target, {"a": torch.zeros(1)}, strict=False)


def test_wrappers_on_the_side_of_the_network_do_not_matter(tmp_path: Path) -> None:
    model = small()
    save_weights(tmp_path / "a.safetensors", model)
    for wrap in (torch.compile, nn.DataParallel, lambda net: nn.DataParallel(torch.compile(net))):
        target = other_of(model)
        assert load_into(wrap(target), tmp_path / "a.safetensors").complete
        assert_same(target, model.state_dict())
        save_weights(tmp_path / "b.safetensors", wrap(target))
        assert load_weights(tmp_path / "b.safetensors")[0].keys() == model.state_dict().keys()
    target = other_of(model)
    load_into(target, Tapped(model).state_dict())
    assert_same(target, model.state_dict())


def test_values_are_cast_to_the_network() -> None:
    model = small()
    target = other_of(model)
    load_into(target, {key: value.double() for key, value in model.state_dict().items()})
    assert_same(target, model.state_dict())


def test_best_file_rebuilds_the_network(tmp_path: Path) -> None:
    model = small().to(memory_format=torch.channels_last)
    sign(model, replace(card_of(model), normalization=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))))
    save_weights(tmp_path / "best.safetensors", model, {"epoch": "3"})
    assert load_weights(tmp_path / "best.safetensors")[1] == {
        "format": "pt",
        "architecture": "resnet8",
        "num_classes": "10",
        "options": '{"width": 0.25}',
        "normalization": "[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]",
        "epoch": "3",
    }
    for again in (
        model_from_file(tmp_path / "best.safetensors"),
        model_from_file(tmp_path),  # the run folder
        create_model("resnet8", width=0.25, weights=tmp_path / "best.safetensors"),
    ):
        assert_same(again, model.state_dict())
        assert describe(again) == describe(model)
        images = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(again.eval()(images), model.eval()(images))


def test_files_that_do_not_describe_a_network(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
    with pytest.raises(UserError, match="does not name its network; build it with"):
        model_from_file(tmp_path / "a.safetensors")
    save_weights(tmp_path / "b.safetensors", small(), {"normalization": "[[0.5"})
    with pytest.raises(UserError, match=r"b\.safetensors: its metadata cannot be read"):
        model_from_file(tmp_path / "b.safetensors")


def test_options_that_text_cannot_repeat_leave_no_description() -> None:
    model = create_model("timm:test_resnet", 3, norm_layer=nn.BatchNorm2d)
    assert not {"architecture", "num_classes", "options"} & describe(model).keys()


@pytest.mark.parametrize("name", ["test_resnet", "resnet10t"])
def test_timm_student_loads_strictly_into_timm(name: str, tmp_path: Path) -> None:
    student = create_model(f"timm:{name}", 5).to(memory_format=torch.channels_last)
    save_weights(tmp_path / "best.safetensors", student)
    plain = timm.create_model(name, num_classes=5)
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "best.safetensors"), strict=True)
    assert_same(plain, student.state_dict())
    assert_same(model_from_file(tmp_path), student.state_dict())


def test_shared_and_strided_tensors_are_stored_in_full(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    state = dict(model.state_dict())
    state["view"] = torch.arange(12.0).reshape(3, 4).T
    base = torch.arange(10.0)
    state["head"], state["tail"] = base[:5], base[5:]
    state["parameter"] = nn.Parameter(torch.ones(2))
    save_weights(tmp_path / "a.safetensors", state)
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, {"a": torch.ones(3)})

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFailed, match=r"no space left on the disk: .*best\.safetensors"):
        save_weights(path, {"a": torch.zeros(3)})
    assert torch.equal(load_weights(path)[0]["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["best.safetensors"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == mode


def test_the_description_is_plain_json() -> None:
    facts = describe(create_model("timm:test_resnet", 3, drop_rate=0.1))
    assert json.loads(facts["options"]) == {"drop_rate": 0.1}
    assert json.loads(facts["normalization"]) == [[0.5] * 3, [0.5] * 3]


def test_an_opened_file_stands_wherever_a_path_does(tmp_path: Path) -> None:
    model = small()
    save_weights(tmp_path / "best.safetensors", model)
    file = WeightFile.open(tmp_path)
    (tmp_path / "best.safetensors").unlink()  # nothing below reads it again
    assert WeightFile.open(file) is file
    assert file.facts["architecture"] == file.network.architecture == "resnet8"
    for again in (
        create_model("resnet8", 10, weights=file, width=0.25),
        model_from_file(file),
    ):
        assert_same(again, model.state_dict())
    assert load_into(other_of(model), file).complete
    with pytest.raises(UserError, match=f"{tmp_path} does not fit resnet14"):
        create_model("resnet14", 10, weights=file)
