"""The whole command on digits, with a clock that counts MACs: every phase, resumed after kills."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastkd.compress import phases
from fastkd.compress.lessons import RANK_SHARE, Lessons, original_of
from fastkd.compress.phases import Request, compress
from fastkd.compress.shrinking import steps_between
from fastkd.compress.student import Student, start_weights
from fastkd.compress.target import Target
from fastkd.compute.ranks import open_world
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.models import create_model
from fastkd.models.counting.count import count
from fastkd.models.registry import model_from_file
from fastkd.output.console import Console
from fastkd.runs.stages import Session
from fastkd.storage.weight_file import WeightFile
from fastkd.storage.weights import save_weights

DIGITS = ("data.name=digits", "data.image_size=null", "augment.crop=none", "augment.flip=false")
KEYS = (
    *DIGITS,
    "batch_size=100",
    "epochs=1",
    "student.width=0.25",
    "teacher.min_accuracy=0",
    "device=cpu",
    "compile=off",
    "precision=fp32",
)
SMALL = {"short_epochs": 1, "keep": 2, "draws": 3}


def run(folder: Path, meter, target: str = "latency=0.6x", **more):
    request = {"model": "resnet8", "keys": KEYS, **SMALL, **more}
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), Path("runs"))
        asked = Request(target=Target.parse(target), **request)
        return compress(asked, folder, session, meter)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Weights of the network, so that most tests need not train it."""
    file = tmp_path_factory.mktemp("original") / "original.safetensors"
    torch.manual_seed(0)
    save_weights(file, create_model("resnet8", 10, width=0.25))
    return file


def test_a_dry_run_trains_nothing_and_says_the_table(tmp_path, make_meter, original, capsys):
    meter = make_meter(slow_groups=4)
    assert run(tmp_path / "out", meter, weights=str(original), dry_run=True) is None
    said = capsys.readouterr().out
    assert "block 4->4 at 4x16x16: S " in said
    assert "G(4)" in said and "(slower, dropped)" in said
    assert "by the sum of its parts" in said
    assert not (tmp_path / "out" / "runs").exists()
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(found["students"]) == 2
    for row in found["students"]:
        assert row["cost"] <= found["limit"]
        assert not {"G(4)", "G(N)"} & set(row["options"].get("blocks", {}).values())


def test_a_kill_anywhere_before_the_search_gives_the_same_students(tmp_path, make_meter, original):
    words = {"weights": str(original), "dry_run": True}
    whole = make_meter()
    run(tmp_path / "whole", whole, **words)
    measured = whole.layers + whole.wholes
    for number, stop_after in enumerate((3, measured - 1)):
        meter = make_meter()
        meter.stop_after = stop_after
        with pytest.raises(Interrupted, match="The same command again resumes in"):
            run(tmp_path / f"cut{number}", meter, **words)
        again = make_meter()
        run(tmp_path / f"cut{number}", again, **words)
        assert again.layers + again.wholes == measured - stop_after
        assert (tmp_path / f"cut{number}" / "search.json").read_text() == (
            tmp_path / "whole" / "search.json"
        ).read_text()


def test_the_seed_decides_the_draws(tmp_path, make_meter, original):
    tried = []
    for number, seed in enumerate((0, 0, 1)):
        keys = (*KEYS, f"seed={seed}")
        folder = tmp_path / str(number)
        words = {"keys": keys, "draws": 4, "keep": 12, "weights": str(original)}
        run(folder, make_meter(), dry_run=True, **words)
        tried.append(
            [row["id"] for row in json.loads((folder / "search.json").read_text())["tried"]]
        )
    assert tried[0] == tried[1] != tried[2]


@pytest.mark.parametrize("target", ["macs=0.4x", "params=5k"])
def test_counted_targets_need_no_layer(tmp_path, meter, original, target):
    run(tmp_path / "out", meter, target, weights=str(original), dry_run=True)
    assert (meter.layers, meter.wholes) == (0, 0)
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    for row in found["students"]:
        assert row["estimate"] == row["cost"] <= found["limit"]


def test_a_target_that_cannot_be_met_names_the_nearest(tmp_path, meter, original):
    words = {"weights": str(original), "dry_run": True}
    with pytest.raises(UserError) as error:
        run(tmp_path / "out", meter, "latency=0.05ms", **words)
    said = str(error.value)
    assert "cannot be met: at most 0.05 ms is asked for, and the nearest that resnet8" in said
    # The clock has 0.1 ms for no MACs at all.
    nearest = float(said.partition("can reach is ")[2].partition(" ms")[0])
    assert 0.1 < nearest < 0.2


def test_a_target_below_the_network_takes_a_narrower_one(tmp_path, meter, capsys):
    keys = tuple(key for key in KEYS if key != "student.width=0.25")
    run(tmp_path / "out", meter, "macs=0.05x", keys=keys, dry_run=True, keep=1)
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["base"]["options"]["width"] < 1
    assert "no student of resnet8 is small enough: resnet8, width" in capsys.readouterr().out
    assert found["students"][0]["cost"] <= found["limit"]


def test_an_original_that_is_small_enough_is_said(tmp_path, meter, original):
    with pytest.raises(UserError, match=r"the original costs .* already, at most 1000 ms"):
        run(tmp_path / "out", meter, "latency=1s", weights=str(original), dry_run=True)


def test_another_request_in_a_folder_is_refused(tmp_path, meter, original):
    words = {"weights": str(original), "dry_run": True}
    run(tmp_path / "out", meter, "macs=0.4x", **words)
    with pytest.raises(UserError, match=r"belongs to another request .*keep 2 there, 3 here"):
        run(tmp_path / "out", meter, "macs=0.4x", **words | {"keep": 3})
    (tmp_path / "out" / "compress.json").write_text("[]")
    with pytest.raises(UserError, match=r"compress\.json is damaged"):
        run(tmp_path / "out", meter, "macs=0.4x", **words)


@pytest.mark.parametrize("name", ["file", ".git", ".notes.tmp", ".lock.old"])
def test_somebody_elses_folder_is_left_as_it_is(tmp_path, meter, original, name):
    words = {"weights": str(original), "dry_run": True}
    (tmp_path / "mine").mkdir()
    for one in (name, ".lock"):
        (tmp_path / "mine" / one).write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(.*\): choose an empty"):
        run(tmp_path / "mine", meter, **words)
    there = {one.name: one.read_text() for one in (tmp_path / "mine").iterdir()}
    assert there == {name: "mine", ".lock": "mine"}
    with pytest.raises(UserError, match="is a file: choose"):
        run(tmp_path / "mine" / name, meter, **words)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("student.blocks={layer1: G:4}", "student.blocks: compress decides about this key itself"),
        ("teacher.weights=a", "teacher.weights: compress decides about this key itself"),
        ("teacher=null", "the students learn from the original"),
        ("epoch=3", "unknown key epoch, did you mean epochs?"),
    ],
)
def test_keys_that_are_not_the_users_are_refused(tmp_path, key, sentence):
    one, weights = original_of("resnet14", None, ())
    with pytest.raises(UserError) as error:
        Lessons(one, weights, (*DIGITS, key), tmp_path)
    assert sentence in str(error.value)


def test_short_trainings_are_the_long_ones_in_proportion(tmp_path):
    keys = (*DIGITS, "epochs=40", "epoch_factor=0.5", "optim.warmup_epochs=10")
    one, weights = original_of("resnet14", None, ())
    lessons = Lessons(one, weights, keys, tmp_path)
    short = lessons.of(one, "short", tmp_path / "w", epochs=4, seed=0, ranking=True)
    assert (short.total_epochs, short.eval_epochs, short.optim.warmup_epochs) == (4, 4, 1.0)
    assert short.data.tune_share == RANK_SHARE
    long = lessons.of(one, "long", tmp_path / "w", seed=0)
    assert (long.total_epochs, long.data.tune_share) == (20, None)
    assert lessons.epochs_of(3) == 6


def test_weights_of_another_network_are_told_before_anything_is_measured(tmp_path, meter, original):
    with pytest.raises(UserError, match="resnet14"):
        run(tmp_path / "out", meter, model="resnet14", weights=str(original), dry_run=True)
    assert (meter.layers, meter.wholes) == (0, 0)


def test_a_folder_goes_on_where_it_was_measured_only(tmp_path, make_meter, original):
    words = {"weights": str(original), "dry_run": True}
    run(tmp_path / "out", make_meter(), **words)
    with pytest.raises(UserError, match="was measured elsewhere"):
        run(tmp_path / "out", make_meter(cpu="another"), **words)


def stop_at_training(monkeypatch, outcome):
    """Short trainings have this outcome; the first long one is where the power fails."""
    seen = []

    def train(recipe, session, *, resume=None):
        seen.append(recipe)
        if not Path(recipe.out).name.startswith("short-"):
            raise KeyboardInterrupt
        if isinstance(outcome, Exception):
            raise outcome
        return {"accuracy_last": outcome}

    monkeypatch.setattr(phases, "run_recipe", train)
    return seen


def test_the_choice_reads_no_validation_image(tmp_path, meter, original, monkeypatch):
    seen = stop_at_training(monkeypatch, 0.5)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", meter, weights=str(original))
    *short, long = seen
    assert len(short) == 2 and {one.data.tune_share for one in short} == {RANK_SHARE}
    assert long.data.tune_share is None


def test_baselines_cost_as_much_in_what_the_target_names(tmp_path, meter, original, monkeypatch):
    stop_at_training(monkeypatch, 0.5)
    keys = tuple(key for key in KEYS if key != "student.width=0.25")
    with pytest.raises(Interrupted):
        run(tmp_path / "out", meter, "params=0.5x", weights=str(original), keys=keys)
    chosen = json.loads((tmp_path / "out" / "ranking.json").read_text())["students"][0]
    baselines = json.loads((tmp_path / "out" / "baselines.json").read_text())
    wide = Student.of_plain(baselines["width-scaled"])
    assert count(wide.build(10), (3, 16, 16)).params <= chosen["cost"]
    assert (meter.layers, meter.wholes) == (0, 0)


def test_a_ranking_without_any_training_is_an_error(tmp_path, meter, original, monkeypatch):
    stop_at_training(monkeypatch, RunFailed("the loss is nan"))
    with pytest.raises(RunFailed, match="the loss is nan"):
        run(tmp_path / "out", meter, weights=str(original))
    assert not (tmp_path / "out" / "ranking.json").exists()


def test_an_exported_file_is_no_network_to_train():
    with pytest.raises(UserError, match="is an exported file, which is not trained again"):
        original_of("student.onnx", None, ())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"classes": 10}, "does not fit resnet8 with 10 classes"),
        ({"keys": "batch_size=5000"}, "not one full batch; set a smaller batch_size"),
        ({"model": "timm:vit_tiny_patch16_224"}, "does not take images of 16x16 pixels"),
    ],
)
def test_what_does_not_fit_the_data_is_told_before_it_is_measured(tmp_path, meter, words, sentence):
    asked: dict = {"dry_run": True}
    if "classes" in words:
        file = tmp_path / "other.safetensors"
        save_weights(file, create_model("resnet8", 3, width=0.25))
        asked["weights"] = str(file)
    if "keys" in words:
        asked["keys"] = (*KEYS, words["keys"])
    if "model" in words:
        asked["model"] = words["model"]
        asked["keys"] = tuple(key for key in KEYS if not key.startswith("student."))
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "out", meter, **asked)
    assert (meter.layers, meter.wholes) == (0, 0)


def test_a_cheap_network_is_not_compressed_again(tmp_path):
    file = tmp_path / "cheap.safetensors"
    save_weights(file, create_model("resnet14", 10, width=0.25, blocks={"layer1": "G(2)"}))
    with pytest.raises(UserError, match="has blocks already"):
        original_of(str(file), None, ())


def test_a_weight_file_says_its_network(original):
    student, weights = original_of(str(original), None, ())
    assert (student.name, student.options, weights) == ("resnet8", {"width": 0.25}, str(original))
    student, _ = original_of("resnet8", str(original), ())
    assert student.options == {"width": 0.25}


def test_first_weights_are_those_that_fit(tmp_path, original):
    student = Student("resnet8", {"width": 0.25, "blocks": {"layer1.0": "G(2)"}}, "")
    start_weights(student, 10, original, tmp_path / "start.safetensors")
    given = WeightFile.open(original).tensors
    made = model_from_file(tmp_path / "start.safetensors").state_dict()
    fitting = {key for key in made if key in given and made[key].shape == given[key].shape}
    assert all(torch.equal(made[key], given[key]) for key in fitting)
    assert {key.rpartition(".conv")[0] for key in made.keys() - fitting} == {"layer1.0"}


def test_stages_lead_from_the_original_to_the_student():
    one = Student("resnet20", {}, "")
    blocks = {f"layer{s}.0": "G(4)" for s in (1, 2, 3)} | {"layer1.1": "B(2)"}
    end = Student("resnet20", {"blocks": blocks, "depth": {"stage3": 1}}, "")
    assert steps_between(one, end, 1) == []
    first, second = steps_between(one, end, 3)
    assert first.options == {"blocks": {"layer1.1": "B(2)"}}
    assert second.options == {
        "blocks": {"layer3.0": "G(4)", "layer1.1": "B(2)"},
        "depth": {"stage3": 2},
    }
    for step in (first, second):
        step.build(10)
    other = Student("resnet20", {"width": 0.5}, "")
    assert steps_between(one, other, 3) == [other, other]


@pytest.mark.matrix
def test_the_whole_flow_and_a_kill_in_every_training(tmp_path, make_meter, monkeypatch, capsys):
    """From nothing to the exported student; the second time with a kill before each training."""
    pytest.importorskip("onnxruntime")
    whole = run(tmp_path / "whole", make_meter(), model="resnet14", stages=2)
    assert whole is not None and whole["met"]
    said = capsys.readouterr().out
    assert "rank correlation of Fisher potential and short distillation:" in said
    assert "target latency=0.6x met" in said
    by_name = {row["name"]: row for row in whole["rows"]}
    assert by_name["chosen"]["ms"][1] <= whole["limit"]
    for name in ("depth-scaled", "width-scaled"):
        if name in by_name:
            assert by_name[name]["ms"][1] <= by_name["chosen"]["ms"][1] * (1 + 1e-9)
    folder = tmp_path / "whole"
    assert Image.open(folder / "pareto.png").size[0] > 500
    assert (folder / "student.onnx").exists()
    assert "| chosen |" in " ".join((folder / "table.md").read_text().split())

    real = phases.run_recipe
    for _ in range(20):
        left = [1]

        def once(recipe, session, *, resume=None, left=left):
            if Path(recipe.out, "summary.json").exists():
                return real(recipe, session, resume=resume)
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return real(recipe, session, resume=resume)

        monkeypatch.setattr(phases, "run_recipe", once)
        try:
            again = run(tmp_path / "cut", make_meter(), model="resnet14", stages=2)
        except Interrupted:
            continue
        break
    monkeypatch.setattr(phases, "run_recipe", real)
    assert again is not None
    assert again["genotype"] == whole["genotype"]
    assert [row["accuracies"] for row in again["rows"]] == [
        row["accuracies"] for row in whole["rows"]
    ]
    # Once more reads everything.
    meter = make_meter()
    third = run(tmp_path / "cut", meter, model="resnet14", stages=2)
    assert third == again and (meter.layers, meter.wholes) == (0, 0)
