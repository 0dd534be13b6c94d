"""Checkpoints of the trainers that people use: what lies beside the network never matters.

Truth is the network that was saved: after loading, another one gives its logits, bit for bit.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.storage.weights import WeightFile, load_into, load_weights, save_weights

State = dict[str, Tensor]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("resnet8", 10, width=0.25)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


GOOD, OTHER, WIDE = network(1), network(2), create_model("resnet14", 10)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def is_good(model: nn.Module) -> bool:
    return torch.equal(logits(model), logits(GOOD))


def under(prefix: str, model: nn.Module = GOOD) -> State:
    return {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def momentum(model: nn.Module) -> dict[str, Any]:
    state = {n: {"exp_avg": torch.zeros_like(p)} for n, p in enumerate(model.parameters())}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [*state]}]}


def split(state: State) -> tuple[State, State]:
    head = {key: value for key, value in state.items() if key.startswith("fc.")}
    return {key: value for key, value in state.items() if key not in head}, head


def openmmlab(model: nn.Module = GOOD) -> State:
    body, head = split(model.state_dict())
    return {f"backbone.{k}": v for k, v in body.items()} | {f"head.{k}": v for k, v in head.items()}


ALONE: dict[str, Callable[[], Any]] = {
    "Lightning: model., teacher and losses beside": lambda: {
        "state_dict": under("model.")
        | under("teacher.", WIDE)
        | {"criterion.weight": torch.ones(10), "metric.total": torch.tensor(3)},
        "optimizer_states": [momentum(GOOD)],
        "lr_schedulers": [],
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}},
    },
    "Lightning: net.backbone.": lambda: {"state_dict": under("net.backbone.")},
    "Lightning: DDP in compile in FSDP": lambda: {
        "state_dict": under("_orig_mod.module._fsdp_wrapped_module.model.")
    },
    "compile and FSDP inside": lambda: {
        key.replace("layer1.", "layer1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in GOOD.state_dict().items()
    },
    "DataParallel of a part": lambda: {
        key.replace("layer2.", "layer2.module."): value for key, value in GOOD.state_dict().items()
    },
    "mmpretrain": lambda: {
        "meta": {"epoch": 3},
        "state_dict": openmmlab() | {"data_preprocessor.mean": torch.zeros(3, 1, 1)},
        "optimizer": momentum(GOOD),
    },
    "body and head in mappings": lambda: dict(
        zip(("backbone", "head"), split(GOOD.state_dict()), strict=True)
    ),
    "Composer": lambda: {
        "state": {"model": under("module."), "optimizers": {"SGD": momentum(GOOD)}, "run": "x"},
        "rng": [{"python": [3, 1], "torch": torch.zeros(16, dtype=torch.uint8)}],
    },
    "fastai": lambda: {"model": GOOD.state_dict(), "opt": {"state": [{"mom": torch.ones(4)}]}},
    "RepDistiller": lambda: {"epoch": 240, "model": GOOD.state_dict(), "best_acc": 0.7},
    "mdistiller": lambda: {
        "epoch": 1,
        "model": under("module.student.") | under("module.teacher.", WIDE),
        "optimizer": momentum(GOOD),
        "best_acc": torch.tensor(1.0),
    },
    "torchdistill": lambda: {"model": under(""), "optimizer": momentum(GOOD), "best_value": 0.3},
    "a trainer's folder of keys": lambda: {"model_state": {"network": under("module.")}},
    "torchvision without EMA": lambda: {
        "model": under("module."),
        "optimizer": momentum(GOOD),
        "scaler": {"scale": 1.0},
    },
    "DeepSpeed": lambda: {"module": under(""), "buffer_names": ["a"], "optimizer": None},
    "counters of thop": lambda: (
        under("") | {"total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)}
    ),
    "tensors of integers": lambda: under("") | {"layer1.index": torch.arange(4)},
    "no batch counters": lambda: {
        key: value for key, value in under("module.").items() if "num_batches" not in key
    },
    "half precision": lambda: under("", network(1).double()),
    "the same weights twice": lambda: {"model": under(""), "best": under("module.")},
    "a list of networks of one": lambda: {"nets": [under("")]},
}


def swa() -> AveragedModel:
    averaged = AveragedModel(network(2))
    averaged.module.load_state_dict(GOOD.state_dict())
    return averaged


AVERAGED: dict[str, Callable[[], Any]] = {
    "timm": lambda: {"arch": "x", "state_dict": under("", OTHER), "state_dict_ema": under("")},
    "torchvision": lambda: {
        "model": under("module.", OTHER),
        "model_ema": under("module.") | {"n_averaged": torch.tensor(7)},
    },
    "DeiT": lambda: {"model_ema": under(""), "model": under("", OTHER)},
    "SWA beside": lambda: {"net": under("", OTHER), "average": swa().state_dict()},
    "swa_state_dict": lambda: {"state_dict": under("", OTHER), "swa_state_dict": under("")},
    "FixMatch": lambda: {"state_dict": under("", OTHER), "ema_state_dict": under("")},
    "Lightning: ema_model.": lambda: {
        "state_dict": under("model.", OTHER) | under("ema_model.module.")
    },
    "a callback of Lightning": lambda: {
        "state_dict": under("net.", OTHER),
        "callbacks": {"EMACallback": {"shadow": under("")}},
    },
    # These two write the average to state_dict, and what it averages beside it.
    "Lightning: WeightAveraging": lambda: {
        "state_dict": under("model."),
        "current_model_state": under("model.", OTHER),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "mmengine": lambda: {
        "state_dict": openmmlab(),
        "ema_state_dict": {f"module.{key}": value for key, value in openmmlab(OTHER).items()}
        | {"steps": torch.tensor(9)},
    },
}


@pytest.mark.parametrize("layout", ALONE)
def test_the_network_is_found(layout: str, tmp_path: Path) -> None:
    torch.save(ALONE[layout](), tmp_path / "theirs.ckpt")
    model = create_model("resnet8", 10, width=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_into(model, tmp_path / "theirs.ckpt").complete
    assert is_good(model)


@pytest.mark.parametrize("layout", AVERAGED)
def test_an_average_goes_first_and_is_said(layout: str, tmp_path: Path) -> None:
    torch.save(AVERAGED[layout](), tmp_path / "theirs.ckpt")
    with pytest.warns(UserWarning, match=r"theirs\.ckpt holds several copies of the .*using"):
        model = create_model("resnet8", 10, width=0.25, weights=tmp_path / "theirs.ckpt")
    assert is_good(model)


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("timm", "state_dict"),
        ("torchvision", "model"),
        ("Lightning: ema_model.", "state_dict.model"),
        ("Lightning: WeightAveraging", "current_model_state.model"),
        ("mmengine", "ema_state_dict"),
        ("SWA beside", "net"),
    ],
)
def test_a_key_chooses(layout: str, key: str, tmp_path: Path) -> None:
    torch.save(AVERAGED[layout](), tmp_path / "theirs.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model(
            "resnet8", 10, width=0.25, weights=tmp_path / "theirs.ckpt", weights_key=key
        )
    assert torch.equal(logits(model), logits(OTHER))


def test_what_a_reader_without_a_network_gets(tmp_path: Path) -> None:
    torch.save(AVERAGED["timm"](), tmp_path / "timm.pth.tar")
    assert torch.equal(load_weights(tmp_path / "timm.pth.tar")[0]["fc.bias"], GOOD.fc.bias)
    torch.save(ALONE["RepDistiller"](), tmp_path / "theirs.pth")
    assert load_weights(tmp_path / "theirs.pth")[0].keys() == GOOD.state_dict().keys()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"student": under("module."), "teacher": under("", OTHER)}, "student, teacher"),
        ({"model": under(""), "best": under("", OTHER)}, "model, best"),
        (under("encoder_q.") | under("encoder_k.", OTHER), "encoder_q, encoder_k"),
        ({"nets": [under(""), under("", OTHER)]}, "nets.0, nets.1"),
        ({"ema_1": under(""), "ema_2": under("", OTHER)}, "ema_1, ema_2"),
    ],
    ids=["DINO", "last and best", "MoCo", "a list", "two averages"],
)
def test_of_several_none_is_guessed(content: Any, names: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "two.pth")
    with pytest.raises(UserError, match=rf"several networks that fit \({names}\): weights_key=KEY"):
        create_model("resnet8", 10, width=0.25, weights=tmp_path / "two.pth")
    first = names.partition(",")[0]
    model = create_model("resnet8", 10, width=0.25, weights=tmp_path / "two.pth", weights_key=first)
    assert is_good(model)


def test_a_key_that_names_nothing(tmp_path: Path) -> None:
    torch.save(AVERAGED["timm"](), tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"'ema' names nothing .* state_dict, state_dict_ema"):
        WeightFile.open(tmp_path / "two.pth", "ema")


def test_dino_gives_a_body_its_head_beside_it_does_not_matter(tmp_path: Path) -> None:
    name = "timm:test_vit"
    body = {k: v for k, v in create_model(name, 10).state_dict().items() if "head" not in k}
    student = {f"module.backbone.{key}": value + 1 for key, value in body.items()}
    teacher = {f"backbone.{key}": value for key, value in body.items()}
    head = {"head.mlp.0.weight": torch.ones(8, 64), "head.last_layer.weight_v": torch.ones(4, 8)}
    content = {
        "student": student | {f"module.{key}": value for key, value in head.items()},
        "teacher": teacher | head,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(content, tmp_path / "dino.pth")
    model = create_model(
        name, 10, weights=tmp_path / "dino.pth", weights_key="teacher", new_head=True
    )
    for key, value in body.items():
        assert torch.equal(model.state_dict()[key], value), key
    # At the outermost level, as in SwAV: with a new head the old one may have any name.
    torch.save(body | {"projection_head.0.weight": torch.ones(3, 3)}, tmp_path / "swav.pth")
    model = create_model(name, 10, weights=tmp_path / "swav.pth", new_head=True)
    assert torch.equal(model.state_dict()["pos_embed"], body["pos_embed"])


def extra(state: State, name: str) -> State:
    return state | {name: torch.ones(4, 4)}


@pytest.mark.parametrize(
    "content",
    [
        extra(under(""), "layer1.0.se.weight"),
        extra(under("model."), "model.layer2.0.attention.weight"),
        extra(under(""), "neck.weight"),
        under("", create_model("resnet14", 10, width=0.25)),
        # The body of one network and the head of another, whole one.
        {"student": split(under(""))[0], "teacher": under("", WIDE)},
        {"backbone": split(under(""))[0]},
    ],
    ids=["attention", "prefixed", "a neck", "deeper", "two networks", "no head"],
)
def test_another_network_is_not_taken_for_it(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not fit resnet8"):
        create_model("resnet8", 10, width=0.25, weights=tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda value: value.to(torch.int8), r"conv1\.weight: file \S+ of int8, network"),
        (lambda value: value.to_sparse(), r"1 missing \(conv1\.weight\)"),
        (lambda value: value.to("meta"), r"1 missing \(conv1\.weight\)"),
        (lambda value: value[:1], r"conv1\.weight: file 1x3x3x3, network 4x3x3x3"),
    ],
    ids=["quantised", "sparse", "without values", "another shape"],
)
def test_tensors_that_are_no_weights(
    change: Callable[[Tensor], Tensor], sentence: str, tmp_path: Path
) -> None:
    state = under("")
    torch.save(state | {"conv1.weight": change(state["conv1.weight"])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=sentence):
        create_model("resnet8", 10, width=0.25, weights=tmp_path / "odd.pth")


def test_metadata_of_other_programs_do_not_matter(tmp_path: Path) -> None:
    facts = {"format": "pt", "options": "--lr 0.1", "num_classes": "ten", "step": "3"}
    save_weights(tmp_path / "theirs.safetensors", GOOD.state_dict(), facts)
    assert is_good(create_model("resnet8", 10, width=0.25, weights=tmp_path / "theirs.safetensors"))


def test_buffers_that_a_network_makes_itself(tmp_path: Path) -> None:
    """Older timm stored the masks and indices of its window attention."""
    model = create_model("timm:swin_tiny_patch4_window7_224", 3)
    idle = {k: v for k, v in model.named_buffers() if k not in model.state_dict()}
    assert any(value.is_floating_point() for value in idle.values())
    torch.save({"model": model.state_dict() | idle}, tmp_path / "swin.pth")
    assert load_into(model, tmp_path / "swin.pth").complete


def place(kind: str, folder: Path) -> None:
    """A folder as a program leaves it."""
    state = GOOD.state_dict()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(momentum(GOOD), folder / "optimizer.bin")
    names = [*state]
    parts = {
        "model-00001-of-00002": {name: state[name] for name in names[:9]},
        "model-00002-of-00002": {name: state[name] for name in names[9:]},
    }
    if kind == "transformers":
        torch.save(momentum(GOOD), folder / "training_args.bin")
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif kind == "accelerate":
        torch.save(state, folder / "pytorch_model.bin")
        torch.save({}, folder / "scheduler.bin")
    elif kind in ("shards", "shards of torch"):
        suffix = "safetensors" if kind == "shards" else "bin"
        index: dict[str, str] = {}
        for part, tensors in parts.items():
            file = folder / f"{part}.{suffix}"
            if kind == "shards":
                safetensors.torch.save_file(tensors, file)
            else:
                torch.save(tensors, file)
            index |= dict.fromkeys(tensors, file.name)
        name = "model.safetensors" if kind == "shards" else "pytorch_model.bin"
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    elif kind == "the only file":
        (folder / "optimizer.bin").unlink()
        torch.save({"state_dict": under("model.")}, folder / "epoch=3.ckpt")
    elif kind == "a run":
        (folder / "config.yaml").touch()
        save_weights(folder / "best.safetensors", GOOD)


@pytest.mark.parametrize(
    "kind", ["transformers", "accelerate", "shards", "shards of torch", "the only file", "a run"]
)
def test_folders(kind: str, tmp_path: Path) -> None:
    place(kind, tmp_path / "saved")
    assert is_good(create_model("resnet8", 10, width=0.25, weights=tmp_path / "saved"))
    for index in (tmp_path / "saved").glob("*.index.json"):
        assert is_good(create_model("resnet8", 10, width=0.25, weights=index))


def test_folders_that_hold_no_weights(tmp_path: Path) -> None:
    def refused(folder: str) -> str:
        with pytest.raises(UserError) as caught:
            load_weights(tmp_path / folder)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "none of the usual names" in refused("empty")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "no best.safetensors yet, this run has not been evaluated" in refused("run")
    (tmp_path / "many").mkdir()
    for name in ("a.pth", "b.ckpt"):
        torch.save(GOOD.state_dict(), tmp_path / "many" / name)
    assert "several: a.pth, b.ckpt; name one of them" in refused("many")
    place("shards", tmp_path / "shards")
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    assert "model.safetensors.index.json names it as a part" in refused("shards")
    (tmp_path / "away").mkdir()
    index = tmp_path / "away" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../many/a.pth"}}))
    assert "'../many/a.pth', which is not a weight file beside it" in refused("away")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    assert "format_utils dcp_to_torch" in refused("dcp")
