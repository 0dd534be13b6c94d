"""Weights for timm and the Hugging Face Hub: a folder as timm's own hub writer makes it, or a file.

timm loads the folder by `timm.create_model("local-dir:PATH", pretrained=True)`, and by "hf-hub:"
once it is uploaded. Networks that timm does not know, and timm's own with cheap blocks, are loaded
by `fastkd.models.model_from_file`.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import __version__
from fastkd.deploy.source import HF_FILES, Choice, Source
from fastkd.errors import RunFailed, UserError
from fastkd.models.registry import model_from_file
from fastkd.printable import in_words
from fastkd.storage.facts import DataFacts, Framing
from fastkd.storage.weight_file import WeightFile
from fastkd.storage.weights import save_weights

__all__ = [
    "check_weights_name",
    "file_line",
    "loader_line",
    "push",
    "read_folder",
    "read_timm_file",
    "timm_network",
    "write_folder",
    "write_timm_file",
]

CONFIG, WEIGHTS, CARD = HF_FILES
PICKLED = (".pth", ".pt", ".bin")


def timm_network(source: Source) -> nn.Module | None:
    """The same network as timm builds it, with the weights; None if timm does not know it.

    That is every network of another name, and one whose layers were replaced.
    """
    import timm

    facts = source.facts
    hub, _, name = (facts.architecture or "").partition(":")
    if hub != "timm":
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(name, num_classes=facts.num_classes, **_options(source))
        network.load_state_dict(source.model.state_dict())
    except Exception:
        # An option that only fastkd knows, or other names and shapes of weights.
        return None
    return network.eval()


def _options(source: Source) -> dict[str, Any]:
    """Options of the network that timm takes; rates of dropout belong to a training."""
    return {key: value for key, value in source.facts.options.items() if "drop" not in key}


def check_weights_name(target: Path) -> None:
    """UserError unless timm knows by the name how the file must be read."""
    if target.suffix not in (".safetensors", *PICKLED):
        raise UserError(
            f"--out {target}: timm reads {', '.join(('.safetensors', *PICKLED))}, by the name"
        )


def write_timm_file(source: Source, path: Path, choice: Choice) -> None:
    """A state dict in timm's names, for `timm.create_model(NAME, checkpoint_path=FILE)`."""
    tensors = _tensors(_in_timm(source), choice)
    if path.suffix == ".safetensors":
        _save(tensors, path, source)
    else:
        torch.save(tensors, path)


def read_timm_file(source: Source, path: Path) -> nn.Module:
    """The network as timm makes it with such a file."""
    import timm

    name = (source.facts.architecture or "").partition(":")[2]
    options = _options(source)
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(
            name, num_classes=source.facts.num_classes, checkpoint_path=str(path), **options
        ).eval()


def file_line(source: Source, path: Path) -> str:
    """The Python that makes the network with such a file."""
    name = (source.facts.architecture or "").partition(":")[2]
    options = {"num_classes": source.facts.num_classes, **_options(source)}
    words = [_quoted(name), *(f"{key}={_quoted(one)}" for key, one in options.items())]
    return f"model = timm.create_model({', '.join(words)}, checkpoint_path={_quoted(str(path))})"


def _quoted(value: object) -> str:
    """In Python, with double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _in_timm(source: Source) -> nn.Module:
    network = timm_network(source)
    if network is None:
        raise UserError(
            f"timm does not know {source.title} as it is ({_as_it_is(source)}): --format hf keeps "
            f"its weights with the line that loads them"
        )
    return network


def _as_it_is(source: Source) -> str:
    name, options = source.facts.architecture, source.facts.options
    if not (name or "").startswith("timm:"):
        return f"it is {name or 'a network of yours'}"
    return (
        ", ".join(f"{key}={value}" for key, value in options.items()) or "its layers were changed"
    )


def write_folder(source: Source, folder: Path, choice: Choice, repo: str) -> None:
    """config.json, model.safetensors and README.md. repo: of the hub, for the model card."""
    folder.mkdir()
    network = timm_network(source)
    if network is None:
        tensors = _tensors(source.model, choice)
        (folder / CONFIG).write_text(json.dumps(_config(source), indent=2) + "\n")
    else:
        tensors = _tensors(network, choice)
        _write_timm_config(source, network, folder / CONFIG)
    _save(tensors, folder / WEIGHTS, source)
    text = _readme(source, repo, in_timm=network is not None)
    (folder / CARD).write_text(text, encoding="utf-8")


def _tensors(model: nn.Module, choice: Choice) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if choice.half:
        return {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    return tensors


def _save(tensors: dict[str, Tensor], path: Path, source: Source) -> None:
    """With the metadata from which fastkd rebuilds the network."""
    facts = source.facts.to_metadata() | {"format": "pt", "fastkd": __version__}
    origin = {"recipe": source.recipe, "digest": source.digest}
    save_weights(path, tensors, facts | {key: text for key, text in origin.items() if text})


def _write_timm_config(source: Source, network: Any, path: Path) -> None:
    from timm.models._hub import save_config_for_hf

    kept = {**network.pretrained_cfg}
    for key in ("tag", "license", "description", "label_names", "label_descriptions", "notes"):
        kept.pop(key, None)
    # What else would apply to other sizes than this one.
    for key in ("test_input_size", "test_crop_pct", "label_offset"):
        kept.pop(key, None)
    network.pretrained_cfg = kept | _shown(source)
    named = source.facts.data.named if source.facts.data else None
    config = {"label_names": list(named)} if named else {}
    save_config_for_hf(network, str(path), model_config=config, model_args=_options(source))


def _shown(source: Source) -> dict[str, Any]:
    """How pictures are shown, in timm's words."""
    found: dict[str, Any] = {
        "input_size": (3, *source.size),
        "num_classes": source.facts.num_classes,
    }
    if source.normalization:
        found |= dict(zip(("mean", "std"), source.normalization, strict=True))
    if framing := _framing(source):
        found |= {
            "crop_pct": _crop_pct(framing),
            "interpolation": framing.interpolation,
            "crop_mode": framing.mode,
        }
    return found


def _framing(source: Source) -> Framing | None:
    framing = source.facts.data.evaluation if source.facts.data else None
    return framing if framing and source.answers != "pixels" else None


def _crop_pct(framing: Framing) -> float:
    """timm resizes to floor(crop / crop_pct)."""
    exact = framing.crop / framing.resize
    return exact if math.floor(framing.crop / exact) == framing.resize else math.nextafter(exact, 0)


def _config(source: Source) -> dict[str, Any]:
    """config.json of a network that only fastkd builds."""
    data = source.facts.data or DataFacts()
    return {
        "library": "fastkd",
        "fastkd_version": __version__,
        **source.facts.plain(),
        "label_names": list(data.named) if data.named else None,
        "pretrained_cfg": _shown(source),
    }


def read_folder(source: Source, folder: Path) -> nn.Module:
    """The network as timm loads it from the folder, or fastkd where timm does not know it."""
    import timm

    if timm_network(source) is not None:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if source.facts.architecture is None:
        raise UserError(
            f"{source.title} was not built by fastkd.create_model, so no line could load it again: "
            f"use --format onnx or torch-export"
        )
    return model_from_file(WeightFile.open(folder)).eval()


def loader_line(source: Source, place: str, *, hub: bool = False) -> str:
    """The line of Python that loads it."""
    if timm_network(source) is not None:
        scheme = "hf-hub" if hub else "local-dir"
        return f"model = timm.create_model({_quoted(f'{scheme}:{place}')}, pretrained=True)"
    folder = f"huggingface_hub.snapshot_download({_quoted(place)})" if hub else _quoted(place)
    return f"model = fastkd.models.model_from_file({folder})"


def _readme(source: Source, repo: str, *, in_timm: bool) -> str:
    """A model card in the layout of timm's: what it is, base model, data, metrics, command."""
    task = "image-segmentation" if source.answers == "pixels" else "image-classification"
    library = "timm" if in_timm else "fastkd"
    tags = [task, library, "knowledge-distillation"]
    if in_timm:
        tags.append("fastkd")
    head = ["tags:", *(f"- {tag}" for tag in tags), f"pipeline_tag: {task}"]
    head += [f"library_name: {library}", "license: unknown"]
    lines = ["---", *head, "---", f"# Model card for {_plain(repo.rpartition('/')[2])}", ""]
    lines += [f"Trained with [fastkd](https://github.com/fastkd/fastkd) {__version__}.", ""]
    lines += ["## Model Details", *(f"- **{key}:** {text}" for key, text in _details(source))]
    lines += ["", "## Model Usage", "```python", *_usage(source, repo, in_timm=in_timm), "```"]
    return "\n".join(lines) + "\n"


def _details(source: Source) -> list[tuple[str, str]]:
    facts, data = source.facts, source.facts.data or DataFacts()
    params = sum(parameter.numel() for parameter in source.model.parameters())
    found: list[tuple[str, str | None]] = [
        ("Base model", facts.architecture or source.title),
        ("Options", json.dumps(facts.options) if facts.options else None),
        ("Teacher", source.teacher),
        ("Params", f"{params:,}"),
        ("Image size", " x ".join(map(str, source.size))),
        ("Data", data.name),
        ("Classes", _classes(source)),
        ("Pictures are shown", str(data.evaluation) if data.evaluation else None),
        ("Mean, std", json.dumps(source.normalization) if source.normalization else None),
        ("Metrics", ", ".join(f"{key} {value:.4f}" for key, value in source.metrics.items())),
        ("Recipe", source.recipe and f"{source.recipe}, digest {source.digest}"),
        ("Exported by", source.command and f"`{source.command}`"),
    ]
    return [(key, _plain(text)) for key, text in found if text]


def _classes(source: Source) -> str | None:
    count = source.facts.num_classes
    named = source.facts.data.named if source.facts.data else None
    if not count or not named:
        return str(count) if count else None
    shown = ", ".join(named[:20])
    return f"{count}: {shown}{', ..' if len(named) > 20 else ''}"


def _usage(source: Source, repo: str, *, in_timm: bool) -> list[str]:
    imports = "import timm" if in_timm else "import fastkd.models\nimport huggingface_hub"
    return [imports, "", loader_line(source, repo, hub=True), "model.eval()"]


def _plain(text: str) -> str:
    """One line of somebody's words."""
    return " ".join(text.split())


def push(folder: Path, repo: str) -> str:
    """Upload a written folder; returns the name of the repository, which is private if it is new.

    Raises RunFailed if the hub refuses it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="fastkd", library_version=__version__)
        found = api.create_repo(repo, private=True, exist_ok=True).repo_id
        api.upload_folder(repo_id=found, folder_path=folder, commit_message="Add model")
    except Exception as error:
        # The hub's client passes on errors of the network below it.
        raise RunFailed(
            f"{folder} is complete, but it was not uploaded to {repo}: {in_words(error)}"
        ) from error
    return found
