"""`fastkd export` and `fastkd eval FILE.onnx`, on runs and on weight files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import fastkd.data.sources.synthetic
from fastkd.deploy.onnx_file import OnnxFile
from fastkd.models import create_model, model_from_file
from fastkd.storage.weights import save_weights

DATA = Path(os.environ.get("FASTKD_TEST_DATA", "nowhere"))
KEYS = """
    name=tiny teacher=null losses.kd=null losses.ce.weight=1 baseline.lrs=
    student.name=resnet8 student.width=0.25 batch_size=50 epochs=1 device=cpu compile=off
    precision=fp32 optim.schedule=constant
"""
ALONE = KEYS.split()
SYNTHETIC = ["data.name=synthetic", "data.train_limit=100", "data.image_size=16"]


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch: Any) -> None:
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)


def shown(said: Any) -> str:
    """What a command printed, with single spaces."""
    assert said.code == 0, said.err
    return " ".join(said.out.split())


def folder(root: Path) -> None:
    """Two classes of six and of three validation pictures, each of several sizes."""
    for split, number in (("train", 4), ("val", 9)):
        for index in range(number):
            kind = "red" if index % 3 else "blue"
            place = root / split / kind
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.effect_noise((30 + 4 * index, 40), 60).convert("RGB")
            picture.save(place / f"{index}.png")


def test_a_run_becomes_a_file_that_is_evaluated(command: Any, tmp_path: Path) -> None:
    assert command("train", *ALONE, *SYNTHETIC, "out=one").code == 0
    said = shown(command("export", "one", "--out", "one.onnx", "--dynamic-batch"))
    assert said.startswith("wrote one.onnx compared on 50 validation images of synthetic max")
    assert " same top-1 100.00% " in said
    run, file = command("eval", "one"), command("eval", "one.onnx")
    assert (file.code, file.err) == (0, "")
    told = [dict(line.split(maxsplit=1) for line in s.out.splitlines()[1:]) for s in (run, file)]
    assert told[1].pop("by") == "onnxruntime"
    assert float(told[0].pop("loss")) == pytest.approx(float(told[1].pop("loss")), rel=1e-3)
    assert told[0] == told[1]

    said = command("export", "one", "--out", "one.onnx")
    assert said.code == 2
    assert said.err == "fastkd: one.onnx exists: --force replaces it, or choose another --out\n"
    said = command("eval", "one.onnx", "data.image_size=32")
    assert said.code == 2
    assert "takes images of 16x16 pixels, these have 32x32: export it for that" in said.err
    said = command("eval", "one.onnx", "student.width=0.5")
    assert "the network of one.onnx is in its files, and is evaluated as it is: leave" in said.err
    said = command("eval", "one.onnx", "--weights", "one")
    assert "one.onnx holds its weights: leave out --weights" in said.err

    said = command("export", "one", "--out", "two.onnx", "student.width=0.5")
    assert said.code == 2
    assert "the network of one is in its files, and is exported as it is: leave out stu" in said.err

    # A part of the images, spread over all.
    said = command("export", "one", "--format", "hf", "--out", "hub", "--check", "3")
    assert "compared on 32 validation images of synthetic" in shown(said)
    assert 'model = fastkd.models.model_from_file("hub")\n' in said.out
    card = (tmp_path / "hub/README.md").read_text()
    assert "- **Recipe:** tiny, digest " in card
    assert "- **Exported by:** `fastkd export one --format hf --out hub`" in card
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert f"- **Metrics:** accuracy {summary['accuracy_best']:.4f}" in card
    # The weights as they were, in the way the run sees pictures.
    kept, own = model_from_file(tmp_path / "hub"), model_from_file(tmp_path / "one")
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name])


def test_images_that_are_elsewhere(command: Any, tmp_path: Path) -> None:
    folder(tmp_path / "pictures")
    words = [*ALONE, "data.name=folder", "data.root=pictures"]
    said = command("train", *words, "data.image_size=16", "batch_size=4", "out=one")
    assert said.code == 0, said.err
    (tmp_path / "pictures").rename(tmp_path / "moved")
    said = command("export", "one", "--format", "hf", "--out", "noise")
    assert "note: the images of the run cannot be opened here (" in shown(said)
    assert "compared on 16 images of noise" in shown(said)
    said = command("export", "one", "--format", "hf", "--out", "hub", "data.root=moved")
    assert "compared on 9 validation images of folder" in shown(said)
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["label_names"] == ["blue", "red"]
    # Where they lie on this machine is not for the card.
    assert "moved" not in (tmp_path / "hub/README.md").read_text()
    # Named images must be there.
    said = command("export", "one", "--format", "hf", "--out", "x", "data.root=nowhere")
    assert said.code == 2
    assert "nowhere" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "moved", "noise", "one"]


def test_a_network_by_name_with_its_weights(command: Any, tmp_path: Path) -> None:
    # Of another program, which says nothing about its classes.
    torch.save(create_model("resnet8", 7, width=0.5).state_dict(), tmp_path / "net.pt")
    words = ["export", "resnet8", "--weights", "net.pt", "student.width=0.5", "--format", "hf"]
    said = command(*words, "--out", "noise")
    assert "no images are named (data.name=.. data.root=..): compared on noise" in shown(said)
    config = json.loads((tmp_path / "noise/config.json").read_text())
    assert (config["num_classes"], config["options"]) == (7, {"width": 0.5})
    said = command(*words, "data.name=digits", "--out", "digits")
    assert said.code == 2
    assert "the network resnet8 knows 7 classes, digits has 10" in said.err
    assert not (tmp_path / "digits").exists()
    both = {
        name: create_model("resnet8", number).state_dict() for name, number in (("a", 2), ("b", 3))
    }
    torch.save(both, tmp_path / "two.pt")
    words = ["export", "resnet8", "--weights", "two.pt", "student.weights_key=b", "--format", "hf"]
    assert "wrote two" in shown(command(*words, "--out", "two"))
    assert json.loads((tmp_path / "two/config.json").read_text())["num_classes"] == 3
    save_weights(tmp_path / "ten.safetensors", create_model("resnet8", 10))
    words = ["export", "resnet8", "--weights", "ten.safetensors", "--format", "hf", "--out", "ten"]
    said = command(*words, "data.name=digits", "--check", "all")
    assert "1,497 validation images of digits" in shown(said)


def test_the_weights_that_are_exported_stay(command: Any, tmp_path: Path) -> None:
    save_weights(tmp_path / "one.safetensors", create_model("resnet8", 3))
    (tmp_path / "hub").mkdir()
    save_weights(tmp_path / "hub/model.safetensors", create_model("resnet8", 3))
    before = [file.read_bytes() for file in sorted(tmp_path.rglob("*.safetensors"))]
    for weights, kind in (("one.safetensors", "torch-export"), ("hub", "hf")):
        words = ["--weights", weights, "--format", kind, "--out", weights, "--force"]
        said = command("export", "resnet8", *words)
        assert said.code == 2
        assert said.err.startswith(f"fastkd: --out {weights} holds the weights that are exported")
    assert [file.read_bytes() for file in sorted(tmp_path.rglob("*.safetensors"))] == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["resnet8", "--out", "x"], "resnet8 is not a run folder (no config.yaml); a network by n"),
        (["one", "--out", "x"], "one has no best.safetensors yet: nothing was evaluated so far"),
        (["one", "--out", "no/x"], "--out no/x: there is no folder no"),
        (["one"], "the following arguments are required: --out. See `fastkd export --help`"),
        (["one", "--out", "x", "--format", "tflite"], "there is no format 'tflite': choose onnx, "),
        (["one", "--out", "x", "--check", "few"], "--check few: expected a number of images, or "),
    ],
)
def test_wrong_requests(command: Any, tmp_path: Path, words: list[str], sentence: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.yaml").write_text(yaml.safe_dump({"name": "x"}))
    said = command("export", *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"fastkd: {sentence}")
    assert said.err.count("\n") == 1


def test_eval_wants_a_file_of_its_own(command: Any, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("no network")
    said = command("eval", "x.onnx", "data.name=digits")
    assert said.code == 2
    assert said.err.startswith("fastkd: x.onnx: damaged, or not an ONNX file")


@pytest.mark.matrix
@pytest.mark.skipif(not (DATA / "camvid").is_dir(), reason="FASTKD_TEST_DATA has no camvid/")
def test_a_run_on_label_maps(command: Any, tmp_path: Path) -> None:
    small = ["data.image_size=48", "data.train_limit=12", "epochs=1", "device=cpu", "out=one"]
    root = f"data.root={DATA / 'camvid'}"
    said = command("train", "camvid/erfnet-G:N", root, *small, "baseline.lrs=", "precision=fp32")
    assert said.code == 0, said.err
    said = shown(command("export", "one", "--out", "one.onnx", "--check", "all"))
    assert " validation images of camvid " in said
    assert " mIoU of the file " in said
    opened = OnnxFile.open("one.onnx")
    assert opened.shape == (1, 3, None, None)
    assert (opened.metadata["answers"], opened.metadata["multiple"]) == ("pixels", "8")
    told = [shown(command("eval", *words)) for words in (["one"], ["one.onnx", root])]
    run, file = (one.partition(" miou ")[2].partition(" loss ")[0] for one in told)
    assert run == file != ""
