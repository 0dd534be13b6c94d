"""`fastkd doctor --blocks`: which blocks of a network it finds, and the tables about them."""

import json
from types import SimpleNamespace

import pytest
import torch

from fastkd.cli import blocks
from fastkd.models.planner import BlockSpec, Choice
from fastkd.models.planner.spec import KINDS

MS = {"fused": 1.0, "plain": 2.5}


@pytest.fixture
def asked(monkeypatch):
    """The cases that the planner is asked about; it answers with MS, without reading a clock."""
    cases = []

    def choose(case):
        assert case.batch_statistics == case.training
        cases.append((case.spec, case.shape, case.dtype, case.training))
        kind = "fused" if case.training else "plain"
        return Choice(kind, MS, "measured")

    monkeypatch.setattr(blocks, "CHOOSER", SimpleNamespace(choose=choose))
    return cases


def facts(spec: BlockSpec, shape) -> tuple:
    return spec.in_channels, spec.out_channels, spec.stride, spec.residual, shape


def test_every_distinct_block_has_a_row_in_both_tables(command, asked):
    said = command("doctor", "--blocks", "wrn_16_2", "G:4", "--batch", "8", "--precision", "fp32")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("wrn_16_2 with G:4, 8x3x32x32, fp32, ")
    # Twelve blocks: of each stage one changes the width, and two are added to their input.
    training = [case for case in asked if case[3]]
    assert [facts(*case[:2]) for case in training] == [
        (16, 32, 1, False, (8, 16, 32, 32)),
        (32, 32, 1, True, (8, 32, 32, 32)),
        (32, 32, 1, False, (8, 32, 32, 32)),
        (32, 64, 2, False, (8, 32, 32, 32)),
        (64, 64, 1, True, (8, 64, 16, 16)),
        (64, 64, 1, False, (8, 64, 16, 16)),
        (64, 128, 2, False, (8, 64, 16, 16)),
        (128, 128, 1, True, (8, 128, 8, 8)),
        (128, 128, 1, False, (8, 128, 8, 8)),
    ]
    assert {case[0].groups for case in training} == {4}
    assert [case[:3] for case in asked[9:]] == [case[:3] for case in training]
    assert {case[2] for case in asked} == {torch.float32}
    row = next(line for line in lines if line.startswith("  32 -> 8 a group -> 32, residual "))
    assert row.split()[-6:] == ["32x32x32", "2", "fused", "1", "2.5", "2.50x"]
    assert sum("together" in line for line in lines) == 2
    total = next(line for line in lines if "together" in line)
    assert total.split() == ["together", "12", "12", "ms", "12", "30", "2.50x"]
    assert lines[-1].split()[-4:] == ["ms", "12", "30", "1.00x"]


def test_the_tables_as_json(command, asked):
    said = command("doctor", "--blocks", "wrn_16_1", "G:N", "--input", "3x16x16", "--json")
    rows = json.loads(said.out)
    assert sum(row["times"] for row in rows if row["direction"] == "training") == 12
    assert rows[0]["ms"] == MS and rows[0]["source"] == "measured"
    assert {row["direction"] for row in rows} == {"training", "inference"}
    assert len(asked) == len(rows)


def test_other_networks_get_the_block_too(command, asked):
    said = command("doctor", "--blocks", "timm:resnet18", "G:8", "--input", "3x64x64")
    assert said.code == 0, said.err
    assert facts(*asked[0][:2]) == (64, 64, 1, False, (32, 64, 16, 16))


def test_inverted_residuals_are_found_as_they_are(command, asked):
    said = command("doctor", "--blocks", "timm:mobilenetv2_100", "--input", "3x64x64")
    assert said.code == 0, said.err
    blocks = [(*facts(*case[:2]), case[0].expand) for case in asked if case[3]]
    assert blocks[:3] == [
        (32, 16, 1, False, (32, 32, 32, 32), None),
        (16, 24, 2, False, (32, 16, 32, 32), 96),
        (24, 24, 1, True, (32, 24, 16, 16), 144),
    ]


def test_the_planner_itself_is_asked(command, monkeypatch):
    """With the committed costs, so that no clock is read."""
    monkeypatch.setenv("FASTKD_PLANNER", "table")
    said = command("doctor", "--blocks", "wrn_10_1", "G:N", "--json", "--precision", "fp32")
    assert said.code == 0, said.err
    assert {row["choice"] for row in json.loads(said.out)} <= set(KINDS)
    assert {row["source"] for row in json.loads(said.out)} <= {"table", "default"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--blocks", "wrn_10_1"],
            "that can run as one op; give a block to put into it: fastkd",
        ),
        (["--blocks", "wrn_10_1", "G:4", "G:8"], "--blocks takes a network and a block, got wrn"),
        (["--blocks", "wrn_10_1", "G:3"], "3"),
        (["--blocks", "wrn_10_1", "G:4", "--input", "7"], "expected CxHxW such as 3x32x32"),
        (["--blocks", "wrn_10_1", "G:4", "--input", "4x8x8"], "fails on images of [4, 8, 8]"),
        (["--blocks", "wrn_10_1", "G:4", "--precision", "int8"], "precision=int8 is unknown"),
        (["--batch", "4"], "--batch says how --blocks measures"),
        (["--precision", "fp32"], "--precision says how --blocks measures"),
    ],
)
def test_wrong_requests_are_one_sentence(words, sentence, command, asked):
    said = command("doctor", *words)
    assert said.code == 2
    assert sentence in said.err
    assert said.err.startswith("fastkd: ") and said.err.count("\n") <= 2
    assert asked == []
