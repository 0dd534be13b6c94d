"""Trackers get every row once, whatever happened before, and none of them can stop a run."""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tracked_stores as stores

from fastkd.errors import UserError
from fastkd.output.run_folder import RunFolder
from fastkd.output.trackers import opening
from fastkd.output.trackers.opening import TRACKERS, check_trackers, tracker_names
from fastkd.output.trackers.sink import Kept, Started, TrackerName, final_numbers, scalars
from fastkd.recipe.parts import part_of
from fastkd.recipes.loading import load_recipe
from fastkd.report.labels import named_for_trackers

NAMES = get_args(TrackerName)
VALUES = {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.25}
CONFIG = {"optim.lr": 0.1, "optim.milestones": [1, 2], "teacher": None}


def row(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": VALUES[epoch], "val_accuracy": epoch / 10, "lr": 0.1}


def tracked(path: Path, *names: TrackerName) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path).tracked(names, name="tiny/kd", config=CONFIG, stage="teacher")


def kept(path: Path) -> dict[str, Any]:
    return json.loads((path / "trackers.json").read_text())


def until_the_next_second() -> None:
    """By which wandb names its folders."""
    second = time.time() // 1
    while time.time() // 1 == second:
        time.sleep(0.05)


def stopped_and_resumed(path: Path, name: TrackerName) -> str:
    """Three epochs, of which the checkpoint lacks the third one, then two more; the id."""
    first = tracked(path, name)
    first.begin_tracking([])
    for epoch in (1, 2, 3):
        first.append_metrics(row(epoch))
    first.end_tracking("stopped")
    before = kept(path)[name]
    assert before["rows"] == 3
    until_the_next_second()
    resumed = tracked(path, name)
    history = [row(1), row(2)]
    resumed.set_metrics(history)
    resumed.begin_tracking(history)
    for epoch in (3, 4):
        resumed.append_metrics(row(epoch))
    Image.new("RGB", (20, 10)).save(path / "curves.png")
    table = [{"run": "student", "accuracy_last": 0.4, "note": "lr 0.1"}]
    resumed.finish({"epochs": 4, "accuracy_best": 0.4, "history": history}, table)
    after = kept(path)[name]
    assert (after["id"], after["rows"]) == (before["id"], 4)
    return after["id"]


def test_there_is_one_list_of_names() -> None:
    assert tuple(TRACKERS) == NAMES
    assert tracker_names("wandb", "run") == ("wandb",)
    assert tracker_names(["trackio", "tensorboard"], "run") == ("tensorboard", "trackio")
    assert tracker_names((), None) == ()
    for wrong in ("neptune", ["wandb", "neptune"], 3, None):
        with pytest.raises(UserError, match="expected some of tensorboard, wandb, mlflow, trackio"):
            tracker_names(wrong, "run")


def test_a_recipe_takes_them_in_either_spelling_and_is_the_same_recipe() -> None:
    plain = load_recipe("quickstart", overrides=[])
    for words, names in {
        ("track=wandb",): ("wandb",),
        ("track=mlflow,trackio", "track_group=x"): ("mlflow", "trackio"),
        ("tensorboard=true",): ("tensorboard",),
        ("tensorboard=true", "track=wandb,tensorboard,wandb"): ("tensorboard", "wandb"),
        ("track=",): (),
    }.items():
        recipe = load_recipe("quickstart", overrides=words)
        assert recipe.trackers == names
        assert recipe.digest() == plain.digest()
    with pytest.raises(UserError, match="track"):
        load_recipe("quickstart", overrides=["track=neptune"])


def test_every_training_of_a_recipe_says_which_part_it_is() -> None:
    recipe = load_recipe("quickstart", overrides=["track=mlflow", "track_group=mine"])
    alone = recipe.without_teacher(f"{recipe.name}/alone-lr0.1", 0.1)
    parts = [(recipe.as_teacher(), "teacher"), (recipe, "student"), (alone, "alone")]
    for part, stage in parts:
        assert part_of(part.name) == stage
        assert (part.trackers, part.track_group) == (("mlflow",), "mine")
    encoder = load_recipe("camvid/erfnet", overrides=["encoder.epochs=2"]).of_encoder()
    assert encoder is not None and part_of(encoder.name) == "encoder"


def test_a_sweep_is_one_group_whose_name_comes_again() -> None:
    def sweep(*words: str) -> dict[Any, Any]:
        choices = [(f"optim.lr={lr}", "seed=1") for lr in (0.1, 0.2)]
        every = {c: load_recipe("quickstart", overrides=[*words, *c]) for c in choices}
        return named_for_trackers(every)

    (group,) = {recipe.track_group for recipe in sweep("track=wandb").values()}
    assert group.startswith("sweep quickstart optim.lr seed ")
    assert {recipe.track_group for recipe in sweep("track=wandb").values()} == {group}
    assert {r.track_group for r in sweep("track=wandb", "epochs=3").values()} != {group}
    assert {r.track_group for r in sweep("track=wandb", "track_group=me").values()} == {"me"}
    assert {r.track_group for r in sweep().values()} == {None}


def test_names_of_metrics_are_grouped_by_a_slash() -> None:
    found = scalars({"epoch": 1, "train_loss": 1.0, "val_class_x": 2, "lr": 0.1, "word": "x"})
    assert found == {"train/loss": 1.0, "val/class_x": 2, "lr": 0.1}
    summary = {"accuracy_best": 0.5, "finished": "now", "history": [], "done": True}
    assert final_numbers(summary) == {"final/accuracy_best": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_one_sentence_before_anything_is_built(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName
) -> None:
    # None in sys.modules is how Python notes that a module is not available.
    monkeypatch.setitem(sys.modules, TRACKERS[name].package, None)
    said = command("train", f"track={name}")
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        f"fastkd: track={name} needs the package {name}, which is not installed: "
        f'pip install "fastkd[{TRACKERS[name].extra}]", or leave it out\n'
    )
    assert not any(tmp_path.iterdir())


def test_nobody_logged_in_is_one_sentence(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    pytest.importorskip("trackio", reason="trackio is not installed")
    for key in [*os.environ]:
        if key.startswith(("WANDB_", "HF_")):
            monkeypatch.delenv(key)
    for key in ("HOME", "XDG_CONFIG_HOME", "HF_HOME"):
        monkeypatch.setenv(key, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    wandb.teardown()  # what it has read from the environment before
    said = command("train", "track=wandb")
    assert (said.code, said.out) == (2, "")
    assert "fastkd: track=wandb: nobody is logged in: log in with `wandb login`" in said.err
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(UserError, match="TRACKIO_SPACE_ID=me/space needs a login: log in with `hf"):
        check_trackers(["trackio"])
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"track=wandb: .*WANDB_API_KEY invalid"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_a_server_of_mlflow_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    asked = []

    def refused(client: Any, **_: Any) -> None:
        asked.append(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
        raise MlflowException("no route to host")

    monkeypatch.setattr(MlflowClient, "search_experiments", refused)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host:5000")
    with pytest.raises(UserError) as found:
        check_trackers(["mlflow"])
    assert str(found.value).startswith(
        "track=mlflow: the server of MLFLOW_TRACKING_URI=https://host:5000 cannot be used (Mlflow"
    )
    assert asked == ["0"] and "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_tensorboard_drops_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    stopped_and_resumed(tmp_path / "run", "tensorboard")
    found = stores.tensorboard_scalars(tmp_path / "run/tensorboard")
    assert found["train/loss"] == [*VALUES.items()]
    assert found["lr"] == [(epoch, pytest.approx(0.1)) for epoch in VALUES]


def test_wandb_offline_is_one_run_in_two_parts(offline: None, tmp_path: Path) -> None:
    id = stopped_and_resumed(tmp_path / "run", "wandb")
    parts = stores.wandb_parts(tmp_path / "run/wandb", 2)
    assert stores.wandb_ids(parts) == {id}
    first, second = map(stores.wandb_rows, parts)
    assert [one["epoch"] for one in first] == [1, 2, 3]
    assert [one["epoch"] for one in second] == [4]
    for one in (*first, *second):
        assert (one["step"], one["train/loss"]) == (one["epoch"], VALUES[one["epoch"]])
    run = next(r.run for r in parts[0] if r.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.project) == ("tiny/kd run", "teacher", "fastkd")
    files = {path.name.split("_")[0] for path in (tmp_path / "run/wandb").rglob("media/*/*")}
    assert files == {"curves", "table"}


def test_what_wandb_had_not_written_when_it_was_killed_is_sent_again(
    offline: None, tmp_path: Path
) -> None:
    first = tracked(tmp_path / "run", "wandb")
    first.begin_tracking([])
    for epoch in (1, 2, 3):
        first.append_metrics(row(epoch))
    first.end_tracking("stopped")
    (records,) = stores.wandb_parts(tmp_path / "run/wandb", 1)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    # The file as it was in the middle of the third row, and the record of a run under way.
    whole = file.read_bytes()
    third = [r for r in records if r.WhichOneof("record_type") == "history"][2]
    file.write_bytes(whole[: whole.index(third.SerializeToString()) + 5])
    record = kept(tmp_path / "run")
    assert record["wandb"]["open"] is False
    record["wandb"]["open"] = True
    (tmp_path / "run/trackers.json").write_text(json.dumps(record))
    until_the_next_second()
    resumed = tracked(tmp_path / "run", "wandb")
    resumed.begin_tracking([row(1), row(2), row(3)])
    resumed.append_metrics(row(4))
    resumed.finish({"epochs": 4})
    parts = [stores.wandb_records(one) for one in [file]]
    parts += stores.wandb_parts(tmp_path / "run/wandb", 2, killed=True)[1:]
    shown = [[one["epoch"] for one in stores.wandb_rows(part)] for part in parts]
    assert shown == [[1, 2], [3, 4]]


def test_wandb_says_how_an_offline_run_is_sent(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tracked(Path("my run"), "wandb")
    (said,) = folder.begin_tracking([])
    folder.append_metrics(row(1))
    folder.end_tracking("failed")
    id = kept(Path("my run"))["wandb"]["id"]
    command = f"wandb sync 'my run/wandb'/offline-run-*-{id}"
    assert said == f"wandb: offline; to send this run: {command}"
    stores.wandb_parts(Path("my run/wandb"), 1)
    listed = os.popen(f"{command.replace('sync', 'sync --dry-run')} 2>&1").read()
    assert "Would sync 1 run(s)" in listed and id in listed


def test_wandb_that_is_disabled_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    check_trackers(["wandb"])
    stopped_and_resumed(tmp_path / "run", "wandb")
    assert not [*(tmp_path / "run").rglob("*.wandb")]


def test_mlflow_continues_its_run(mlflow_uri: str, tmp_path: Path) -> None:
    id = stopped_and_resumed(tmp_path / "run", "mlflow")
    (run,) = stores.mlflow_runs(mlflow_uri).values()
    assert run.info.run_id == id
    assert (run.info.run_name, run.info.status) == ("tiny/kd run", "FINISHED")
    assert stores.mlflow_points(mlflow_uri, id, "train/loss") == [*VALUES.items()]
    assert run.data.params == {"optim.lr": "0.1", "optim.milestones": "[1, 2]", "teacher": "None"}
    assert run.data.metrics["final/accuracy_best"] == 0.4
    assert run.data.tags["fastkd.group"] == "tiny/kd run"
    assert run.data.tags["fastkd.stage"] == "teacher"
    artifacts = {path.name for path in (tmp_path / "mlruns").rglob("*") if path.is_file()}
    assert artifacts == {"curves.png", "table.md"}


def test_mlflow_takes_any_key_and_any_name(mlflow_uri: str, tmp_path: Path) -> None:
    config = {"a[0]!": 1, "k" * 300: "v" * 9000, "": 2, "é": "a\nb"}
    folder = RunFolder(tmp_path).tracked(
        ["mlflow"], name="n" * 3000, config=config, group="a\n\x1b[31m" + "g" * 9000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder.begin_tracking([])
        folder.append_metrics(row(1) | {"train_loss": float("nan")})
        folder.finish({"epochs": 1})
    assert kept(tmp_path)["mlflow"] | {"id": "", "at": ""} == {
        "id": "",
        "at": "",
        "rows": 1,
        "open": False,
    }


def test_what_mlflow_does_not_know_any_more_is_sent_again(mlflow_uri: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    first = tracked(tmp_path / "run", "mlflow")
    first.begin_tracking([])
    first.append_metrics(row(1))
    first.end_tracking("failed")
    old = kept(tmp_path / "run")["mlflow"]["id"]
    assert MlflowClient(mlflow_uri).get_run(old).info.status == "FAILED"
    MlflowClient(mlflow_uri).delete_run(old)
    resumed = tracked(tmp_path / "run", "mlflow")
    resumed.begin_tracking([row(1)])
    resumed.append_metrics(row(2))
    resumed.finish({"epochs": 2})
    new = kept(tmp_path / "run")["mlflow"]["id"]
    assert new != old
    assert stores.mlflow_points(mlflow_uri, new, "train/loss") == [(1, 3.0), (2, 2.0)]


def test_trackio_continues_its_run(trackio_folder: Path, tmp_path: Path) -> None:
    name = stopped_and_resumed(tmp_path / "run", "trackio")
    found = stores.trackio_rows(trackio_folder)
    assert found.keys() == {name}
    points = [(one["step"], one["epoch"], one["train/loss"]) for one in found[name]]
    assert points == [(epoch, epoch, value) for epoch, value in VALUES.items()]


def test_what_was_queued_in_trackio_when_a_run_was_killed_is_sent_again(
    trackio_folder: Path, tmp_path: Path
) -> None:
    first = tracked(tmp_path / "run", "trackio")
    first.begin_tracking([])
    for epoch in (1, 2):
        first.append_metrics(row(epoch))
    first.end_tracking("stopped")
    record = kept(tmp_path / "run")
    record["trackio"]["rows"] = 3
    (tmp_path / "run/trackers.json").write_text(json.dumps(record))
    resumed = tracked(tmp_path / "run", "trackio")
    resumed.begin_tracking([row(1), row(2), row(3)])
    resumed.finish({"epochs": 3})
    (rows,) = stores.trackio_rows(trackio_folder).values()
    assert [one["epoch"] for one in rows] == [1, 2, 3]


class Noting:
    """A tracker that notes what it is told, and fails where it is told to."""

    package, extra = "json", "none"
    told: list[Any]
    fails = ""

    @classmethod
    def problem(cls) -> str:
        return ""

    def __init__(self) -> None:
        type(self).told = []

    def _do(self, what: str, *more: Any) -> None:
        self.told.append((what, *more))
        if what == self.fails:
            raise ConnectionError("the network\nis gone")

    def start(self, run: Any, kept: Kept | None, rows: int) -> Started:
        self._do("start", kept and kept.rows, rows)
        return Started("id", "there", kept.rows if kept else 0, "hello")

    def row(self, row: Any) -> None:
        self._do("row", row["epoch"])

    def finish(self, summary: Any, files: Any, table: Any) -> None:
        self._do("finish")

    def close(self, ending: str) -> None:
        self._do("close", ending)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[type[Noting], type[Noting]]:
    failing, working = type("Failing", (Noting,), {}), type("Working", (Noting,), {})
    every: dict[Any, Any] = {"wandb": failing, "mlflow": working}
    monkeypatch.setattr("fastkd.output.trackers.tracking.TRACKERS", every)
    return failing, working


@pytest.mark.parametrize("when", ["start", "row", "finish", "close"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    two: tuple[type[Noting], type[Noting]], tmp_path: Path, when: str
) -> None:
    failing, working = two
    failing.fails = when
    folder = tracked(tmp_path / "run", "wandb", "mlflow")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        said = folder.begin_tracking([])
        folder.append_metrics(row(1))
        folder.append_metrics(row(2))
        folder.end_tracking("failed") if when == "close" else folder.finish({"epochs": 2})
    assert [str(one.message) for one in found] == [
        f"wandb gets nothing more of this run, which goes on: ConnectionError: the network. Every "
        f"row is in {tmp_path / 'run/metrics.jsonl'}"
    ]
    assert "mlflow: hello" in said
    assert failing.told[-1] == ("close", "broken")
    assert [one[0] for one in failing.told].count(when) == (2 if when == "close" else 1)
    ending = ("close", "failed") if when == "close" else ("finish",)
    assert working.told == [("start", None, 0), ("row", 1), ("row", 2), ending]
    assert len(folder.metrics()) == 2


def test_a_tracker_that_comes_later_or_was_gone_gets_all_rows(
    two: tuple[type[Noting], type[Noting]], tmp_path: Path
) -> None:
    failing, working = two
    first = tracked(tmp_path / "run", "mlflow")
    first.begin_tracking([])
    first.append_metrics(row(1))
    first.end_tracking("stopped")
    resumed = tracked(tmp_path / "run", "wandb", "mlflow")
    resumed.begin_tracking([row(1), row(2)])
    assert failing.told == [("start", None, 2), ("row", 1), ("row", 2)]
    assert working.told == [("start", 1, 2), ("row", 2)]
    resumed.end_tracking("stopped")
    # A run without a tracker leaves what others know of it.
    third = tracked(tmp_path / "run", "wandb")
    third.begin_tracking([row(1), row(2)])
    third.append_metrics(row(3))
    assert {name: one["rows"] for name, one in kept(tmp_path / "run").items()} == {
        "wandb": 3,
        "mlflow": 2,
    }


def _record(rows: str = "1", id: str = '"x"', open: str = "true") -> str:
    return f'{{"wandb": {{"id": {id}, "at": "", "rows": {rows}, "open": {open}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"wandb": {"id": "x"}}',
        '{"wandb": 3}',
        "null",
        "[" * 100_000,
        _record(rows="Infinity"),
        _record(rows="NaN"),
        _record(rows="-1"),
        _record(rows="1.5"),
        _record(rows="true"),
        _record(rows='"1"'),
        _record(rows="9" * 5000),
        _record(id="null"),
        _record(open='"false"'),
        "{\udcff}",
    ],
)
def test_a_damaged_record_is_a_sentence_and_no_second_run(
    two: tuple[type[Noting], type[Noting]], tmp_path: Path, text: str
) -> None:
    folder = tracked(tmp_path / "run", "wandb")
    (tmp_path / "run/trackers.json").write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"not tracked: .*trackers\.json is damaged .*remove it"):
        assert folder.begin_tracking([]) == []
    folder.append_metrics(row(1))
    folder.finish({})
    assert (tmp_path / "run/trackers.json").read_text(errors="surrogateescape") == text


def test_a_run_that_nobody_tracks_keeps_no_record(tmp_path: Path) -> None:
    folder = tracked(tmp_path / "run")
    assert folder.tracking is None
    folder.begin_tracking([])
    folder.append_metrics(row(1))
    folder.finish({})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.jsonl",
        "metrics.csv",
        "summary.json",
    }


def test_a_run_that_fails_before_its_first_row_leaves_no_folder(tmp_path: Path) -> None:
    folder = tracked(tmp_path / "run", "tensorboard")
    wandb = tmp_path / "run/wandb/offline-run-1"
    wandb.mkdir(parents=True)
    (wandb / "run-1.wandb").write_text("begun")
    (wandb.parent / "latest-run").symlink_to(wandb.name)
    (tmp_path / "run/trackers.json").write_text("{}")
    folder.discard(tmp_path)
    assert not (tmp_path / "run").exists()
    folder = tracked(tmp_path / "run")
    folder.append_metrics(row(1))
    folder.discard(tmp_path)
    assert (tmp_path / "run/metrics.jsonl").exists()


def test_a_package_that_cannot_be_imported_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Noting):
        @classmethod
        def problem(cls) -> str:
            raise ImportError("libfoo.so: cannot open")

    monkeypatch.setitem(opening.TRACKERS, "wandb", Broken)
    with pytest.raises(UserError, match=r"track=wandb: json does not work here \(.*libfoo\.so"):
        check_trackers(["wandb"])
