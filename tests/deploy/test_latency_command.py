"""`fastkd latency` as people meet it: tables, JSON, and the script on a device without torch."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from fastkd.deploy.latency.alone import Asked
from fastkd.deploy.latency.record import LatencyReport
from fastkd.deploy.latency.script import PARTS, script_text, write_script
from fastkd.deploy.latency.subject import open_subject, size_of
from fastkd.models import create_model
from fastkd.models.card import card_of
from fastkd.storage.facts import DataFacts, Framing
from fastkd.storage.weights import save_weights

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_a_network_is_measured_printed_and_written(command, fast, tmp_path):
    words = ["--size", "16", "--batch", "1,2", "--layers", "--json", "out.json"]
    said = command("latency", "resnet8", "--on", "eager,ort-cpu", *words)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("resnet8 on ")
    assert lines[2].split()[:5] == ["on", "input", "threads", "p10", "ms"]
    assert [line.split()[:3] for line in lines[3:7]] == [
        [on, f"{batch}x3x16x16", "1"] for on in ("eager", "ort-cpu") for batch in (1, 2)
    ]
    assert sum(line.startswith("Layers on ") for line in lines) == 4
    assert any(line.startswith("Clock: time.perf_counter") for line in lines)
    assert "compared with plain torch" in said.out
    report = LatencyReport.read(tmp_path / "out.json")
    assert [row.input for row in report.rows] == [(1, 3, 16, 16), (2, 3, 16, 16)] * 2
    assert all(row.layers and row.difference is not None for row in report.rows)
    # What is read back is what was written, and shown as it was.
    assert report.plain() == json.loads((tmp_path / "out.json").read_text())
    again = command("latency", "--read", "out.json")
    assert (again.code, again.out) == (0, said.out)


def test_a_run_and_a_file_with_its_network(command, fast, tmp_path):
    model = create_model("resnet8", 7, width=0.5)
    folder = tmp_path / "run"
    folder.mkdir()
    save_weights(folder / "best.safetensors", model)
    for what in ("run", "run/best.safetensors"):
        said = command("latency", what, "--on", "eager", "--size", "8x12")
        assert said.code == 0, said.err
        assert f"resnet8 ({what}) on " in said.out and "1x3x8x12" in said.out
    subject = open_subject("resnet8", tmp_path, weights=str(folder))
    card = card_of(subject.model)
    assert card is not None and (card.num_classes, card.options["width"]) == (7, 0.5)
    torch.save(create_model("resnet8", 7).state_dict(), tmp_path / "plain.pt")
    said = command("latency", "resnet8", "--weights", "plain.pt")
    sentence = "plain.pt does not say how many classes its network has: set --classes"
    assert said.err == f"fastkd: {sentence}\n"
    said = command("latency", "run", "--classes", "3")
    sentence = "run says itself what it is: leave out --weights, --classes and student keys"
    assert said.err == f"fastkd: {sentence}\n"
    assert command("latency", "run", "student.width=1").err == said.err


def test_keys_of_a_network_by_name(command, fast, monkeypatch):
    built = []

    def spied(*of, **options):
        built.append((*of, options))
        return create_model(*of, **options)

    monkeypatch.setattr("fastkd.deploy.latency.subject.create_model", spied)
    keys = ["student.blocks={layer1: G:4}", "student.depth=1,1,1", "student.dropout=0.3"]
    said = command("latency", "wrn_16_2", *keys[:2], "--on", "eager", keys[2], "--size", "8")
    assert said.code == 0, said.err
    assert said.out.startswith("wrn_16_2 dropout=0.3 {layer1: G(4)} depth 1-1-1 on ")
    options = {"dropout": 0.3, "blocks": {"layer1": "G(4)"}, "depth": [1, 1, 1]}
    assert built == [("wrn_16_2", 100, options)]
    for word in ("wrn_40_2", "data.image_size=8", "student.weights=x"):
        said = command("latency", "wrn_16_2", word)
        assert said.code == 2
        assert said.err.startswith(f"fastkd: {word}: expected student.KEY=VALUE with a KEY of")


def test_the_size_is_the_networks_own(tmp_path, any_size, onnx_file):
    def size(what, asked=None):
        return size_of(open_subject(str(what), tmp_path), asked)

    assert size("resnet8") == (32, 32)
    assert size("timm:test_resnet") == (160, 160)
    assert size("torchvision:squeezenet1_0") == (224, 224)
    assert (size(onnx_file), size(any_size)) == ((8, 8), None)
    assert size("resnet8", (3, 4)) == (3, 4)
    data = DataFacts(image_size=40, evaluation=Framing(resize=36, crop=24))
    save_weights(tmp_path / "net.safetensors", create_model("resnet8", 7), data.to_metadata())
    assert size(tmp_path / "net.safetensors") == (24, 24)


def test_a_file_is_measured_and_what_is_missing_is_said(command, fast, onnx_file):
    said = command("latency", str(onnx_file), "--on", "ort-cpu,eager,ort-cuda", "--batch", "2")
    assert said.code == 0, said.err
    assert "  eager: an ONNX file has no torch network: name the network or the run" in said.out
    if not torch.cuda.is_available():
        assert "  ort-cuda: " in said.out and "CUDAExecutionProvider" in said.out
    said = command("latency", str(onnx_file), "--on", "eager", "--json", "o.json")
    assert said.code == 2
    assert said.err == "fastkd: nothing could be measured: what is missing is said above\n"
    assert not Path("o.json").exists()


def test_a_wrong_answer_ends_with_code_1_after_the_rest(command, fast, monkeypatch):
    from fastkd.deploy.latency.backends import Subject

    right = Subject.answer
    monkeypatch.setattr(Subject, "answer", lambda *of: [one + 100 for one in right(*of)])
    said = command("latency", "resnet8", "--on", "eager", "--batch", "1,2")
    assert said.code == 1
    assert said.out.count("eager, batch ") == 2
    assert said.err.startswith("fastkd: eager: its answer differs by 1 of the largest value")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["resnet8", "--on", "eager", "--json", "mine"],
        ["--script", "mine"],
    ],
)
def test_a_file_that_is_there_stays(command, words, monkeypatch, tmp_path):
    monkeypatch.setattr("fastkd.cli.latency.measure_all", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "mine").write_text("years")
    said = command("latency", *words)
    assert said.code == 2
    assert said.err == "fastkd: mine exists: remove it, or choose another name\n"
    assert (tmp_path / "mine").read_text() == "years"
    said = command("latency", *words[:-1], "no/mine")
    assert (said.code, said.err) == (2, "fastkd: there is no folder no\n")


def test_a_network_that_fails_at_this_size_is_a_sentence(command, fast):
    said = command("latency", "timm:test_vit", "--size", "30", "--on", "eager", "--classes", "3")
    assert said.code == 1 and said.err.count("\n") == 1
    assert said.err.startswith("fastkd: eager: the network fails on an input of 1x3x30x30 (")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "the file: "),
        ("{}", "format: Field required"),
        (json.dumps({"format": "fastkd latency 1", "rule": {}}), "network: Field required"),
        ('{"format": "fastkd latency 2"}', "format: Input should be 'fastkd latency 1'"),
    ],
)
def test_a_foreign_json_is_a_sentence(command, text, sentence, tmp_path):
    (tmp_path / "a.json").write_text(text)
    said = command("latency", "--read", "a.json")
    assert said.code == 2 and said.err.count("\n") == 1
    assert said.err.startswith("fastkd: a.json ") and sentence in said.err


def test_the_script_is_one_file_of_plain_parts():
    text = script_text(Asked(["ort-cpu"], [1, 8], [2]))
    body = ast.parse(text).body
    modules = {
        name.partition(".")[0]
        for node in ast.walk(ast.Module(body, []))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
        if name
    }
    assert modules - sys.stdlib_module_names == {"numpy", "onnxruntime"}
    # A name of one part must not hide that of another.
    names = Counter(
        name
        for node in body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [ast.unparse(one) for one in getattr(node, "targets", [])]
        )
    )
    twice = {name for name, number in names.items() if number > 1}
    assert not twice, twice
    assert "BATCHES, THREADS, ON = [1, 8], [2], ['ort-cpu']" in text
    for part in PARTS:
        source = files("fastkd.deploy.latency").joinpath(f"{part}.py").read_text()
        words = ast.get_docstring(ast.parse(source))
        assert words and words.splitlines()[0] not in text
    assert "fastkd.deploy" not in text and "__all__" not in text


@pytest.fixture
def elsewhere(tmp_path):
    """Run a script where torch and fastkd cannot be imported."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "fastkd", "onnx", "pydantic", "rich"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not on this device')")

    def run(*words):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    assert run("-c", "import torch").returncode == 1
    return run


def test_the_script_measures_without_torch_and_its_json_is_read(
    command, elsewhere, tmp_path, onnx_file
):
    said = command("latency", "--script", "there.py", "--batch", "2,3")
    assert said.code == 0 and "python there.py FILE.onnx" in said.out
    (tmp_path / "net.onnx").write_bytes(onnx_file.read_bytes())
    done = elsewhere("there.py", "net.onnx", "--layers")
    assert done.returncode == 0, done.stderr
    report = LatencyReport.read(tmp_path / "net.json")
    (row,) = report.rows
    assert (row.input, row.threads, row.on) == ((2, 3, 8, 8), 1, "ort-cpu")
    assert row.calls >= 50 and row.layers and row.difference is not None
    assert [(one.batch, one.reason) for one in report.missing] == [
        (3, "the file takes batches of 2 only")
    ]
    assert "torch" not in report.versions and "onnxruntime" in report.versions
    shown = command("latency", "--read", "net.json")
    assert shown.code == 0
    assert done.stdout == f"{shown.out}Written: net.json\n"


def test_words_of_the_script_and_its_errors(elsewhere, tmp_path, any_size):
    write_script(tmp_path / "s.py", Asked(["ort-cpu"], [1], [1]))
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    done = elsewhere("s.py", "bad.onnx", "--json", "b.json")
    assert done.returncode == 1 and "onnxruntime cannot open bad.onnx" in done.stdout
    assert not (tmp_path / "b.json").exists()
    for words in (["mine.json"], [any_size, "--json", "mine.json"]):
        (tmp_path / "mine.json").write_text("years")
        done = elsewhere("s.py", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("mine.json exists: remove it, or choose another name")
        assert (tmp_path / "mine.json").read_text() == "years"
    for words in (["--batch", "x"], ["--on", "eager"], ["--size", "1x2x3"]):
        done = elsewhere("s.py", any_size, *words)
        assert done.returncode == 2 and "expected" in done.stderr
    words = ["--size", "9x11", "--threads", "2", "--json", tmp_path / "a.json"]
    assert elsewhere("s.py", any_size, *words).returncode == 0
    (row,) = LatencyReport.read(tmp_path / "a.json").rows
    assert (row.input, row.threads) == ((1, 3, 9, 11), 2)


def test_several_results_are_shown_under_each_other(command, fast, tmp_path):
    for name in ("a", "b"):
        command("latency", "resnet8", "--on", "eager", "--json", f"{name}.json")
    said = command("latency", "--read", "a.json", "b.json")
    assert said.out.count("resnet8 on ") == 2
