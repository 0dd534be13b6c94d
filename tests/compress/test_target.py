"""Targets are read or refused in one sentence, and judged by what was measured."""

import json

import pytest

from fastkd.cli import compressing
from fastkd.cli.arguments import parse
from fastkd.compress.folder import CompressFolder
from fastkd.compress.report import Row, result_of, spearman, verdict
from fastkd.compress.target import Target
from fastkd.errors import UserError


@pytest.mark.parametrize(
    ("text", "original", "limit"),
    [
        ("latency=5ms", 20.0, 5.0),
        ("latency=0.005s", 20.0, 5.0),
        ("latency=250us", 20.0, 0.25),
        ("latency=.5x", 3.0, 1.5),
        ("macs=0.3x", 1e9, 3e8),
        ("macs=41M", 1e9, 4.1e7),
        ("params=1M", 1e7, 1e6),
        ("params=2500", 1e7, 2500),
    ],
)
def test_a_target_is_a_limit(text, original, limit):
    assert Target.parse(text).limit(original) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("5ms", "--target 5ms: expected latency=5ms, latency=0.5x"),
        ("size=1M", "--target size=1M: expected latency=5ms"),
        ("latency=5", "expected a number with one of us, ms, s, x behind it"),
        ("latency=5M", "expected a number with one of us, ms, s, x behind it"),
        ("params=1ms", "expected a number with one of k, M, G, x behind it"),
        ("latency=-1ms", "expected a number with one of"),
        ("latency=nanms", "expected a number with one of"),
        ("latency=0ms", "expected a value above 0"),
        ("latency=1x", "expected a value between 0x and 1x, a share of the original"),
        ("macs=0x", "expected a value between 0x and 1x"),
        ("params=" + "9" * 400, "expected a smaller number"),
        ("macs=" + "9" * 308 + "G", "expected a smaller number"),
    ],
)
def test_a_wrong_target_is_one_sentence(text, sentence):
    with pytest.raises(UserError) as error:
        Target.parse(text)
    assert sentence in str(error.value)


def test_a_missed_target_is_never_claimed():
    target = Target.parse("latency=2ms")
    assert verdict(target, 2.0, 2.0) == (
        True,
        "target latency of 2 ms met: 2 ms measured, at most 2 ms asked for",
    )
    met, sentence = verdict(target, 2.06, 2.0)
    assert not met
    assert "missed: 2.06 ms measured, 3.0% above the 2 ms asked for; it is not claimed" in sentence


@pytest.mark.parametrize(
    ("target", "limit", "chosen_ms", "met"),
    [
        ("latency=0.5x", None, 2.0, True),
        ("latency=0.5x", None, 2.01, False),
        ("latency=1.9ms", 1.9, 2.0, False),
        ("latency=0.5x", None, float("nan"), False),
        ("params=0.5x", 500.0, 9.0, True),
        ("params=0.4x", 400.0, 0.1, False),
    ],
)
def test_every_file_says_met_or_missed(tmp_path, target, limit, chosen_ms, met):
    """The original has 4 ms and 1000 parameters, the student 500."""
    folder, said = CompressFolder(tmp_path / "out", {}), []
    rows = [
        Row("original", "", [0.9], [3.9, 4.0, 90.0], 10, 1000),
        Row("chosen", "", [0.8], [0.9, chosen_ms, 3.0], 5, 500),
        Row("depth-scaled", "", [0.7], [0.1, 0.2, 0.3], 1, 1),
    ]
    asked = Target.parse(target)
    found = result_of(rows, asked, folder, limit=limit, extra={}, say=said.append)
    assert found["met"] is met
    word = "met:" if met else "missed:"
    assert word in found["verdict"] and found["verdict"] in said
    assert json.loads((folder.path / "result.json").read_text())["met"] is met
    assert found["verdict"] in (folder.path / "table.md").read_text()


@pytest.mark.parametrize(
    ("result", "code"), [({"met": True}, 0), ({"met": False}, 1), (None, 0)], ids=str
)
def test_a_miss_is_an_exit_code(tmp_path, monkeypatch, result, code):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(compressing, "compress", lambda *args: result)
    words = ["resnet8", "--target", "macs=0.5x", "data.name=digits", "--out", str(tmp_path)]
    keys = ["data.image_size=null", "augment.crop=none", "augment.flip=false", "device=cpu"]
    options = parse(["compress", *words, *keys])
    assert compressing.compress_model(options) == code


def test_rank_correlation_with_ties():
    # By hand: ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3.
    assert spearman([1, 5, 5, 9], [10, 30, 20, 40]) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [1]) is None
