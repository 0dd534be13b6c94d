"""Weight files as trainers write them: a network that answers as the saved one, or a refusal."""

import functools
import io
import random
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from generated_case import REFUSED, Case
from torch import Tensor, nn

from fastkd.models import create_model
from fastkd.storage.weights import WeightFile, load_into

__all__ = ["make"]

NAME, CLASSES, WIDTH = "resnet8", 7, 0.25
IMAGES = torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "_fsdp_wrapped_module.", "student.")
# Of these, what is an attribute of a module that may hold a teacher too.
NAMED = ("model", "net", "student")
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "weights", "state", "network")
AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "swa_model", "averaged_model")

State = dict[str, Tensor]


@functools.cache
def _network(seed: int, name: str = NAME) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(name, CLASSES, width=WIDTH)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def make(rng: random.Random, folder: Path) -> Case:
    """A file of one network's weights, and what lies beside and around them."""
    whole = rng.choice((_plain, _plain, _averaged, _damaged, _foreign))
    content, expected, about = whole(rng)
    path = folder / f"file{rng.choice(('.pt', '.pth', '.bin', '.ckpt'))}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif rng.random() < 0.4 and all(isinstance(one, Tensor) for one in content.values()):
        path = folder / "file.safetensors"
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)

    def run() -> Any:
        model = create_model(NAME, CLASSES, width=WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_into(model, WeightFile.open(path))
        return _logits(model)

    return Case(f"load {path.name}: {about}", run, expected)


def _wrapped(rng: random.Random, state: State) -> tuple[State, str]:
    """Below up to three prefixes, some of which may lie inside."""
    prefix = "".join(rng.choice(WRAPPERS) for _ in range(rng.randint(0, 3)))
    inside = rng.choice(("", "", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."))
    named = {key.replace("layer2.", f"layer2.{inside}"): value for key, value in state.items()}
    return {prefix + key: value for key, value in named.items()}, f"{prefix!r}, layer2.{inside}"


def _contained(rng: random.Random, state: Any) -> tuple[dict[str, Any], str]:
    names = [rng.choice(CONTAINERS) for _ in range(rng.randint(0, 2))]
    for name in names:
        state = {name: state, **_beside(rng)}
    return state, f"in {'.'.join(reversed(names)) or 'the file'}"


def _beside(rng: random.Random) -> dict[str, Any]:
    """What trainers write next to a network."""
    moments = {n: {"exp_avg": torch.zeros(3), "step": 1} for n in range(3)}
    things: dict[str, Any] = {
        "epoch": 7,
        "best_acc": torch.tensor(0.5),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
        "scaler": {"scale": 65536.0},
        "rng": torch.zeros(16, dtype=torch.uint8),
        "arch": "a network",
        "hyper_parameters": {"lr": 0.1, "layers": [1, 2]},
        "metrics": [0.1, 0.2],
        "loss_state": {"weight": torch.ones(CLASSES)},
        "callbacks": {"best{}": {"score": torch.tensor(1.0)}},
    }
    return {key: things[key] for key in rng.sample(list(things), rng.randint(0, 4))}


def _state(rng: random.Random, seed: int) -> tuple[State, Tensor]:
    """Weights as they may be stored, and the logits of the network that they make."""
    state = dict(_network(seed).state_dict())
    model: nn.Module = _network(seed)
    if rng.random() < 0.3:
        kind = rng.choice((torch.float16, torch.bfloat16, torch.float64))
        state = {k: v.to(kind) if v.is_floating_point() else v for k, v in state.items()}
        model = create_model(NAME, CLASSES, width=WIDTH)
        model.load_state_dict(state)
    if rng.random() < 0.3:
        state = {k: v for k, v in state.items() if "num_batches" not in k}
    if rng.random() < 0.3:
        state |= {"layer1.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    return state, _logits(model)


def _plain(rng: random.Random) -> tuple[Any, Any, str]:
    state, logits = _state(rng, 1)
    state, how = _wrapped(rng, state)
    named = any(key.rpartition("conv1")[0].strip("_.").endswith(NAMED) for key in state)
    if named and rng.random() < 0.5:
        other = _network(3, "resnet14").state_dict()
        state |= {f"teacher.{key}": value for key, value in other.items()}
        how += ", a teacher beside"
    content, where = _contained(rng, state)
    return content, logits, f"{how} {where}"


def _averaged(rng: random.Random) -> tuple[Any, Any, str]:
    """The average of the weights goes before the weights."""
    average, logits = _state(rng, 1)
    average, how = _wrapped(rng, average)
    raw, _ = _state(rng, 2)
    raw, _ = _wrapped(rng, raw)
    key, name = rng.choice(CONTAINERS), rng.choice(AVERAGES)
    content = {key: raw, name: average, **_beside(rng)}
    if rng.random() < 0.3:
        content[name] = average | {"n_averaged": torch.tensor(7)}
    return dict(rng.sample(list(content.items()), len(content))), logits, f"{name} {how}, {key}"


def _damaged(rng: random.Random) -> tuple[Any, Any, str]:
    state, _ = _state(rng, 1)
    key = rng.choice(
        [key for key, value in state.items() if value.dim() > 0 and "total" not in key]
    )
    how = rng.choice(("missing", "shape", "one more layer", "two networks", "truncated"))
    if how == "missing":
        del state[key]
    elif how == "shape":
        state[key] = torch.zeros(*state[key].shape, 2)
    elif how == "one more layer":
        state["layer9.weight"] = torch.ones(3, 3)
    elif how == "two networks":
        both = {"one": state, "two": dict(_network(2).state_dict())}
        return both, REFUSED, how
    elif how == "truncated":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()[: rng.randrange(len(buffer.getvalue()) - 200)], REFUSED, how
    content, where = _contained(rng, _wrapped(rng, state)[0])
    return content, REFUSED, f"{how} {key} {where}"


def _foreign(rng: random.Random) -> tuple[Any, Any, str]:
    """What is no checkpoint, or one of something else."""
    scripted = io.BytesIO()
    if (kind := rng.randrange(9)) == 0:
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), scripted)
    whole: list[Any] = [
        scripted.getvalue(),
        b"",
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        rng.randbytes(rng.randrange(1, 3000)),
        {"epoch": 3},
        {"state_dict": {}},
        dict(_network(3, "resnet14").state_dict()),
        {"weights": torch.zeros(3), "\x1b[31mred": torch.ones(2)},
    ]
    return whole[kind], REFUSED, f"foreign {kind}"
