"""The run folder survives crashes and full disks; console and curves say what they were told."""

import errno
import io
import json
import os
import re
import signal
import time

import pytest
from rich.console import Console as RichConsole

from fastkd.compute.machine import environment
from fastkd.errors import RunFailed, UserError
from fastkd.output import console as console_module
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder, find_resumable
from fastkd.output.table import comparison_table
from fastkd.report.plots import plot_curves
from fastkd.storage.atomic import atomic_path

DIGEST = "0123456789abcdef"


def create(root, name="quickstart", digest=DIGEST, **options):
    return RunFolder.create(root, name, digest, **options)


def test_a_folder_is_named_by_recipe_time_and_digest(tmp_path):
    folder = create(tmp_path, "cifar10/resnet56--resnet20/kd")
    assert folder.path.parent == tmp_path / "cifar10/resnet56--resnet20/kd"
    assert re.fullmatch(r"\d{8}T\d{6}Z-01234567", folder.path.name)


def test_folders_of_one_second_differ_and_sort_by_age(tmp_path):
    names = [create(tmp_path).path.name for _ in range(3)]
    assert names == sorted(set(names))


def test_out_is_taken_as_it_is_and_must_be_empty(tmp_path):
    assert create(tmp_path, out=tmp_path / "mine").path == tmp_path / "mine"
    assert create(tmp_path, out=tmp_path / "mine").path == tmp_path / "mine"
    (tmp_path / "mine" / "last.pt").touch()
    with pytest.raises(UserError, match=r"mine exists and is not empty: resume it with --resume"):
        create(tmp_path, out=tmp_path / "mine")


def test_an_impossible_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made: File exists; choose another"):
        create(tmp_path, out=tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot be made: Not a directory"):
        create(tmp_path / "file")


def test_open_takes_run_folders_only(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        RunFolder.open(tmp_path / "none")
    (tmp_path / "cat.png").touch()
    with pytest.raises(UserError, match=r"is not a run folder: it has none of config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert RunFolder.open(tmp_path).path == tmp_path


def test_the_newest_unfinished_run_of_the_same_digest_is_resumed(tmp_path):
    old, new, finished = (create(tmp_path) for _ in range(3))
    create(tmp_path, digest="fedcba9876543210")
    create(tmp_path, "other")
    finished.finish({})
    assert find_resumable(tmp_path, "quickstart", DIGEST) == new
    new.finish({})
    assert find_resumable(tmp_path, "quickstart", DIGEST) == old
    old.finish({})
    assert find_resumable(tmp_path, "quickstart", DIGEST) is None
    assert find_resumable(tmp_path, "never run", DIGEST) is None


def test_json_is_valid_whatever_the_values(tmp_path):
    folder = create(tmp_path)
    folder.write_json("x.json", {"nan": float("nan"), "path": tmp_path, "list": [1, (2.5, None)]})
    text = (folder.path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None,
        "path": str(tmp_path),
        "list": [1, [2.5, None]],
    }


def test_metrics_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    folder = create(tmp_path)
    for epoch in (1, 2, 3):
        folder.append_metrics({"epoch": epoch, "val_accuracy": epoch / 10})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "val_acc')
    assert [row["epoch"] for row in folder.metrics()] == [1, 2, 3]
    folder.append_metrics({"epoch": 4, "val_accuracy": 0.5})
    assert [row["val_accuracy"] for row in folder.metrics()] == [0.1, 0.2, 0.3, 0.5]
    folder.set_metrics([{"epoch": 1, "val_accuracy": 0.1}])
    assert [row["val_accuracy"] for row in folder.metrics()] == [0.1]
    folder.set_metrics(())
    assert folder.metrics() == []


def test_a_finished_run_has_its_metrics_as_csv(tmp_path):
    folder = create(tmp_path)
    assert folder.summary() is None
    folder.append_metrics({"epoch": 1, "loss": 0.5})
    folder.append_metrics({"epoch": 2, "loss": float("inf"), "val_accuracy": 0.25})
    folder.finish({"accuracy_last": 0.25})
    assert (folder.path / "metrics.csv").read_text() == (
        "epoch,loss,val_accuracy\n1,0.5,\n2,,0.25\n"
    )
    assert folder.summary() == {"accuracy_last": 0.25}


def test_writing_is_all_or_nothing(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("before")

    def interrupted():
        with atomic_path(target) as beside:
            beside.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["x.txt"]
    with atomic_path(target) as beside:
        beside.write_text("after")
    assert target.read_text() == "after"


def test_a_kill_inside_a_write_leaves_the_old_file(program, tmp_path):
    folder = create(tmp_path, out=tmp_path / "run")
    folder.write_text("summary.json", '{"old": true}')
    code = (
        "import os, sys, signal; from fastkd.output import run_folder\n"
        "folder = run_folder.RunFolder(run_folder.Path(sys.argv[1]))\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder.write_json('summary.json', {'new': True})\n"
    )
    program("-c", code, folder.path, code=-signal.SIGKILL, timeout=60)
    assert folder.summary() == {"old": True}
    folder.write_json("summary.json", {"new": True})
    assert os.listdir(folder.path) == ["summary.json"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(
            lambda folder, root: folder.write_json("summary.json", {"new": True}), id="json"
        ),
        pytest.param(lambda folder, root: folder.append_metrics({"epoch": 1}), id="metrics"),
        pytest.param(lambda folder, root: create(root / "more"), id="create"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, write):
    folder = create(tmp_path)
    folder.write_text("summary.json", '{"old": true}')
    monkeypatch.setattr(os, "fsync", full_disk)
    monkeypatch.setattr(os, "mkdir", full_disk)
    with pytest.raises(RunFailed, match=r"^no space left on the disk: \S+ could not be written$"):
        write(folder, tmp_path)
    assert folder.summary() == {"old": True}
    assert not list(folder.path.glob(".*"))


def test_the_environment_names_machine_and_versions():
    found = environment()
    assert {"fastkd", "torch", "triton", "cpu", "gpus", "threads", "kernels"} <= set(found)
    assert found["cpu"]["cores"] >= 1
    json.dumps(found, allow_nan=False)


def progress(console, epoch, step, **options):
    console.progress(
        epoch=epoch,
        epochs=2,
        step=step,
        steps=10,
        images_per_s=1234.5,
        data_wait=0.02,
        loss=1.5,
        **options,
    )


def row(epoch, **more):
    return {
        "epoch": epoch,
        "train_loss": 0.5,
        "val_accuracy": 0.912,
        "images_per_s": 1234.5,
        "data_wait": 0.02,
        "skipped": 0,
    } | more


def test_without_a_terminal_there_is_one_plain_line_per_epoch():
    out = io.StringIO()
    with Console(file=out) as console:
        console.stage("teacher")
        for step in (0, 5, 10):
            progress(console, 0, step)
        console.epoch(row(1), 2)
        console.epoch(row(2, val_accuracy=None, skipped=3), 2)
    first, second = out.getvalue().splitlines()
    assert re.sub(r"  \d+:\d\d left$", "  LEFT", first) == (
        "teacher  epoch 1/2  loss 0.5000  accuracy 91.20%  1,234 images/s  data wait 2%  LEFT"
    ).replace("1,234 images/s", "images/s 1,234")
    assert second == (
        "teacher  epoch 2/2  loss 0.5000  images/s 1,234  data wait 2%  skipped steps 3"
    )


def test_a_terminal_gets_one_live_line_and_its_cursor_back():
    out = io.StringIO()
    with Console(file=out, live=True) as console:
        console.stage("student alone")
        progress(console, 0, 0)
        progress(console, 0, 5)
        console.epoch(row(1), 2)
    text = out.getvalue()
    assert "student" in text
    assert "epoch 1/2  1,234 images/s  loss 1.500" in text
    assert "91.20%" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_last_epoch_leaves_a_line_on_a_terminal():
    out = io.StringIO()
    with Console(file=out, live=True) as console:
        progress(console, 1, 10)
        console.epoch(row(2), 2)
    assert "epoch 2/2  loss 0.5000  accuracy 91.20%" in out.getvalue()


def test_time_left_is_measured_from_where_a_resumed_run_began(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = console_module._Clock()
    assert clock.left_s(0.5) is None
    now[0] = 30.0
    assert clock.left_s(0.75) == pytest.approx(30.0)
    assert clock.left_s(0.1) is None  # the next stage began


def test_other_ranks_are_silent():
    out = io.StringIO()
    console = Console(enabled=False, file=out)
    console.note("x")
    progress(console, 0, 5)
    console.epoch(row(2), 2)
    console.facts("title", {"a": 1})
    console.comparison([{"run": "x"}])
    assert out.getvalue() == ""


def test_brackets_in_a_message_are_no_markup():
    out = io.StringIO()
    Console(file=out).note("install fastkd[dali]; see [bold]")
    assert out.getvalue() == "install fastkd[dali]; see [bold]\n"


def test_facts_are_aligned_and_readable():
    out = io.StringIO()
    Console(file=out).facts(
        "dry run",
        {"train_images": 50000, "shapes": {"x": (64, 3, 32, 32)}, "seconds": 0.12345, "ema": None},
    )
    assert out.getvalue().splitlines() == [
        "dry run",
        "  train images  50,000",
        "  shapes: x     64 x 3 x 32 x 32",
        "  seconds       0.1235",
        "  ema           -",
    ]


TABLE_ROWS = [
    {"run": "teacher wrn_16_2", "accuracy": 0.985, "params": 691674, "macs": 101_000_000},
    {
        "run": "student alone",
        "accuracy_last": 0.912,
        "accuracy_best": 0.9145,
        "params": 5130,
        "macs": 812_345,
        "images_per_s": 8123.4,
        "note": "best lr of 0.02, 0.05, 0.1: 0.05",
    },
    {
        "run": "student distilled",
        "accuracy_last": 0.94,
        "accuracy_best": 0.9409,
        "params": 5130,
        "macs": 812_345,
        "images_per_s": 7012.9,
        "note": "lr 0.05",
    },
]


def test_the_comparison_fits_80_columns_with_all_its_numbers():
    out = io.StringIO()
    RichConsole(file=out, width=80).print(comparison_table(TABLE_ROWS))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = out.getvalue()
    for number in ("98.50%", "91.20%", "91.45%", "94.09%", "692 k", "5.13 k", "101 M", "8,123"):
        assert number in text
    assert "…" not in text


def test_curves_become_a_png_without_touching_matplotlib_s_state(tmp_path):
    import matplotlib

    # Reading rcParams["backend"] would choose one.
    backend = matplotlib.rcParams._get("backend")
    history = [{"epoch": e, "val_accuracy": e / 10, "train_loss": 1 / e} for e in (1, 2, 3)]
    history[1] = history[1] | {"val_accuracy": None}
    plot_curves(tmp_path / "curves.png", {"teacher": history, "short": history[:1], "empty": []})
    image = (tmp_path / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert matplotlib.rcParams._get("backend") is backend

    from PIL import Image

    picture = Image.open(tmp_path / "curves.png").convert("RGB")
    assert picture.size == (1500, 750)
    colours = {colour for _, colour in picture.getcolors(maxcolors=10**6)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_the_legend_covers_no_curve_and_the_teacher_has_a_line(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), real(f, *a, **k)))
    history = [{"epoch": e, "val_accuracy": e / 10, "train_loss": 1 / e} for e in (1, 2, 3)]
    runs = {"student alone": history, "student distilled S(4)": history}
    levels = {"teacher torchvision:resnet34": 0.86}
    plot_curves(tmp_path / "curves.png", runs, title="quickstart (run)", teachers=levels)
    (figure,) = figures
    assert figure.get_suptitle() == "quickstart (run)"
    lines = {line.get_label(): set(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["teacher torchvision:resnet34  86.0%"] == {0.86}
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert legend.y0 >= 0 and legend.x1 <= figure.bbox.x1


def test_the_quickstarts_table_fits_into_80_columns() -> None:
    row = {"accuracy_last": 0.9552, "accuracy_best": 0.9559, "params": 5210, "macs": 216e3}
    rows = [
        {"run": "teacher wrn_16_2", **row, "images_per_s": 1043.0},
        {"run": "student alone", **row, "images_per_s": 13781.0, "note": "lr 0.4, best of 3"},
    ]
    out = io.StringIO()
    console = Console(file=out)
    console.comparison(rows)
    (line,) = (text for text in out.getvalue().splitlines() if text.startswith("student alone"))
    assert line.endswith("lr 0.4, best of 3")
    assert max(map(len, out.getvalue().splitlines())) <= 80
