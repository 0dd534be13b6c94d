"""`fastkd predict` with a classifier: the rows are the evaluation's answers; one sentence each."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import fastkd
import fastkd.data.sources.synthetic
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.models.card import card_of
from fastkd.models.registry import model_from_file
from fastkd.runs.predict import _best, images_among
from fastkd.runs.saved_network import Seen, label_map_of
from fastkd.testing.recipes import TINY

WORDS = [*TINY, "student.name=resnet8", "teacher=null", "losses.kd=null", "losses.ce.weight=1"]


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """A finished run, and its validation images as files in photos/, the first in a folder."""
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 20)
    assert command("train", *WORDS, "baseline.lrs=", "out=run").code == 0
    val = make_synthetic("val", card_of(model_from_file(tmp_path / "run")).data.image_size)
    (tmp_path / "photos" / "first").mkdir(parents=True)
    for number in range(len(val)):
        place = tmp_path / "photos" / ("first" if number < 3 else "")
        val.image(number).save(place / f"{number:02}.png")
    return val


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_classifier_says_class_and_probability(command, run, tmp_path):
    said = command("predict", "run", "photos", "--out", "out")
    assert (said.code, said.out) == (0, "20 rows in predictions.csv: out\n")
    rows = rows_in(tmp_path / "out" / "predictions.csv")
    names = ["file", "class", "probability"]
    names += [f"{name}_{place}" for place in range(2, 6) for name in ("class", "probability")]
    assert list(rows[0]) == names
    assert [row["file"] for row in rows][-1] == "photos/first/02.png"
    found = {row["file"][-6:-4]: row for row in rows}
    model = model_from_file(tmp_path / "run").eval()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in card_of(model).normalization)
    for number in range(20):
        pixels = torch.from_numpy(run.images_NHWC[number].copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            shares = model(((pixels - mean) / std)[None]).double().softmax(1)[0]
        row = found[f"{number:02}"]
        value, best = shares.max(0)
        assert row["class"] == f"class{best}"
        assert float(row["probability"]) == pytest.approx(value.item(), abs=2e-4)
        listed = [float(row[name]) for name in names if name.startswith("prob")]
        assert listed == sorted(listed, reverse=True)


def test_pictures_of_any_size_are_shown_as_the_run_shows_them(command, run, tmp_path):
    picture = run.image(5)
    side = picture.width
    # The same square, three times as large, between what the framing cuts off.
    wide = Image.new("RGB", (5 * side, 3 * side), (255, 0, 0))
    wide.paste(picture.resize((3 * side, 3 * side), Image.Resampling.NEAREST), (side, 0))
    wide.save(tmp_path / "wide.png")
    command("predict", "run", "wide.png", "photos/05.png", "--out", "out")
    one, other = rows_in(tmp_path / "out" / "predictions.csv")
    assert one["class"] == other["class"]
    assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-3)


def test_one_that_cannot_be_read_is_named_after_all_others(command, run, tmp_path):
    (tmp_path / "photos" / "00.jpg").write_bytes(b"no picture")
    said = command("predict", "run", "photos", "--out", "out")
    assert said.code == 2
    assert "fastkd: 1 of 21 images could not be read, 20 were predicted: cannot decode" in said.err
    assert "photos/00.jpg" in said.err
    assert len(rows_in(tmp_path / "out" / "predictions.csv")) == 20


def test_what_is_wrong_is_one_sentence(command, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    for words, sentence in [
        (["run", "--out", "out"], "name the images: fastkd predict RUN IMAGE.. --out DIR, or"),
        (["run", "empty", "--out", "out"], "no image found in empty: expected files such as .jpg"),
        (["run", "nothing.jpg", "--out", "out"], "there is no file or folder nothing.jpg"),
        (["photos", "photos", "--out", "out"], "photos is not a run folder: it has no config.yaml"),
        (["begun", "photos", "--out", "out"], "begun has no best.safetensors yet: it has not been"),
        (["run", "photos", "--out", "run/config.yaml"], "--out run/config.yaml is a file: name a"),
        (["run", "photos"], "the following arguments are required: --out. See `fastkd predict -"),
        (["run", "photos", "--out", "out", "--top", "3"], "there is no option --top"),
    ]:
        said = command("predict", *words)
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith(f"fastkd: {sentence}"), said.err
        assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_of_distill_is_predicted_in_its_script(command, tmp_path):
    images = torch.randn(8, 3, 8, 8)
    loader = [(images, torch.arange(8) % 4)]
    student = fastkd.create_model("resnet8", 4)
    losses = [fastkd.losses.CrossEntropy()]
    quiet = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
    fastkd.distill(student, None, loader, loader, epochs=1, losses=losses, out="own", **quiet)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    said = command("predict", "own", "one.png", "--out", "out", "data.mean=0.5,0.5,0.5")
    assert said.code == 2
    told = "own is a run of fastkd.distill, and how its images are made is in the script that made"
    assert told in said.err and "say it here, data.image_size=.. data.std=.." in said.err


def test_or_with_keys_that_say_how_its_images_were_made(command, tmp_path):
    val = make_synthetic("val", 12)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = torch.from_numpy(val.images_NHWC[:6].copy()).permute(0, 3, 1, 2) / 255
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    loader = [(images, torch.arange(6) % 4)]
    quiet = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
    losses = [fastkd.losses.CrossEntropy()]
    student = fastkd.create_model("resnet8", 4)
    result = fastkd.distill(
        student, None, loader, loader, epochs=1, losses=losses, out="o", **quiet
    )
    for number in range(6):
        val.image(number).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(6)]
    keys = [f"data.{key}={','.join(map(str, v))}" for key, v in (("mean", mean), ("std", std))]
    said = command("predict", "o", *names, *keys, "data.image_size=12", "--out", "out")
    assert (said.code, said.out) == (0, "6 rows in predictions.csv: out\n"), said.err
    shares = result.predict(loader, best=True, probabilities=True)
    rows = rows_in(tmp_path / "out" / "predictions.csv")
    assert [row["class"] for row in rows] == [str(one) for one in shares.argmax(1).tolist()]
    found = [float(row["probability"]) for row in rows]
    assert found == pytest.approx(shares.max(1).values.tolist(), abs=5e-3)  # the command: in bf16


def test_keys_of_a_recipes_run_are_in_its_files(command, run):
    said = command("predict", "run", "photos", "data.image_size=9", "--out", "out")
    assert said.code == 2
    assert (
        said.err
        == "fastkd: how pictures are shown is in the files of run: leave out data.imag"
        + ("e_size=9\n")
    )


def test_images_are_found_once_and_predictions_among_them_are_not(tmp_path):
    for name in ("b/2.png", "a.JPG", ".hidden.png", "b/.cache/3.png", "out/a.png", "notes.txt"):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")
    found = images_among([str(tmp_path), str(tmp_path / "a.JPG")], besides=tmp_path / "out")
    names = sorted(str(path.relative_to(tmp_path)) for path in found)
    assert names == ["a.JPG", "b/2.png"]
    assert {str(name) for name in found.values()} == {"a.JPG", "b/2.png"}
    assert len(images_among([str(tmp_path)])) == 3


def test_several_labels_are_judged_one_by_one():
    shares_C = torch.tensor([0.1, 0.9, 0.8])
    assert _best(shares_C, ("a", "b", "c")) == {
        "class": "b",
        "probability": "0.900000",
        "class_2": "c",
        "probability_2": "0.800000",
        "class_3": "a",
        "probability_3": "0.100000",
    }


def test_the_best_class_is_found_class_by_class():
    logits = torch.randn(1, 21, 6, 7)
    seen = Seen(np.zeros((48, 56, 3), np.uint8), (45, 50))
    whole = torch.nn.functional.interpolate(logits, (48, 56), mode="bilinear")[:, :, :45, :50]
    large = torch.nn.functional.interpolate(whole, (90, 101), mode="bilinear")
    found = label_map_of(logits, seen, (90, 101))
    assert found.dtype == np.uint8
    assert np.array_equal(found, large[0].argmax(0).numpy())
