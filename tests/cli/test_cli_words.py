"""Words of other programs and from other systems: what fastkd would call them."""

import signal
import warnings

import pytest
import torch

import fastkd.cli.listings
import fastkd.training.trainer
from fastkd.cli.arguments import parse
from fastkd.models import create_model
from fastkd.runs.sweep.table import FORMATS


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["train", "--epochs", "3"],
            "there is no option --epochs; what decides a run is a key, wi",
        ),
        (["train", "--epochs=7"], "dashes: epochs=7"),
        (["train", "--epochs"], "dashes: epochs=3"),
        (["train", "quickstart", "--lr", "0.2"], "dashes: optim.lr=0.2 or teacher.lr=0.2"),
        (["train", "--batch-size", "64"], "dashes: batch_size=64"),
        (["train", "--data.root", "/d/a b"], "dashes: data.root=/d/a b"),
        (["train", "--temperature", "-1"], "dashes: losses.kd.temperature=0.1"),
        (["train", "--tensorboard"], "dashes: tensorboard=true"),
        (["train", "--out", "X"], "dashes: out=X"),
        (["train", "--losses.crd.weight", "0.8"], "dashes: losses.crd.weight=0.8"),
        (["train", "--foo", "1"], "no option --foo: choose --help, --config, --resume, --dry-run,"),
        (["train", "--student.foo=1"], "no option --student.foo: choose --help, --config, --re"),
        (["eval", "run", "--precision", "fp32"], "dashes: precision=fp32"),
        (["data", "check", "D", "--val-share", "0.2"], "dashes: data.val_share=0.2"),
        (["data", "check", "D", "--batch-size", "3"], "no option --batch-size: choose --help, --j"),
        (["latency", "resnet20", "--block=G:4"], "dashes: student.block=G:4"),
        (["latency", "resnet20", "--optim.lr=1"], "no option --optim.lr: choose --help, --weight"),
        (["table", "RUN", "--seed", "1"], "no option --seed: choose --help, --latex, --markdown"),
        (["train", "--resum"], "there is no option --resum, did you mean --resume? See `fastkd tr"),
        (["models", "--jsn"], "there is no option --jsn, did you mean --json? See `fastkd models"),
        (
            ["train", "--dry-run\r"],
            r"there is no option '--dry-run\r': a script with the line ends",
        ),
        (
            ["models", "--json\r"],
            r"there is no option '--json\r': a script with the line ends of W",
        ),
        (
            ["train", "--dry\x1b[2Jrun"],
            r"there is no option '--dry\x1b[2Jrun', did you mean --dry-",
        ),
        (
            ["train", "--\u200bdry-run"],
            r"there is no option '--\u200bdry-run', did you mean --dry-r",
        ),
        (["tr\x1b[2Jain"], r"there is no command 'tr\x1b[2Jain', did you mean train? See"),
        (["tr\nain"], r"there is no command 'tr\nain', did you mean train?"),
        (["train", "--jobs", "9" * 5000], "expected a whole number above 0. See `fastkd train --h"),
        (["cheapen", "resnet20", "G:2", "--input", f"3x{'9' * 5000}x3"], "expected CxHxW such as"),
        (["train", "quick\x1b[2Jstart"], r"there is no recipe 'quick\x1b[2Jstart'. Nearest: quick"),
        (["train", "--config", "a\x1b[2J.yaml"], r"cannot read the recipe file 'a\x1b[2J.yaml': N"),
        (["train", "--resume", "a\x1b[2J\n"], r"a\x1b[2J\n is not a run folder: it has no config"),
        (["eval", "a\x1b[2J"], r"a\x1b[2J is not a run folder (no config.yaml); a network by name"),
        (["train", "--sweep", "see\x1b=1;2"], r"unknown key 'see\x1b'"),
        (["train", "out=run\r"], r"out='run\r': '\r' cannot be part of a value, which Windows"),
        (["losses", "\x1b[2j"], r"there is no loss '\x1b[2j'"),
    ],
    ids=lambda value: ascii(" ".join(value))[:40] if isinstance(value, list) else "",
)
def test_a_wrong_word_is_told_the_right_one(command, words, sentence):
    said = command(*words)
    assert said.code == 2 and said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1 and said.err[:-1].isprintable() and len(said.err) < 2100


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "mobilenetv3_small_050",
            "no network 'mobilenetv3_small_050': write timm:mobilenetv3_small",
        ),
        ("resnet50d", "no network 'resnet50d': write timm:resnet50d\n"),
        ("resnet101", "no network 'resnet101': write timm:resnet101 or torchvision:resnet101\n"),
        ("convnext_tiny", "write timm:convnext_tiny or torchvision:convnext_tiny\n"),
        ("vit_b_16", "no network 'vit_b_16': write torchvision:vit_b_16\n"),
        ("resnet50.a1_in1k", "no network 'resnet50.a1_in1k': write timm:resnet50.a1_in1k\n"),
        ("mobilenetv3_smal_050", "'mobilenetv3_smal_050'; nearest: timm:mobilenetv3_small_050, t"),
        ("resnet21", "unknown network 'resnet21'; nearest: resnet32, resnet20, resnet18."),
        ("\x1b[2J", r"unknown network '\x1b[2J'. The zoo has resnet8"),
    ],
)
def test_a_bare_name_is_found_in_timm_and_torchvision(command, name, sentence):
    said = command("cheapen", name, "G:4")
    assert said.code == 2
    assert sentence in said.err


def test_a_name_of_the_zoo_is_the_zoos(command):
    # timm and torchvision have networks of this name too.
    said = command("cheapen", "resnet18", "G:4", "--input", "3x32x32")
    assert said.code == 0 and said.out.startswith("resnet18 at 3x32x32")


def test_a_pattern_is_looked_for_in_timm_and_torchvision(command):
    said = command("models", "mobilenetv3_*_050")
    assert said.err == (
        "fastkd: no network matches 'mobilenetv3_*_050'; try 'timm:mobilenetv3_*_050'\n"
    )
    assert "'timm:regnet_x_*' or" not in command("models", "resnet8").err


@pytest.mark.parametrize("pattern", ["timm:vit_7b_*dinov3", "timm:test_*", "wrn_40_2"])
def test_the_columns_of_the_models_never_run_together(command, pattern):
    lines = command("models", pattern).out.splitlines()
    for line in lines[1:]:
        if not line.startswith(("timm:", "wrn")):
            continue
        name, params, macs, size, classes, *_ = line.split()
        assert name.startswith(pattern[:5])
        assert int(params.replace(",", "")) > 1000
        if macs != "-":  # timm:test_vit3 cannot be counted
            assert int(macs.replace(",", "")) > 1000
        assert size.count("x") == 2 and classes.isdecimal()
    assert len(lines) > 1


def test_an_advice_can_be_pasted_into_a_shell(command, monkeypatch):
    def stopped(_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fastkd.training.trainer.Trainer, "summary", stopped)
    words = ["teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs=", "epochs=1"]
    said = command("train", *words, "compile=off", "device=cpu", "out=run #1; it's")
    assert said.code == 130
    assert said.err.endswith("Resume it with: fastkd train --resume 'run #1; it'\"'\"'s'\n")


def test_a_warning_of_another_package_is_escaped(command, monkeypatch):
    def warn():
        warnings.warn("EXIF \x1b[2J\nof a stranger", RuntimeWarning, stacklevel=1)
        return []

    monkeypatch.setattr(fastkd.cli.listings.listing, "overview", warn)
    said = command("recipes")
    assert r"EXIF \x1b[2J\nof a stranger" in said.err and "\x1b" not in said.err


def test_weights_of_the_same_network_without_its_block(command, tmp_path):
    torch.save(create_model("resnet20", 10).state_dict(), tmp_path / "w.pt")
    words = ["eval", "resnet20", "--weights", "w.pt", "data.name=digits", "student.block=BG:2:4"]
    said = command(*words)
    assert said.code == 2
    assert "or like this one without its cheap block: block=BG(2,4)" in said.err


def test_a_table_has_an_option_for_each_of_its_formats():
    options = parse(["table", "RUN", *(f"--{name}" for name in FORMATS)])

    assert options.formats == list(FORMATS)
