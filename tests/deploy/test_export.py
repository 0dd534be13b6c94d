"""Files of `export_network`: the same answers, what they say of themselves, and what is refused.

Every network of the zoo, of timm and torchvision: test_export_networks.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastkd import __version__
from fastkd.deploy import hub, onnx_file
from fastkd.deploy.export import Proof, export_network, noise_proof
from fastkd.deploy.numerics import Meter
from fastkd.deploy.onnx_file import OnnxFile, OnnxNetwork
from fastkd.deploy.program import read_program
from fastkd.deploy.source import Choice, Source
from fastkd.errors import RunFailed, UserError
from fastkd.models import create_model, model_from_file, use_kernels
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts, Framing

MEAN_STD = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CLASSES = ("cat", "dog", "émeu")


def source_of(model: nn.Module, **more: Any) -> Source:
    data = DataFacts(
        name="folder",
        classes=CLASSES,
        image_size=24,
        evaluation=Framing(resize=28, crop=24, interpolation="bicubic"),
    )
    facts = NetworkFacts(
        architecture=more.pop("name", None),
        num_classes=3,
        options=more.pop("options", {}),
        normalization=MEAN_STD,
        data=data,
    )
    return Source.of(model, facts=facts, recipe="mine", digest="0123456789abcdef", **more)


def test_an_onnx_file_normalises_inside_in_fp16_for_any_batch(tmp_path: Path, tools: Any) -> None:
    model = tools.trained(create_model("wrn_10_1", 3, block="G:4", kernels="fused"))
    source = source_of(model, name="wrn_10_1", options={"block": "G(4)"})
    choice = Choice(half=True, normalize=True, dynamic_batch=True)
    done = export_network(source, tmp_path / "net.onnx", choice)
    assert done.proof.on == "16 images of noise"

    images_NCHW = torch.rand(5, 3, 24, 24)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD)
    wanted = tools.exactly(use_kernels(model, "plain"), (images_NCHW - mean) / std)
    tools.check_near(tools.run_onnx(done.path, images_NCHW), wanted, 1e-2)

    file = OnnxFile.open(done.path)
    told = file.metadata
    assert json.loads(told["classes"]) == list(CLASSES)
    assert json.loads(told["size"]) == [24, 24]
    assert (json.loads(told["mean"]), json.loads(told["std"])) == ([0.0] * 3, [1.0] * 3)
    assert json.loads(told["normalized_inside"]) == [list(values) for values in MEAN_STD]
    assert (told["recipe"], told["digest"]) == ("mine", "0123456789abcdef")
    assert (told["fastkd"], told["precision"]) == (__version__, "fp16")
    assert file.facts.data is not None
    assert file.facts.data.model_copy(update={"normalization": None}) == source.facts.data
    assert file.facts.options == {"block": "G(4)"}
    assert file.facts.normalization == ((0, 0, 0), (1, 1, 1))
    assert file.shape == (None, 3, 24, 24)
    tools.check_near(OnnxNetwork(file)(images_NCHW), wanted, 1e-2)
    with pytest.raises(UserError, match=r"takes images of 24x24 pixels, these have 32x32: export"):
        file.run(torch.rand(1, 3, 32, 32))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


class Dense(nn.Module):
    """Labels pixels, as torchvision's segmentation networks do: a dict, at the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        x = self.head(torch.relu(self.down(images_NCHW)))
        size = images_NCHW.shape[2:]
        return {"out": nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)}


def test_a_network_for_label_maps_takes_any_height_and_width(tmp_path: Path, tools: Any) -> None:
    model = Dense()
    source = source_of(model)
    assert (source.answers, source.multiple) == ("pixels", 1)
    done = export_network(source, tmp_path / "dense.onnx")
    assert done.proof.compared.images == 5
    for shape in ((2, 3, 37, 53), (1, 3, 64, 48)):
        images_NCHW = torch.randn(shape)
        wanted = tools.exactly(model, images_NCHW)
        tools.check_near(tools.run_onnx(done.path, images_NCHW), wanted)
    assert OnnxFile.open(done.path).shape == (1, 3, None, None)


class Encoder(nn.Module):
    """No classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.norm(self.conv(images_NCHW)).relu().mean((2, 3))


@pytest.mark.parametrize("fuse", [None, False])
def test_an_encoder_becomes_a_program(tmp_path: Path, tools: Any, fuse: bool | None) -> None:
    model = tools.trained(Encoder()).train()
    source = Source.of(model, size=16)
    assert source.answers == "embedding"
    choice = Choice(format="torch-export", dynamic_batch=True, fuse=fuse)
    done = export_network(source, tmp_path / "net.pt2", choice)
    assert done.proof.compared.agreement is None
    assert model.training
    program, told = read_program(done.path)
    assert (told["answers"], told["size"]) == ("embedding", "[16, 16]")
    assert ("network.norm.weight" in program.state_dict) == (fuse is False)
    images_NCHW = torch.randn(3, 3, 16, 16)
    wanted = tools.exactly(model, images_NCHW)
    torch.testing.assert_close(program.module()(images_NCHW).double(), wanted, rtol=0, atol=1e-5)


def test_weights_in_timms_names(tmp_path: Path, tools: Any) -> None:
    timm = pytest.importorskip("timm")
    options = {"global_pool": "max"}
    model = tools.trained(create_model("timm:test_resnet", 3, **options))
    source = source_of(model, name="timm:test_resnet", options=options)
    images_NCHW = torch.randn(2, 3, 24, 24)
    wanted = tools.exactly(model, images_NCHW)
    for name in ("net.safetensors", 'a "net".pth'):
        done = export_network(source, tmp_path / name, Choice(format="timm"))
        (line,) = done.lines
        found: dict[str, Any] = {"timm": timm}
        exec(line, found)
        tools.check_near(tools.exactly(found["model"], images_NCHW), wanted)
    assert sorted(load_file(tmp_path / "net.safetensors")) == sorted(model.state_dict())
    with pytest.raises(UserError, match=r"timm reads \.safetensors, \.pth, \.pt, \.bin, by the"):
        export_network(source, tmp_path / "net.onnx", Choice(format="timm"))
    ours = source_of(create_model("resnet8", 3), name="resnet8")
    with pytest.raises(UserError, match=r"timm does not know resnet8 .*: --format hf keeps"):
        export_network(ours, tmp_path / "ours.pth", Choice(format="timm"))


def test_a_folder_for_the_hub_that_timm_loads(tmp_path: Path, tools: Any) -> None:
    timm = pytest.importorskip("timm")
    model = tools.trained(create_model("timm:test_resnet", 3))
    source = source_of(
        model,
        name="timm:test_resnet",
        metrics={"accuracy": 0.875},
        teacher="resnet56",
        command="fastkd export runs/one",
    )
    done = export_network(source, tmp_path / "student", Choice(format="hf"))
    found: dict[str, Any] = {"timm": timm}
    exec(done.lines[0], found)
    images_NCHW = torch.randn(2, 3, 24, 24)
    wanted = tools.exactly(model, images_NCHW)
    tools.check_near(tools.exactly(found["model"], images_NCHW), wanted)
    # timm's own transforms show pictures as the run did.
    shown = timm.data.resolve_data_config(model=found["model"])
    assert [*shown["mean"], *shown["std"]] == [*MEAN_STD[0], *MEAN_STD[1]]
    assert (shown["input_size"], shown["interpolation"]) == ((3, 24, 24), "bicubic")
    resize, crop, *_ = timm.data.create_transform(**shown).transforms
    assert (resize.size, tuple(crop.size)) == (28, (24, 24))
    config = json.loads((done.path / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    assert config["architecture"] == "test_resnet"
    # fastkd, too.
    tools.check_near(tools.exactly(model_from_file(done.path), images_NCHW), wanted)
    card = (done.path / "README.md").read_text()
    for part in (
        "library_name: timm",
        'timm.create_model("hf-hub:USER/student", pretrained=True)',
        "**Base model:** timm:test_resnet",
        "**Teacher:** resnet56",
        "**Classes:** 3: cat, dog, émeu",
        "accuracy 0.8750",
        "digest 0123456789abcdef",
        "`fastkd export runs/one`",
    ):
        assert part in card


def test_a_folder_with_blocks_of_ours_names_its_line(tmp_path: Path, tools: Any) -> None:
    import fastkd

    model = tools.trained(create_model("timm:test_resnet", 3, block="G:4"))
    source = source_of(model, name="timm:test_resnet", options={"block": "G(4)"})
    done = export_network(source, tmp_path / "student", Choice(format="hf"))
    (line,) = done.lines
    assert line == f'model = fastkd.models.model_from_file("{done.path}")'
    found: dict[str, Any] = {"fastkd": fastkd}
    exec(line, found)
    images_NCHW = torch.randn(2, 3, 24, 24)
    wanted = tools.exactly(model, images_NCHW)
    tools.check_near(tools.exactly(found["model"], images_NCHW), wanted)
    assert line.partition("(")[0] in (done.path / "README.md").read_text()


class Hub:
    """Takes the place of huggingface_hub.HfApi; keeps what was sent."""

    sent: dict[str, Any]

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> Any:
        if repo == "nobody/net":
            raise PermissionError("403 Forbidden\nsome page")
        type(self).sent = {"repo": repo, "private": private, "exist_ok": exist_ok}
        return type("Url", (), {"repo_id": f"me/{repo}"})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.sent |= {"to": repo_id, "names": names, "message": commit_message}


def test_a_folder_is_uploaded_when_asked(tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    source = source_of(create_model("resnet8", 3, width=0.25), name="resnet8")
    source = source_of(source.model, name="resnet8", options={"width": 0.25})
    hf = Choice(format="hf")
    done = export_network(source, tmp_path / "net", hf, push="net")
    assert Hub.sent == {
        "repo": "net",
        "private": True,
        "exist_ok": True,
        "to": "me/net",
        "names": ["README.md", "config.json", "model.safetensors"],
        "message": "Add model",
    }
    assert '("net")' in (done.path / "README.md").read_text()
    assert done.lines[1].startswith("uploaded to me/net: model = fastkd.models.model_from_file(")
    with pytest.raises(RunFailed, match=r"other is complete, but it was not .*403 Forbidden$"):
        export_network(source, tmp_path / "other", hf, push="nobody/net")
    with pytest.raises(UserError, match=r"--push uploads the folder of --format hf, got --format"):
        export_network(source, tmp_path / "net.onnx", push="net")


def test_what_differs_gets_no_name(tmp_path: Path, monkeypatch: Any) -> None:
    source = source_of(create_model("resnet8", 3, width=0.25), name="resnet8")
    source = source_of(source.model, name="resnet8", options={"width": 0.25})
    own = hub._tensors

    def changed(model: nn.Module, choice: Choice) -> dict[str, Tensor]:
        return {name: t * 1.01 if t.dim() == 2 else t for name, t in own(model, choice).items()}

    monkeypatch.setattr(hub, "_tensors", changed)
    with pytest.raises(RunFailed) as error:
        export_network(source, tmp_path / "net", Choice(format="hf"))
    assert "net was not written: compared on 16 images of noise, its answers differ" in str(
        error.value
    )
    assert list(tmp_path.iterdir()) == []
    # Nor does it touch what was there.
    (tmp_path / "net").mkdir()
    (tmp_path / "net/README.md").write_text("an earlier export")
    with pytest.raises(UserError, match=r"net exists: --force replaces it, or choose another"):
        export_network(source, tmp_path / "net", Choice(format="hf"))
    with pytest.raises(RunFailed):
        export_network(source, tmp_path / "net", Choice(format="hf"), force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["net", "README.md"]
    monkeypatch.undo()
    export_network(source, tmp_path / "net", Choice(format="hf"), force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["net", *hub.HF_FILES])
    assert "an earlier export" not in (tmp_path / "net/README.md").read_text()


class Strange(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return torch.linalg.eigvals(images_NCHW[:, 0]).real


class Branching(nn.Module):
    """Looks at its numbers."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        pooled = images_NCHW.mean((2, 3))
        return pooled if pooled.sum() > 0 else -pooled


@pytest.mark.parametrize(
    ("model", "choice", "sentence"),
    [
        (Strange, {}, r"does not know the operator aten.linalg_eig, .*: use --format torch-expo"),
        (Branching, {}, r"torch\.export cannot capture Branching: "),
        (
            Encoder,
            {"normalize": True},
            r"--normalize: how images are normalised for Encoder is not",
        ),
    ],
)
def test_what_cannot_be_exported(
    tmp_path: Path, model: type[nn.Module], choice: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        export_network(Source.of(model(), size=16), tmp_path / "net.onnx", Choice(**choice))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "net.pt2"

    def prove(plain: nn.Module, network: nn.Module, inside: Any) -> Proof:
        target.write_text("mine")
        return noise_proof(source, choice)(plain, network, inside)

    source, choice = Source.of(Encoder(), size=16), Choice(format="torch-export")
    with pytest.raises(UserError, match=r"net\.pt2 exists: --force replaces it"):
        export_network(source, target, choice, prove=prove)
    assert target.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"format": "onx"}, "there is no format 'onx': choose onnx, torch-export, timm, hf"),
        ({"format": "hf", "opset": 18}, "an opset is of ONNX files, --format hf has none"),
        ({"format": "hf", "fuse": True}, "--fuse changes the computation, and --format hf holds"),
        ({"format": "timm", "normalize": True}, "--normalize changes the computation, and"),
    ],
)
def test_choices_that_exclude_each_other(choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Choice(**choice)
    assert str(error.value).startswith(sentence)


def test_files_that_are_no_exports(tmp_path: Path, monkeypatch: Any) -> None:
    import onnx

    def saved(shape: list[int], name: str) -> Path:
        kind = onnx.TensorProto.FLOAT
        ends = [onnx.helper.make_tensor_value_info(end, kind, shape) for end in ("x", "y")]
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
        opset = [onnx.helper.make_opsetid("", 20)]
        onnx.save(
            onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / name
        )
        return tmp_path / name

    (tmp_path / "cut.onnx").write_bytes(saved([1, 3, 8, 8], "foreign.onnx").read_bytes()[:-9])
    (tmp_path / "text.onnx").write_text("no network")
    for name, sentence in (
        ("cut.onnx", "damaged, or not an ONNX file"),
        ("text.onnx", "damaged, or not an ONNX file"),
        ("none.onnx", "no such file"),
    ):
        with pytest.raises(UserError, match=sentence):
            OnnxFile.open(tmp_path / name)
    with pytest.raises(UserError, match=r"foreign\.onnx was not written by fastkd export"):
        _ = OnnxFile.open(tmp_path / "foreign.onnx").facts
    with pytest.raises(UserError, match=r"expected one input \[N, 3, H, W\] in fp32, it takes x"):
        OnnxFile.open(saved([1, 3], "flat.onnx"))
    with pytest.raises(UserError, match=r"\[N, 3, H, W\] in fp32, it takes x .* \[1, 1, 8, 8\]$"):
        OnnxFile.open(saved([1, 1, 8, 8], "grey.onnx"))
    with pytest.raises(UserError, match=r"takes images of 8x8 pixels, these have 9x8: export"):
        OnnxFile.open(tmp_path / "foreign.onnx").run(torch.zeros(1, 3, 9, 8))
    for path in (tmp_path / "text.onnx", tmp_path / "foreign.onnx"):
        with pytest.raises(UserError, match=r"damaged, or not a file of torch\.export"):
            read_program(path)

    def missing(name: str, *_: Any) -> None:
        return None

    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", missing)
    with pytest.raises(UserError, match=r"need onnx and onnxscript and onnxruntime: install them"):
        onnx_file.check_packages()
    with pytest.raises(UserError, match=r"need onnxruntime: install them by `pip install 'fastkd"):
        OnnxFile.open(tmp_path / "foreign.onnx")


def test_the_meter() -> None:
    meter = Meter(classes=True)
    meter.add(torch.tensor([[8.0, 0], [2, 1.5]]), torch.tensor([[8.0, 0.4], [1, 1.5]]))
    meter.add(torch.tensor([[0.0, 1]]), torch.tensor([[0.0, 1]]))
    found = meter.result()
    assert (found.images, found.unequal) == (3, 1)
    assert found.max_difference == pytest.approx(1 / 8)
    assert found.mean_difference == pytest.approx(1.4 / 6 / 8)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.widest_tie == pytest.approx(0.5 / 8)
    assert found.problem(0.2) is None
    assert "differ from the network's by up to 1.2e-01" in str(found.problem(0.1))
    # Of numbers that are equal enough, another class is a tie only within the bound.
    close = Meter(classes=True)
    close.add(torch.tensor([[1.0, 0.95]]), torch.tensor([[0.96, 0.99]]))
    assert "of which one is no tie" in str(close.result().problem(0.045))
    broken = Meter(classes=True)
    broken.add(torch.ones(2, 2), torch.tensor([[float("nan"), 1], [1, 1]]))
    broken.add(torch.ones(2, 2), torch.ones(2, 2))
    assert broken.result().problem(0.1)
