"""YAML of a stranger: a plain value, or one sentence soon, and never anything else."""

import math
import time

import pytest

from fastkd.config.plain_yaml import MAX_DEPTH, NotPlain, plain_scalar, read_yaml, write_yaml
from fastkd.errors import UserError
from fastkd.models.blocks.grammar import parse_block
from fastkd.output.call_record import read_call, record
from fastkd.recipes.loading import load_recipe
from fastkd.report.labels import labels


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0.1", 0.1),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e-3", 1e-3),
        ("-1.5E+2", -150.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        *(
            (word, word)
            for word in ("no", "on", "Yes", "007", "0x1F", "0o7", "0b1", "1_000", "12:30", "1:2.5")
        ),
        *((word, word) for word in ("2024-05-01", "2001-99-99", "1.2.3", "²", "٣", "1e", ".", "-")),
        ("9" * 301, "9" * 301),
    ],
)
def test_what_a_word_means(word, value):
    found = plain_scalar(word)
    assert found == value and type(found) is type(value)


def test_merges_and_aliases_are_as_in_yaml():
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: *a\nd: {<<: [{x: 7}, *a]}\n"
    found = read_yaml(text)
    assert found["b"] == {"x": 3, "y": [2]} and found["d"] == {"x": 7, "y": [2]}
    found["c"]["y"].append(9)
    assert found["a"]["y"] == found["b"]["y"] == [2]


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + one] * 9)}]\n"
    for one, after in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE = {
    "date": "epochs: 2001-99-99",
    "tag int": "epochs: !!int a",
    "tag bool": "augment: {flip: !!bool x}",
    "tag float": "optim: {lr: !!float x}",
    "tag timestamp": "epochs: !!timestamp x",
    "tag binary": "out: !!binary x",
    "tag set": "epochs: !!set {a}",
    "python tag": "epochs: !!python/object/apply:os.system [ls]",
    "own tag": "epochs: !mine 3",
    "bare tag": "epochs: ! 3",
    "tag of a key": "!!str epochs: 3",
    "directive": "%TAG ! tag:x,2000:\n---\nepochs: !a 3",
    "sexagesimal": "epochs: 12:99",
    "long number": f"epochs: {'9' * 5000}",
    "long float": f"optim: {{lr: {'9' * 5000}.5}}",
    "superscript": "epochs: ²",
    "nan": "optim: {lr: .nan}",
    "inf": "optim: {lr: .inf}",
    "overflow": "optim: {lr: 1e999}",
    "deep flow": "epochs: " + "[" * 5000,
    "deep mapping": "epochs: " + "{a: " * 5000,
    "deep block": "\n".join(" " * n + "a:" for n in range(1000)),
    "deep list": "- " * 5000,
    "closed and deep": "epochs: " + "[" * 100 + "]" * 100,
    "twice": "epochs: 3\nepochs: 4",
    "twice inside": "optim: {lr: 1, lr: 2}",
    "twice in quotes": "epochs: 3\n'epochs': 4",
    "cycle": "epochs: &a [*a]",
    "cycle of mappings": "optim: &a {lr: *a}",
    "merged cycle": "optim: &a {<<: *a}",
    "unknown alias": "epochs: *a",
    "alias as key": "a: &a b\n*a : 3",
    "merged text": "optim: {<<: 3}",
    "laughs": LAUGHS,
    "key is a list": "? [a]\n: 3",
    "two documents": "epochs: 3\n---\nepochs: 4",
    "surrogate": 'out: "\\ud800"',
    "surrogates": '"\\ud800": 3',
    "nul": 'out: "a\\0b"',
    "escape": "epochs: \x1b[31m",
    "escaped escape": 'epochs: "\\e[31m"',
    "escape in a key": '"\\e[31mepochs": 3',
    "long key": f"{'k' * 100000}: 3",
    "many keys": "\n".join(f"k{n}: 1" for n in range(2000)),
    "long text": f"epochs: {'x' * 100000}",
    "tabs": "\tepochs: 3",
    "unclosed": 'epochs: "3',
    "reserved": "epochs: @3",
    "list": "[1, 2]",
    "number": "3",
}


def refused(**given):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", **given)
    assert caught.value.exit_code == 2
    for sentence in str(caught.value).split("\n"):
        assert sentence.isprintable() and len(sentence) <= 2000
    return time.perf_counter() - start, str(caught.value)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_soon(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    seconds = min(refused(config=tmp_path / "a.yaml")[0] for _ in range(2))
    # At most 0.035 on an idle core; several programs share the cores of a test.
    assert seconds < 0.5


@pytest.mark.parametrize(
    "override",
    [
        "epochs=2001-99-99",
        "epochs=!!int a",
        f"epochs={'9' * 5000}",
        f"optim.lr={'9' * 5000}",
        "epochs=²",
        "optim.milestones.²=1",
        f"optim.milestones.{'9' * 5000}=1",
        f"teacher.ensemble.{'9' * 5000}.name=x",
        f"optim.milestones={'[' * 20000}",
        f"optim.milestones={'[' * 30}1{']' * 30}",
        f"optim.milestones={'1,' * 60000}",
        f"losses={{{'a: {' * 40}",
        "losses={kd: {weight: 1}, kd: {weight: 2}}",
        "losses={at: &a {pairs: *a}}",
        "optim.lr=.nan",
        "optim.lr=-inf",
        "optim.milestones=.nan,0.5",
        "seed=1e30",
        "epochs={'a': \ud800}",
        f"{'a.' * 5000}b=1",
        f"{'a' * 5000}=1",
        "\x1b[2J=1",
        "epochs=\x1b[2J",
        "losses.\x1b[2J.weight=1",
        "student.block=\x1b[2J",
        f"student.block=G:{'9' * 5000}",
        f"student.block={'G' * 5000}",
        "student.block=BG(2,²)",
        f"name={'a' * 5000}\x7f",
        f"compile={'a' * 5000}",
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_a_hostile_override_is_refused_soon(override):
    seconds = min(refused(overrides=[override])[0] for _ in range(2))
    assert seconds < 0.5


@pytest.mark.parametrize(
    "name", ["G:{}", "G:N:{}", "B:{}", "BG:2:{}", "BG:{}:4", "BG:2:M:{}", "g{}"]
)
def test_numbers_of_blocks_are_bounded(name):
    assert parse_block(name.format("4" * 6))
    with pytest.raises(UserError, match="there is no block"):
        parse_block(name.format("4" * 7))


def test_a_file_may_be_of_windows_and_have_depth(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfname: quickstart\r\nepochs: 3\r\noptim: {lr: 1}\r\n")
    recipe = load_recipe(None, config=file)
    assert (recipe.epochs, recipe.optim.lr) == (3, 1.0)
    assert read_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(NotPlain, match="deep"):
        read_yaml("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_a_file_of_no_end_is_not_read_to_its_end():
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe("quickstart", config="/dev/zero")


def test_of_many_mistakes_the_first_are_explained(tmp_path):
    (tmp_path / "a.yaml").write_text("".join(f"k{n}: 1\n" for n in range(50)))
    _, said = refused(config=tmp_path / "a.yaml")
    lines = said.split("\n")
    assert len(lines) == 21 and lines[-1] == "and 30 more mistakes"


def test_the_place_of_a_mistake_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\noptim:\n  lr: !x 1\n")
    _, said = refused(config=tmp_path / "a.yaml")
    assert said.endswith("is not valid YAML (line 3, column 7: the tag !x is not allowed)")


@pytest.mark.parametrize(
    "text", ["123e456789012345", "1e5", "no", "007", "12:30", "null", "", "two\nlines", "a: b", "-"]
)
def test_what_is_written_is_read_as_the_same_text(text):
    values = {"digest": text, "inside": [text, {"deeper": text, "one": 1, "half": 0.5}]}
    assert read_yaml(write_yaml(values)) == values


@pytest.mark.parametrize("text", ["[" * 5000, LAUGHS, "made_by: !!set {fastkd.distill}", "\0"])
def test_a_call_record_and_a_sweep_label_of_a_stranger(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert read_call(tmp_path) is None
    (tmp_path / "config.yaml").write_text(record({"digest": "123e456789012345"}))
    assert read_call(tmp_path) == {"made_by": "fastkd.distill", "digest": "123e456789012345"}
    one, other = (f"losses={{a: {text}",), ("losses={at: {weight: 1}}",)
    assert len(set(labels([one, other]).values())) == 2
