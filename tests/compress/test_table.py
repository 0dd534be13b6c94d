"""The table of costs survives a kill in the middle of a line, and belongs to one machine."""

import json

import pytest

from fastkd.compress.proposing import Bench
from fastkd.compress.space import space_of
from fastkd.compress.table import RuntimeMeter, Table, Times
from fastkd.errors import RunFailed, UserError

HERE = {"on": "ort-cpu", "threads": "1", "cpu": "one"}


def test_rows_are_read_again(tmp_path):
    table = Table(tmp_path / "costs.jsonl", HERE)
    table.put("a", Times(1.0, 2.0, 3.0), label="x", block="S")
    again = Table(tmp_path / "costs.jsonl", HERE)
    assert again.get("a") == Times(1.0, 2.0, 3.0)
    assert again.get("b") is None


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_cut_line_is_measured_again(tmp_path, left):
    file = tmp_path / "costs.jsonl"
    table = Table(file, HERE)
    table.put("a", Times(1.0, 2.0, 3.0))
    whole = file.stat().st_size
    table.put("b", Times(4.0, 5.0, 6.0))
    file.write_bytes(file.read_bytes()[: whole + left])
    table = Table(file, HERE)
    assert table.get("a") and table.get("b") is None
    table.put("b", Times(7.0, 8.0, 9.0))
    assert Table(file, HERE).get("b") == Times(7.0, 8.0, 9.0)
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "3",
        "[" * 100_000,
        '{"key": [], "p10_ms": 1, "p50_ms": 1, "p90_ms": 1}',
        '{"key": "b", "p50_ms": 1}',
        '{"key": "b", "p10_ms": 1, "p50_ms": "1", "p90_ms": 1}',
        '{"key": "b", "p10_ms": 1, "p50_ms": NaN, "p90_ms": 1}',
        '{"key": "b", "p10_ms": 1, "p50_ms": -1, "p90_ms": 1}',
    ],
)
def test_a_damaged_line_is_measured_again_and_hides_no_other(tmp_path, line):
    file = tmp_path / "costs.jsonl"
    Table(file, HERE).put("a", Times(1.0, 2.0, 3.0))
    with file.open("a") as lines:
        lines.write(f"{line}\n")
    table = Table(file, HERE)
    assert table.get("a") and table.get("b") is None
    table.put("b", Times(4.0, 5.0, 6.0))
    again = Table(file, HERE)
    assert again.get("a") == Times(1.0, 2.0, 3.0) and again.get("b") == Times(4.0, 5.0, 6.0)


@pytest.mark.parametrize("change", [{"cpu": "other"}, {"threads": "2"}, {"onnxruntime": "1.30"}])
def test_a_table_of_elsewhere_is_refused(tmp_path, change):
    Table(tmp_path / "costs.jsonl", HERE)
    with pytest.raises(UserError, match=r"was measured elsewhere .*times do not carry over"):
        Table(tmp_path / "costs.jsonl", HERE | change)


@pytest.mark.parametrize("text", ['{"a": 1}\n', "hello\n", "\n", "3\n{}\n"])
def test_another_file_is_refused_and_stays(tmp_path, text):
    (tmp_path / "costs.jsonl").write_text(text)
    with pytest.raises(UserError, match="is no table of fastkd compress"):
        Table(tmp_path / "costs.jsonl", HERE)
    assert (tmp_path / "costs.jsonl").read_text() == text


def test_a_broken_clock_is_an_error(tmp_path):
    table = Table(tmp_path / "costs.jsonl", HERE)
    with pytest.raises(RunFailed, match="the clock said nan ms"):
        table.put("a", Times(1.0, float("nan"), 3.0))


def test_the_target_names_what_decides_a_time():
    one = RuntimeMeter("ort-cpu", 1, 1).target
    assert {"on", "threads", "batch", "cpu", "torch"} <= one.keys()
    assert one != RuntimeMeter("ort-cpu", 2, 1).target
    assert all(isinstance(value, str) for value in one.values())


def test_equal_layers_are_measured_once_and_slow_blocks_are_dropped(tmp_path, make_meter):
    said = []
    meter = make_meter(slow_groups=4)
    space = space_of("resnet20", 10, (3, 16, 16), {})
    bench = Bench(meter, Table(tmp_path / "t", meter.target), 10, (3, 16, 16), said.append)
    prices = bench.prices(space)
    graphs = list(space.graphs())
    assert meter.layers == len(graphs) == len({graph.key for graph, _ in graphs})
    # resnet20 has nine blocks of five shapes.
    assert len({graph.label for graph, _ in graphs}) == 5
    for slot in space.slots():
        assert {"G(4)", "G(8)"} <= {one.block for one in slot.choices}
        left = {slot.choices[number].block for number in prices.allowed(slot)}
        assert {"S", "G(2)", "B(2)"} <= left
        assert not left & {"G(4)", "G(8)", "G(16)", "G(N)", "BG(2,4)", "BG(2,M)"}
    assert any("G(4)" in line and "(slower, dropped)" in line for line in said)
    # Everything is in the table now.
    again = Bench(meter, Table(tmp_path / "t", meter.target), 10, (3, 16, 16), said.append)
    assert again.prices(space_of("resnet20", 10, (3, 16, 16), {})).of == prices.of
    assert meter.layers == len(graphs)
