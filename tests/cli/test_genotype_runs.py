"""A genotype in runs: trained, resumed, evaluated, swept over, taught by; and `fastkd cheapen`."""

import json

import pytest
import torch

import fastkd.data.sources.synthetic
from fastkd.models import create_model, model_from_file
from fastkd.models.card import card_of
from fastkd.storage.weights import save_weights
from fastkd.training.trainer import Trainer

NET = ["student.name=resnet14", "student.width=0.5", "epochs=2", "compile=off", "device=cpu"]
DATA = ["data.name=synthetic", "data.train_limit=64", "batch_size=32", "precision=fp32"]
ALONE = [*NET, *DATA, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
GENOTYPE = ["student.blocks={stage1: G:4, layer3.1: BG:2:M}", "student.depth={stage2: 1}"]
OPTIONS = {
    "width": 0.5,
    "blocks": {"stage1": "G(4)", "layer3.1": "BG(2,M)"},
    "depth": {"stage2": 1},
}


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)


def test_a_run_remembers_its_genotype(command, tmp_path):
    said = command("train", *ALONE, *GENOTYPE, "out=one")
    assert (said.code, said.err) == (0, "")
    assert "student {stage1: G(4), layer3.1: BG(2,M)} depth {stage2: 1}" in said.out
    config = (tmp_path / "one/config.yaml").read_text()
    assert "  blocks:\n    stage1: G(4)\n    layer3.1: BG(2,M)\n  depth:\n    stage2: 1\n" in config
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    model = model_from_file(tmp_path / "one")
    assert card_of(model).options == OPTIONS
    params = sum(one.numel() for one in create_model("resnet14", 10, **OPTIONS).parameters())
    assert summary["params"] == params
    run = command("eval", "one")
    assert f"\n  accuracy   {summary['accuracy_best']:.4g}\n" in run.out
    named = command("eval", "resnet14", "--weights", "one", *DATA[:1], "precision=fp32")
    assert named.out.splitlines()[1:] == run.out.splitlines()[1:]
    # The same network as the teacher of another run, its options from the file or from keys.
    taught = [*NET, *DATA, "baseline.lrs=", "teacher.name=resnet14", "teacher.weights=one"]
    taught += ["teacher.min_accuracy=0", "teacher.train=false", "teacher.width=null"]
    said = command("train", *taught, "epochs=1")
    assert (said.code, said.err) == (0, "")
    label = "(width=0.5, blocks={stage1: G(4), layer3.1: BG(2,M)}, depth={stage2: 1})"
    assert f"teacher resnet14 {label}: accuracy {summary['accuracy_best']:.2%}" in said.out


def test_a_finished_teacher_or_an_evaluation_is_not_changed(command, tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "whole.safetensors", create_model("resnet14", 10, width=0.5))
    teacher = ["teacher.name=resnet14", "teacher.weights=whole.safetensors", "teacher.train=false"]
    keys = [*NET, *DATA, *teacher, "teacher.width=0.5", "teacher.min_accuracy=0"]
    said = command("train", *keys, "teacher.depth=1,1,1")
    assert said.code == 2
    assert "and teacher.depth changes it: a finished teacher has to be trained like" in said.err
    words = ["eval", "resnet14", "--weights", "whole.safetensors", "data.name=synthetic"]
    said = command(*words, "student.blocks={layer1: G:4}")
    assert said.code == 2
    assert "and student.blocks changes it: train it like this first" in said.err
    # A student starts from them, unless it is frozen.
    start = [*ALONE, "student.weights=whole.safetensors", "epochs=1"]
    said = command("train", *start, *GENOTYPE)
    assert said.code == 0
    assert "whole.safetensors holds the whole resnet14: " in said.err + said.out
    said = command("train", *start, *GENOTYPE, "student.frozen=backbone", "student.new_head=true")
    assert said.code == 2
    assert "student.blocks change it: student.frozen=backbone would" in said.err


def test_a_sweep_names_its_genotypes(command, tmp_path):
    sweep = ["--sweep", "student.blocks={layer1: G:4};{layer1: G:2}"]
    said = command("train", *ALONE, *sweep, "epochs=1")
    assert (said.code, said.err) == (0, "")
    assert "student.blocks={layer1: G:4}" in said.out
    folders = sorted(str(one.parent) for one in (tmp_path / "runs").glob("*/**/summary.json"))
    assert len(folders) == 2
    table = command("table", *folders)
    assert "student.blocks.layer1=G(2)" in table.out.replace("G:2", "G(2)")


def test_a_run_with_a_genotype_resumes_to_the_same_weights(command, monkeypatch, tmp_path):
    assert command("train", *ALONE, *GENOTYPE, "out=whole").code == 0
    real = Trainer.end_epoch

    def stopped(self):
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", stopped)
        assert command("train", *ALONE, *GENOTYPE, "out=parts").code == 130
    said = command("train", "--resume", "parts")
    assert said.code == 0
    assert "resumed" in said.out
    states = [model_from_file(tmp_path / run).state_dict() for run in ("whole", "parts")]
    assert all(torch.equal(one, states[1][key]) for key, one in states[0].items())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{layer1: G:4, layer3.*: BG:2:M}", "--depth", "5,3,5"], "student.depth=5,3,5 student."),
        (["{}", "--depth", "{stage2: 3}"], "recipe: student.name=wrn_40_2 student.depth='{stage2"),
        (["G:4", "--depth=1,1,1"], "student.depth=1,1,1 student.block=G:4"),
        (['{"*.conv1": G:4}'], "student.blocks='{\"*.conv1\": G:4}'"),
    ],
)
def test_cheapen_counts_a_genotype_and_prints_its_keys(command, words, line):
    said = command("cheapen", "wrn_40_2", *words)
    assert (said.code, said.err) == (0, "")
    assert line in said.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{}"], "{} changes nothing: name blocks, or --depth"),
        (["{layer1: G:x}"], "blocks: layer1: there is no block 'G:x'"),
        (["{layer9: G:4}"], "blocks: layer9 names nothing in wrn_40_2: it has stage1, stage2"),
        (["{layer1: G:4}", "--where", "layer1"], "--where is for one block, and {layer1: G:4} sa"),
        (["G:4", "--depth", "x"], "student.depth=x: expected a mapping such as {name: value} or"),
        (["G:4", "--depth", "7,1,1"], "depth: stage1 of wrn_40_2 has 6 residual blocks, 7 can"),
    ],
)
def test_cheapen_says_what_cannot_be(command, words, sentence):
    said = command("cheapen", "wrn_40_2", *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"fastkd: {sentence}")
