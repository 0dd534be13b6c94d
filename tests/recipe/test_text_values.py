"""What stands behind `=` of a key for text is the text, whatever YAML would make of it."""

import random
import string
import time

import pytest

from fastkd.errors import UserError
from fastkd.recipe.overrides import parse_override
from fastkd.recipe.printing import annotated_yaml, recipe_to_yaml
from fastkd.recipes.loading import load_recipe
from fastkd.runs.sweep.grid import combinations

FOLDER = ["data.name=folder", "losses.at.weight=1", "losses.at.pairs.a=b"]


def load(*overrides):
    return load_recipe("quickstart", overrides=[*FOLDER, *overrides])


def at(recipe, key):
    return recipe.dotted()[key]


TEXTS = [
    "/d/set #2",
    "a,b",
    "a: b",
    "key: [1, 2",
    "@set",
    "*best",
    "&x",
    "!tag",
    "%x",
    "{a}",
    "{}",
    "[a]",
    '"/d/a,b"',
    "'quoted'",
    "it's",
    "2024",
    "2024-05-01",
    "1_000",
    "no",
    "on",
    "true",
    "0123",
    "0x1F",
    "12:30:45",
    "1e5",
    ".inf",
    "~",
    "Null",
    " two  spaces ",
    "C:\\data\\new",
    "C:\\",
    "-x",
    "--out",
    "?",
    "|",
    ">",
    "a=b",
    "ä/日本/🙂",
    "a;b",
    "$HOME",
    "`x`",
    "x" * 4000,
    " ".join(["long"] * 60),
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
@pytest.mark.parametrize(
    "key",
    ["data.root", "student.weights", "out", "teacher.weights", "losses.at.pairs.a", "student.stem"],
)
def test_a_text_is_taken_as_it_stands(key, text):
    assert at(load(f"{key}={text}"), key) == text


@pytest.mark.parametrize("key", ["data.root", "out", "teacher.weights", "student.block"])
def test_null_and_nothing_are_null(key):
    assert at(load(f"{key}=null"), key) is at(load(f"{key}="), key) is None


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_a_saved_recipe_gives_the_text_back(text, tmp_path):
    recipe = load(f"data.root={text}", f"description={text}", f"losses.at.pairs.a={text}")
    for number, written in enumerate((recipe_to_yaml(recipe), annotated_yaml(recipe))):
        file = tmp_path / f"{number}.yaml"
        file.write_text(written, encoding="utf-8")
        assert load_recipe(None, config=file) == recipe


def test_a_text_of_several_lines_survives_its_file(tmp_path):
    (tmp_path / "a.yaml").write_text('name: quickstart\ndescription: "one # 1\\n\\n two: 2\\n"\n')
    recipe = load_recipe(None, config=tmp_path / "a.yaml")
    assert recipe.description == "one # 1\n\n two: 2\n"
    (tmp_path / "b.yaml").write_text(annotated_yaml(recipe))
    assert load_recipe(None, config=tmp_path / "b.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("losses.kd.views=x, xprime", ["x", "xprime"]),
        ("losses.reviewkd.student=layer1.0,2,no", ["layer1.0", "2", "no"]),
        ('losses.reviewkd.student=["a,b", 2]', ["a,b", "2"]),
        ("losses.at.pairs={1: 2, a: no, b: 2024-05-01}", {"1": "2", "a": "no", "b": "2024-05-01"}),
        ("teacher.ensemble.0.weights=a,b #1", "a,b #1"),
        ("losses.at.pairs.0=12:30", "12:30"),
        ("compile=true", "true"),
        ("optim.name=adamw", "adamw"),
        ("optim.lr= 1e-3 ", 1e-3),
        ("teacher.class_map=0123,4", ["0123", 4]),
        ("student.shortcuts=false", False),
        ("teacher={name: 2024-05-01, train: true}", {"name": "2024-05-01", "train": True}),
    ],
)
def test_the_type_of_a_key_decides(text, value):
    assert parse_override(text) == (text.partition("=")[0], value)


def test_switches_take_on_and_true():
    assert [load(f"compile={word}").compile for word in ("on", "true", "off", "False")] == [
        "on",
        "on",
        "off",
        "off",
    ]
    assert load("teacher.class_map=0010,4", "teacher.weights=t.pt").teacher.class_map == (10, 4)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("out=run\r", r"out='run\r': '\r' cannot be part of a value, which Windows puts"),
        ("data.root=a\x1b[31mb", r"data.root='a\x1b[31mb': '\x1b' cannot be part of a value"),
        ("data.root=a\nb", r"data.root='a\nb': '\n' cannot be part"),
        ("data.root=a\udcffb", r"'data.root=a\udcffb' holds bytes that are not UTF-8"),
        ("epochs=true", "epochs=true: expected a whole number above 0"),
        ("optim.lr=false", "optim.lr=false: expected a number above 0"),
        ("baseline.lrs=0.1,true", "baseline.lrs=0.1,true: expected a list"),
        ("seed=9223372036854775808", "seed=9223372036854775808: expected a whole number of at le"),
        ("epochs=3\u200b", r"epochs='3\u200b': expected a whole number above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(override, sentence):
    with pytest.raises(UserError) as caught:
        load(override)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("data: {name: folder, root: 2024}", "data.root=2024: expected text, or null"),
        ("student: {weights: 1.5}", "student.weights=1.5: expected text, or null"),
        ("out: true", "out=true: expected text, or null"),
        ("teacher: {weights: [a, b]}", "teacher.weights=a,b: expected text, or null"),
    ],
)
def test_a_file_is_told_to_quote(line, shown, tmp_path):
    (tmp_path / "a.yaml").write_text(f"name: quickstart\n{line}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(None, config=tmp_path / "a.yaml")
    assert str(caught.value) == f"{shown}; in YAML put it in quotes"


@pytest.mark.parametrize("word", ["no", "2024-05-01", "0123", "12:30:45", "1_000", "0x1F", "off"])
def test_a_word_of_a_file_that_is_no_number_is_text(word, tmp_path):
    (tmp_path / "a.yaml").write_text(f"name: quickstart\ndata: {{name: folder, root: {word}}}\n")
    assert load_recipe(None, config=tmp_path / "a.yaml").data.root == word


def test_a_pair_of_a_file_is_told_to_quote(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: quickstart\nlosses: {at: {weight: 1, pairs: {layer1: 2}}}\n"
    )
    with pytest.raises(UserError, match=r"pairs=.*; in YAML put 2 in quotes$"):
        load_recipe(None, config=tmp_path / "a.yaml")


def test_a_sweep_has_texts_with_commas_and_semicolons():
    found = combinations(["data.root=/a;;b, #1;/c;;;;d", "seed=0;1"])
    assert found[::2] == [("data.root=/a;b, #1", "seed=0"), ("data.root=/c;;d", "seed=0")]
    assert parse_override(found[0][0]) == ("data.root", "/a;b, #1")
    assert combinations(["out=a;;;b"]) == [("out=a;",), ("out=b",)]
    for wrong in ("seed=0", "seed=0;", "seed=;1", "seed=0;;1", "=0;1"):
        with pytest.raises(UserError, match="at least two values"):
            combinations([wrong])


LETTERS = [
    *string.ascii_letters,
    *string.digits,
    *string.punctuation,
    " ",
    "ä",
    "日",
    "🙂",
    "²",
    "٣",
]
CONTROLS = ["\x1b[31m", "\r", "\n", "\t", "\x00", "\x7f", "\x85", "\udcff", "\u200b", "\xa0"]
WORDS = [
    "null",
    "true",
    "no",
    "2024-05-01",
    "1e5",
    "!!int ",
    "&a ",
    "*a",
    "<<: ",
    "[",
    "{",
    "- ",
    ": ",
]
ALPHABET = [*LETTERS, *CONTROLS, *WORDS]
REFUSED = {"\x1b", "\r", "\n", "\t", "\x00", "\x7f", "\x85", "\udcff"}
"""The control characters and halves of pairs among them."""


def test_five_hundred_random_overrides_are_right_or_refused():
    seed = 20261129
    print("seed", seed)
    draw = random.Random(seed)
    texts = ["data.root", "student.weights", "out", "teacher.weights", "losses.at.pairs.a"]
    kinds = {"value": 0, "refused": 0}
    for _ in range(500):
        raw = "".join(draw.choices(ALPHABET, k=draw.randint(0, 12)))
        key = draw.choice(texts)
        start = time.perf_counter()
        if REFUSED & set(raw) or (key.startswith("losses") and raw in ("", "null")):
            kinds["refused"] += 1
            with pytest.raises(UserError) as caught:
                load(f"{key}={raw}")
            assert caught.value.exit_code == 2
            assert str(caught.value).isprintable() and len(str(caught.value)) <= 2000
        else:
            kinds["value"] += 1
            assert at(load(f"{key}={raw}"), key) == (None if raw in ("", "null") else raw)
        assert time.perf_counter() - start < 1
    assert min(kinds.values()) > 100


@pytest.mark.parametrize("key", ["epochs", "seed", "optim.lr", "ema", "losses.kd.temperature"])
def test_random_numbers_are_right_or_refused(key):
    draw = random.Random(key)
    accepted = 0
    for _ in range(100):
        digits = draw.choice(["3", "0.25", "12", "1e-2", "+7", "0.5", "007"])
        raw = draw.choice([digits, digits + "".join(draw.choices(ALPHABET, k=2))])
        try:
            found = at(load(f"{key}={raw}"), key)
        except UserError:
            continue
        accepted += 1
        # Python's own reading of the characters.
        assert found == float(raw)
    assert accepted > 15
