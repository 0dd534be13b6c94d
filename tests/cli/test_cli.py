"""The command as a stranger meets it: what it prints, what it leaves, how it ends."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

import fastkd.data.sources.synthetic
import fastkd.teachers.loading
from fastkd.models import count, create_model
from fastkd.models.card import card_of, sign
from fastkd.recipes.loading import load_recipe
from fastkd.testing.recipes import TINY
from fastkd.training.trainer import Trainer

WORDS = [*TINY, "student.name=resnet8"]
TAUGHT = ["teacher.name=resnet8", "teacher.width=0.5", "teacher.epochs=2", "teacher.min_accuracy=0"]
ALONE = [*WORDS, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
HEAVY = ("torch", "triton", "nvidia", "timm", "torchvision", "matplotlib", "sklearn", "numpy")


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)


@pytest.fixture
def loaded_after(program, tmp_path):
    """The packages that a program has imported by its end."""

    def run(code):
        code += "\nimport sys; print('\\n', *{name.partition('.')[0] for name in sys.modules})"
        return set(program("-c", code, cwd=tmp_path).out.splitlines()[-1].split())

    return run


def test_the_package_and_its_help_load_nothing_heavy(loaded_after):
    assert not loaded_after("import fastkd") & {*HEAVY, "pydantic", "rich"}
    help_only = """
from fastkd.cli.commands import main
try:
    main(["train", "--help"])
except SystemExit as end:
    assert end.code == 0"""
    assert not loaded_after(help_only) & {*HEAVY, "pydantic", "rich", "yaml"}


def test_printing_a_recipe_loads_torch_at_most(loaded_after):
    code = 'from fastkd.cli.commands import main; assert main(["train", "--print-config"]) == 0'
    assert loaded_after(code) & {*HEAVY} <= {"torch", "numpy"}


@pytest.mark.parametrize(
    ("module", "usage"),
    [("fastkd", "usage: fastkd [-h] [--version] COMMAND"), ("fastkd.train", "usage: fastkd train")],
)
def test_the_package_and_train_are_programs(program, module, usage, tmp_path):
    said = program("-m", module, "--help", cwd=tmp_path)
    assert said.err == ""
    assert said.out.startswith(usage)


def test_without_a_command_it_says_what_there_is(command):
    said = command()
    assert (said.code, said.err) == (0, "")
    for word in COMMANDS:
        assert f"\n    {word} " in said.out


COMMANDS = [
    "train",
    "eval",
    "predict",
    "export",
    "data",
    "bench",
    "models",
    "cheapen",
    "latency",
    "compress",
    "recipes",
    "doctor",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_fits_a_terminal(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = command(name, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: fastkd {name}")
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "there is no command 'trian', did you mean train? See `fastkd --help`"),
        (
            ["xyz"],
            "there is no command 'xyz': choose train, compare, table, report, eval, predict",
        ),
        (["train", "--dryrun"], "there is no option --dryrun, did you mean --dry-run? See `fastkd"),
        (["train", "--dry"], "there is no option --dry, did you mean --dry-run?"),
        (["train", "--resume"], "argument --resume: expected one argument. See `fastkd train -"),
        (["eval"], "the following arguments are required: RUN | MODEL | FILE.onnx. See `fast"),
        (["doctor", "now"], "`fastkd doctor` takes no further argument, got 'now'"),
        (["train", "quickstart", "cifar10/resnet20"], "one recipe at a time, got quickstart, cif"),
        (["train", "mine.yaml"], "mine.yaml is a file: fastkd train --config mine.yaml"),
        (["train", "quikstart"], "there is no recipe 'quikstart'. Nearest: quickstart."),
        (["train", "nope"], "there is no recipe 'nope'. `fastkd recipes` lists all of them."),
        (["train", "epoch=3"], "unknown key epoch, did you mean epochs?"),
        (["recipes", "nope*"], "no recipe matches 'nope*'; expected a part of a name, such as"),
        (["recipes", "quickstart", "cifar10/*"], "one pattern at a time, in quotes for the shell;"),
        (["recipes", "show"], "expected one name: fastkd recipes show NAME"),
        (["recipes", "show", "quikstart"], "there is no recipe 'quikstart'. Nearest: quickstart."),
        (["models", "resnot*"], "no network matches 'resnot*'; try 'resnet*' or 'timm:resnet*'"),
        (["models", "tim:resnet*"], "unknown source 'tim'; expected one of timm, torchvision"),
        (["models", "--input", "3x64"], "--input=3x64: expected CxHxW such as 3x32x32"),
        (["cheapen", "resnet20", "--input", "3x64", "G:2"], "--input=3x64: expected CxHxW such"),
        (["cheapen", "resnet20"], "the following arguments are required: BLOCK. See `fastkd cheap"),
        (["cheapen", "resnet20", "G/4"], "there is no block 'G/4'; expected S, S-2x2, G(g)"),
        (["cheapen", "resnet20", "G:3"], "block G(3): 16 channels cannot be split into 3 groups"),
        (["latency"], "give one of: a network, a run or an ONNX file to measure; --script OUT.py;"),
        (["latency", "resnet20", "--on", "eagre"], "there is no backend 'eagre': did you mean eag"),
        (["latency", "resnet20", "--batch", "0"], "argument --batch: 0: expected numbers above 0,"),
        (["latency", "resnet20", "--size", "3x4x5"], "argument --size: 3x4x5: expected a side or"),
        (["latency", "resnet21"], "unknown network 'resnet21'; nearest: "),
        (["latency", "none.onnx"], "none.onnx: no such file"),
        (["latency", "--read", "none.json"], "none.json cannot be read: No such file or directory"),
        (["latency", "--read", "a.json", "--on", "eager"], "--on is for measuring here: leave it"),
        (["latency", "--script", "a.py", "--layers"], "--layers is for measuring here: leave it "),
        (["latency", "--script", "a.py", "--on", "eager"], "the script runs onnxruntime only, not"),
        (["compress", "resnet20"], "the following arguments are required: --target. See `fastkd "),
        (
            ["compress", "resnet20", "--target", "5ms", "--data", "x"],
            "--target 5ms: expected latency=5ms, latency=0.5x",
        ),
        (
            ["compress", "resnet20", "--target", "macs=0.5x"],
            "which images? --data DIR, with folders of classes below train/ and val/",
        ),
        (
            ["compress", "resnet20", "--target", "latency=1ms", "--data", "x", "--on", "ort"],
            "there is no backend 'ort': did you mean ort-",
        ),
        (
            ["compress", "resnet21", "--target", "macs=0.5x", "--data", "x"],
            "unknown network 'resnet21'; nearest: ",
        ),
        (["cheapen", "resnet21", "G:2"], "unknown network 'resnet21'; nearest: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_one_sentence_and_code_2(command, words, sentence, tmp_path):
    said = command(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"fastkd: {sentence}")
    assert said.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_one_rank_speaks_for_all(command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    said = command("train", "epoch=3")
    assert (said.code, said.out, said.err) == (2, "", "")


def test_ctrl_c_before_anything_was_saved(command, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastkd.recipes.listing.overview", interrupted)
    said = command("recipes")
    assert (said.code, said.err) == (130, "fastkd: stopped\n")


def test_a_reader_that_goes_away_is_no_error(program, tmp_path):
    code = """
import os, sys
from fastkd.cli.commands import main
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
sys.exit(main(["recipes"]))"""
    assert program("-c", code, cwd=tmp_path).err == ""


def test_print_config_shows_the_whole_recipe(command):
    said = command("train", "--print-config")
    assert said.code == 0
    assert yaml.safe_load(said.out) == load_recipe("quickstart").model_dump(mode="json")
    assert "# Initial weights, order, augmentation and dropout all follow from it." in said.out


def test_keys_alone_are_keys_of_the_quickstart(command):
    said = command("train", "--print-config", "epochs=3")
    assert yaml.safe_load(said.out)["name"] == "quickstart"
    assert yaml.safe_load(said.out)["epochs"] == 3


def test_words_may_stand_on_both_sides_of_an_option(command):
    said = command("train", "cifar10/resnet20", "--print-config", "epochs=3", "seed=1")
    found = yaml.safe_load(said.out)
    assert (found["name"], found["epochs"], found["seed"]) == ("cifar10/resnet20", 3, 1)


def test_models_are_listed_with_their_size(command):
    said = command("models", "resnet8*")
    size = count(create_model("resnet8", 100), (3, 32, 32))
    assert said.code == 0
    row = next(line.split() for line in said.out.splitlines() if line.startswith("resnet8 "))
    assert row == [
        "resnet8",
        f"{size.params:,}",
        f"{size.macs:,}",
        "3x32x32",
        "100",
        "stem",
        "stage1-3",
        "pooled",
        "logits",
    ]


def test_models_as_json_with_memory_and_every_tap(command):
    (found,) = json.loads(command("models", "erfnet", "--input", "3x64x64", "--json").out)
    with torch.device("meta"):
        size = count(create_model("erfnet", 100), (3, 64, 64))
    assert (found["params"], found["macs"]) == (size.params, size.macs)
    assert found["training_bytes"] == size.training_bytes
    assert found["inference_bytes"] == size.inference_bytes
    assert found["taps"][-3:] == ["stage5:preact", "stage5", "logits"]


def test_a_zoo_network_that_does_not_take_the_given_size_is_listed_without_macs(command):
    said = command("models", "erfnet", "--input", "3x30x30")
    assert said.code == 0
    assert "other input     3x30x30" in said.out


def test_cheapen_shows_before_and_after(command):
    said = command("cheapen", "wrn_40_2", "G:N:8")
    assert (said.code, said.err) == (0, "")
    # Moonshine table 2 with its numbers for 100 classes.
    assert said.out.splitlines() == [
        "wrn_40_2 at 3x32x32",
        "                        before           after    share",
        "  parameters         2,255,156         467,412    20.7%",
        "  MACs             327,610,880      85,684,736    26.2%",
        "cheapen G(N/8): 36 changed, 4 left",
        "  changed  36 x 3x3, now G(N/8) (layer1.0.conv1, layer1.0.conv2, layer1.1.conv1, ..)",
        "  left     1 x stem (conv1)",
        "  left     3 x kept by its residual block (layer1.0.shortcut, layer2.0.shortcut, "
        "layer3.0.shortcut)",
    ]


def test_cheapen_takes_part_of_a_network_of_timm_at_an_input(command):
    said = command("cheapen", "timm:test_resnet", "G:4", "--where=layer4", "--input=3x64x64")
    assert said.code == 0
    assert said.out.startswith("timm:test_resnet at 3x64x64\n")
    assert "  changed  2 x 3x3, now G(4) (layer4.0.conv1, layer4.0.conv2)" in said.out


def test_foreign_models_are_counted_at_their_own_input_or_at_a_given_one(command):
    own, given = (
        json.loads(command("models", "timm:resnet18", "--json", *words).out)[0]
        for words in ([], ["--input", "3x64x64"])
    )
    assert (own["input"], own["params"], own["classes"]) == ("3x224x224", 11689512, 1000)
    assert own["macs"] == 1814073344  # timm's own table: 1.82 GMACs, with the additions
    assert (given["input"], given["macs"]) == ("3x64x64", 148557824)


def test_a_model_that_takes_one_size_only_is_listed_without_macs(command):
    said = command("models", "timm:vit_tiny_patch16_224", "--input", "3x64x64")
    assert said.code == 0
    assert "5,717,416 other input 3x64x64" in " ".join(said.out.split())
    assert "module paths" in said.out


def test_the_doctor_reports(command):
    assert command("doctor").out.startswith("fastkd ")
    assert json.loads(command("doctor", "--json").out)["fastkd"] == fastkd.__version__


def test_a_run_ends_with_the_table_and_all_its_files(command, tmp_path):
    said = command("train", *WORDS, *TAUGHT, "epochs=2", "baseline.lrs=0.1,0.2")
    assert (said.code, said.err) == (0, "")
    (run,) = (tmp_path / "runs/quickstart").iterdir()
    names = "config.yaml environment.json facts.json metrics.jsonl metrics.csv last.pt "
    names += "best.safetensors summary.json curves.png alone"
    assert {entry.name for entry in run.iterdir()} == set(names.split())
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    summary = json.loads((run / "summary.json").read_text())
    assert [tried["lr"] for tried in summary["alone_tried"]] == [0.1, 0.2]
    assert {"accuracy_last", "accuracy_best", "best_epoch", "digest", "params"} <= set(summary)
    for row in ("teacher resnet8", "student alone", "student distilled"):
        assert f"\n{row}" in said.out

    again = command("train", *WORDS, *TAUGHT, "epochs=2", "baseline.lrs=")
    assert "teacher/synthetic/resnet8: finished before, runs/teachers/resnet8-" in again.out


def test_a_saved_recipe_can_be_run_again(command, tmp_path):
    assert command("train", *ALONE, "out=one").code == 0
    # As it is: the folder that the first run was given is not part of its recipe.
    said = command("train", "--config", "one/config.yaml")
    assert (said.code, said.err) == (0, "")
    (again,) = (tmp_path / "runs/quickstart").iterdir()
    one, two = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "one", again))
    assert one["digest"] == two["digest"]
    assert one["accuracy_last"] == two["accuracy_last"]


def test_a_run_and_its_weights_are_evaluated(command, tmp_path):
    command("train", *ALONE, "out=one")
    best = json.loads((tmp_path / "one/summary.json").read_text())["accuracy_best"]
    run = command("eval", "one")
    assert run.code == 0
    assert f"\n  accuracy   {best:.4g}\n" in run.out
    assert "\n  samples    50\n" in run.out
    told = "the network of one is in its files, and is evaluated as it is: leave out student.wi"
    assert told in command("eval", "one", "student.width=0.5").err
    # The file of the run knows the width; options may stand anywhere between the words.
    words = ["data.name=synthetic", "--weights", "one/best.safetensors", "precision=fp32"]
    model = command("eval", "resnet8", *words)
    assert model.out.splitlines()[1:] == run.out.splitlines()[1:]


def test_a_run_is_the_teacher_of_another(command, tmp_path):
    assert command("train", *ALONE, "out=one").code == 0
    best = json.loads((tmp_path / "one/summary.json").read_text())["accuracy_best"]
    kept = ["teacher.name=resnet8", "teacher.width=0.5", "teacher.weights=one"]
    said = command("train", *WORDS, *kept, "teacher.min_accuracy=0", "baseline.lrs=")
    assert (said.code, said.err) == (0, "")
    assert f"teacher resnet8: accuracy {best:.2%}" in said.out
    assert not (tmp_path / "runs/teachers").exists()


def test_weights_of_a_file_without_description_take_their_options_from_keys(command, tmp_path):
    import torch

    torch.save(create_model("resnet8", 10, width=0.5).state_dict(), tmp_path / "plain.pt")
    words = ["eval", "resnet8", "--weights", "plain.pt", "data.name=synthetic"]
    said = command(*words, "student.width=0.5")
    assert (said.code, said.err) == (0, "")
    assert "params     19,954" in said.out
    said = command(*words)
    assert said.code == 2
    assert "plain.pt does not fit resnet8 with 10 classes" in said.err


def test_eval_renormalises_for_the_network_unless_told(command, tmp_path, monkeypatch):
    from fastkd.storage.weights import describe, save_weights

    model = create_model("resnet8", 10, width=0.5)
    sign(model, replace(card_of(model), normalization=((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))))
    save_weights(tmp_path / "own.safetensors", model, describe(model))
    words = ["eval", "resnet8", "--weights", "own.safetensors", "data.name=synthetic"]
    own, same, other = (
        command(*words, *more).out.splitlines()[1:]
        for more in (
            [],
            ["data.mean=0.1,0.2,0.3", "data.std=0.9,0.8,0.7"],
            ["data.mean=0.5,0.5,0.5", "data.std=0.1,0.1,0.1"],
        )
    )
    assert own == same
    assert own != other


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_ctrl_c_outside_a_step_says_how_to_go_on(command, monkeypatch, tmp_path, stage):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if stage == "teacher":
        monkeypatch.setattr(fastkd.teachers.loading, "evaluate", interrupted)
    else:
        monkeypatch.setattr(Trainer, "summary", interrupted)
    said = command("train", *WORDS, *TAUGHT, "baseline.lrs=", "out=one")
    assert said.code == 130
    assert said.err == "fastkd: stopped. Resume it with: fastkd train --resume one\n"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)
    said = command("train", "--resume", "one")
    assert (said.code, said.err) == (0, "")
    assert (tmp_path / "one/summary.json").exists()


def test_a_teacher_that_was_finished_by_its_own_resume_serves_the_run(
    command, monkeypatch, tmp_path
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    original = Trainer.summary
    monkeypatch.setattr(Trainer, "summary", interrupted)
    assert command("train", *WORDS, *TAUGHT, "baseline.lrs=").code == 130
    monkeypatch.setattr(Trainer, "summary", original)
    (teacher,) = (tmp_path / "runs/teachers").iterdir()
    assert command("train", "--resume", f"runs/teachers/{teacher.name}").code == 0
    said = command("train", *WORDS, *TAUGHT, "baseline.lrs=")
    assert (said.code, said.err) == (0, "")
    assert "\nstudent distilled" in said.out


def test_the_saved_recipe_says_what_auto_came_to(command, tmp_path):
    words = [word for word in ALONE if not word.startswith("precision")]
    assert command("train", *words, "out=one").code == 0
    (line,) = (
        text
        for text in (tmp_path / "one/config.yaml").read_text().splitlines()
        if text.startswith("precision:")
    )
    assert line.split()[1] in ("fp32", "bf16")


def test_a_run_folder_that_cannot_be_made_is_the_users_affair(command):
    said = command("train", *ALONE, "out=/proc/one")
    assert said.code == 2
    assert "the run folder /proc/one cannot be made" in said.err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        fastkd.cli.commands.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastkd {fastkd.__version__}\n"


def test_a_warning_of_fastkd_is_a_sentence(command):
    said = command("cheapen", "wrn_10_1", "G4")
    assert said.code == 0
    assert said.err.count("\n") == 1
    assert said.err.startswith("fastkd: note: block 'G4' is read as a column of")
