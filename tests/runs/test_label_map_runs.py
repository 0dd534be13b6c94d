"""Runs on label maps from end to end: what is measured, kept, drawn and predicted."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastkd.errors import RunFailed
from fastkd.evaluation.confusion import confused, of_confusion
from fastkd.models.card import card_of
from fastkd.models.registry import model_from_file

CLASSES = ("sky", "road", "car")
PALETTE = [(70, 130, 180), (128, 64, 128), (0, 0, 142)]
HEIGHT, WIDTH = 32, 48
TRAIN = [
    "quickstart",
    "data.name=pairs",
    "data.root=streets",
    "augment.crop=none",
    "augment.flip=true",
    "student.name=erfnet",
    "student.width=null",
    "student.block=G:N",
    "teacher.name=erfnet",
    "teacher.epochs=2",
    "teacher.min_accuracy=0",
    "batch_size=4",
    "epochs=2",
    "optim.lr=0.05",
    "baseline.lrs=0.01,0.05",
    "device=cpu",
    "compile=off",
]


def street(seed, height=HEIGHT, width=WIDTH):
    """A picture whose colours show the class, and its label map; 255 at the upper edge."""
    generator = np.random.default_rng(seed)
    labels_HW = np.zeros((height, width), np.uint8)
    labels_HW[height // 2 :] = 1
    left = int(generator.integers(0, width - 12))
    labels_HW[height // 2 : height // 2 + 8, left : left + 12] = 2
    pixels = np.array([(60, 120, 220), (90, 90, 90), (200, 30, 30)])[labels_HW]
    pixels = np.clip(pixels + generator.integers(-30, 31, pixels.shape), 0, 255).astype(np.uint8)
    labels_HW[:2] = 255
    return Image.fromarray(pixels), labels_HW


@pytest.fixture
def streets(tmp_path):
    """Twelve pictures to learn from and five to judge by, in the layout of data.name=pairs."""
    root = tmp_path / "streets"
    for split, first, num in (("train", 0, 12), ("val", 100, 5)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in range(first, first + num):
            picture, labels_HW = street(number)
            picture.save(root / "images" / split / f"{number}.png")
            Image.fromarray(labels_HW).save(root / "labels" / split / f"{number}.png")
    lines = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(CLASSES, PALETTE, strict=True)]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    return root


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def by_hand(run, picture, size=None):
    """What the best weights answer at the picture's own size."""
    model = model_from_file(run).eval()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in card_of(model).normalization)
    shown = picture if size is None else picture.resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
    image = ((pixels - mean) / std)[None]
    below, right = -shown.height % 8, -shown.width % 8
    black = ((torch.zeros(3, 1, 1) - mean) / std)[None]
    padded = black.expand(1, 3, shown.height + below, shown.width + right).clone()
    padded[:, :, : shown.height, : shown.width] = image
    with torch.no_grad():
        logits = model(padded)
    logits = F.interpolate(logits, padded.shape[2:], mode="bilinear")
    inside = logits[:, :, : shown.height, : shown.width]
    return F.interpolate(inside, (picture.height, picture.width), mode="bilinear")[0].argmax(0)


def test_a_run_on_label_maps_is_told_by_miou_from_end_to_end(command, streets, tmp_path):
    said = command("train", *TRAIN, "out=run")
    assert said.code == 0, said.err
    run, summary = tmp_path / "run", summary_of(tmp_path / "run")
    # The numbers: rows, best epoch, scores by name, of all three networks.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"val_miou", "val_pixel_accuracy", "val_loss"} <= set(rows[0])
    assert not [key for row in rows for key in row if "class_iou" in key]
    assert summary["miou_best"] == max(row["val_miou"] for row in rows)
    assert summary["miou_last"] == rows[-1]["val_miou"]
    for found in (summary, summary["alone"], summary["teacher"]["training"]):
        assert tuple(found["class_iou_best"]) == tuple(found["class_iou_last"]) == CLASSES
        for which in ("best", "last"):
            known = [iou for iou in found[f"class_iou_{which}"].values() if iou is not None]
            assert np.mean(known) == pytest.approx(found[f"miou_{which}"])
    assert tuple(summary["teacher"]["class_iou"]) == CLASSES
    assert summary["palette"] == [list(colour) for colour in PALETTE]
    assert "palette" not in summary["alone"]
    # The screen.
    assert "  mIoU " in said.out
    assert f"mIoU {summary['teacher']['miou']:.2%}" in said.out
    assert "\nIoU by class    alone  teacher  distilled\n" in said.out
    assert "\ncar " in said.out
    assert "\npictures run/predictions.png\n" in said.out
    with Image.open(run / "predictions.png") as drawn:
        assert drawn.width > 2000
    # What is saved is what was measured.
    again = command("eval", "run")
    assert f"\n  miou             {summary['miou_best']:.4g}\n" in again.out
    assert "class iou: car" in again.out
    table = command("table", "run")
    assert "mIoU" in table.out
    assert f"{summary['miou_last']:.2%}" in table.out


def test_label_maps_are_predicted_at_the_size_of_their_images(command, streets, tmp_path):
    words = [*TRAIN, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
    assert command("train", *words, "out=run").code == 0
    summary, run = summary_of(tmp_path / "run"), tmp_path / "run"
    said = command("predict", "run", "streets/images/val", "--out", "maps")
    assert (said.code, said.out) == (0, "5 label maps, and their classes in classes.csv: maps\n")
    counts = 0
    for path in sorted((streets / "images" / "val").iterdir()):
        with Image.open(tmp_path / "maps" / path.name) as found:
            assert (found.mode, found.size) == ("P", (WIDTH, HEIGHT))
            assert found.getpalette()[:9] == [part for colour in PALETTE for part in colour]
            map_HW = np.array(found)
        assert (map_HW == by_hand(run, Image.open(path)).numpy()).mean() > 0.995
        labels_HW = np.array(Image.open(streets / "labels" / "val" / path.name)).astype(np.int64)
        labels_HW[labels_HW == 255] = -100
        counts += confused(torch.from_numpy(map_HW.astype(np.int64)), torch.tensor(labels_HW), 3)
    # Every pixel as in the evaluation.
    truth = of_confusion(counts)
    assert truth["miou"] == pytest.approx(summary["miou_best"], abs=1e-9)
    assert truth["class_iou"] == pytest.approx([*summary["class_iou_best"].values()])
    with (tmp_path / "maps" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[2] == {"id": "2", "class": "car", "colour": "#00008e"}


def test_whatever_the_size_of_a_picture(command, streets, tmp_path):
    words = [*TRAIN, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
    words += ["data.image_size=20"]
    assert command("train", *words, "out=run").code == 0
    (tmp_path / "own" / "a").mkdir(parents=True)
    pictures = {
        "own/tall.jpg": street(1, 90, 41)[0],
        "own/a/tiny.png": street(2, 13, 30)[0],
        "own/a/grey.png": street(3, 64, 64)[0].convert("L"),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    said = command("predict", "run", "own", "--out", "own/maps")
    assert (said.code, said.err) == (0, "predicting ...\n")
    for name, picture in pictures.items():
        place = (tmp_path / "own" / "maps" / name.removeprefix("own/")).with_suffix(".png")
        with Image.open(place) as found, Image.open(tmp_path / name) as stored:
            assert found.size == picture.size
            short = min(picture.size)
            size = tuple(int(20 * side / short) for side in picture.size)
            expected = by_hand(tmp_path / "run", stored.convert("RGB"), size)
            assert (np.array(found) == expected.numpy()).mean() > 0.99
    # Once more: the maps are no images.
    assert command("predict", "run", "own", "--out", "own/maps").out.startswith("3 label maps")


def test_no_prediction_replaces_another_or_an_image(command, streets, tmp_path):
    words = [*TRAIN, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
    assert command("train", *words, "out=run", "epochs=1").code == 0
    street(1)[0].save(tmp_path / "a.png")
    street(2)[0].save(tmp_path / "a.jpg")
    said = command("predict", "run", "a.png", "a.jpg", "--out", "maps")
    assert said.code == 2
    assert "a.png and a.jpg would both become maps/a.png: predict them into" in said.err
    before = (tmp_path / "a.png").read_bytes()
    said = command("predict", "run", "a.png", "--out", ".")
    assert "the label map of a.png would replace an image: choose another --out" in said.err
    assert (tmp_path / "a.png").read_bytes() == before
    # A palette that no run has written is not believed.
    summary = summary_of(tmp_path / "run") | {"palette": [[1, 2], "red"]}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert command("predict", "run", "a.png", "--out", "maps").code == 0


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(
    command, streets, tmp_path, monkeypatch
):
    import fastkd.runs.pictures

    def fails(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(fastkd.runs.pictures, "_networks", fails)
    words = [*TRAIN, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
    said = command("train", *words, "out=run", "epochs=1")
    assert said.code == 0
    assert "no pictures: MemoryError: too large" in said.out
    assert summary_of(tmp_path / "run")["miou_last"] >= 0


def test_a_run_that_ends_before_its_summary_still_gets_its_pictures(
    command, streets, tmp_path, monkeypatch
):
    short = [key for key in TRAIN if not key.startswith(("teacher", "baseline", "epochs"))]
    short += ["teacher=null", "losses.kd=null", "losses.ce.weight=1", "epochs=1", "out=run"]
    run = tmp_path / "run"

    def fail(*_, **__):
        raise RunFailed("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("fastkd.runs.stages.finish_report", fail)
        assert "the disk is full" in command("train", *short).err
    # Whoever finds the summary finds the pictures: a finished run is not drawn again.
    assert not (run / "summary.json").exists()
    drawn = (run / "predictions.png").read_bytes()
    (run / "predictions.png").unlink()
    said = command("train", *short, "--resume", "auto")
    assert said.code == 0, said.err
    assert (run / "summary.json").exists()
    assert (run / "predictions.png").read_bytes() == drawn
