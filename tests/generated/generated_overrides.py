"""Overrides `key=value`: what a key is worth afterwards, or that the words are refused."""

import random
import string
from functools import reduce
from pathlib import Path
from typing import Any

from generated_case import REFUSED, Case

from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe

__all__ = ["make"]

BASE = "quickstart"
# The folder of the data set is a key of folders.
BESIDE = {"data.root": ("data.name=folder",)}
# Keys of free text: whatever a file system allows.
TEXTS = ("out", "data.root", "student.weights", "teacher.weights", "description")
# Key, least and largest value that make a valid recipe.
WHOLE = {
    "epochs": (1, 10**6),
    "batch_size": (2, 10**5),
    "seed": (0, 2**31),
    "data.seed": (0, 2**31),
    "augment.cycle": (1, 10**6),
    "data.image_size": (1, 4096),
    "data.workers": (0, 512),
    "teacher.epochs": (1, 10**4),
}
REAL = {
    "optim.lr": (1e-8, 1e3),
    "optim.gamma": (1e-6, 10.0),
    "optim.power": (1e-3, 10.0),
    "optim.weight_decay": (0.0, 10.0),
    "losses.kd.weight": (1e-6, 1e6),
    "losses.kd.temperature": (1e-3, 1e3),
    "epoch_factor": (1e-3, 1e3),
}
SWITCHES = ("channels_last", "deterministic", "optim.nesterov", "optim.decay_norms")
WORDS = {
    "optim.name": ("sgd", "adam", "adamw", "lamb"),
    "optim.schedule": ("constant", "multistep", "exponential", "cosine", "poly", "onecycle"),
    "precision": ("fp32", "bf16", "fp16", "auto"),
    "compile": ("on", "off", "auto"),
    "device": ("cpu", "cuda", "auto"),
}
SPECIAL = "#,:;@*%&{}[]()!?|<>=+-~^`'\"\\/ ._"
LETTERS = string.ascii_letters + string.digits + "äßéñ漢字🙂²½Ⅷ"
# What YAML 1.1 reads as something else than text.
TYPED = (
    "2024",
    "2024-05-01",
    "2001-99-99",
    "1_000",
    "no",
    "Yes",
    "on",
    "0123",
    "0x1F",
    "0o17",
    "12:30:45",
    "12:99",
    "1e3",
    ".5",
    ".inf",
    ".NaN",
    "~",
    "Null",
    "true",
    "!!int a",
    "!!python/object:os.system",
    "&a b",
    "*a",
    "<<",
    "- a",
    "? a",
    "a: b",
    "a #b",
    "'",
    '"a',
    "[a",
    "{a",
    "{a: 1}",
    "[1, 2]",
    "---",
    "...",
    "%TAG",
    "@a",
    "`a`",
)
CONTROL = "\x00\x01\x07\x08\t\n\r\x1b\x7f\x85\x9b"
GARBAGE = (
    "",
    "=",
    "=1",
    "epochs",
    "--epochs",
    "--epochs=3",
    "epochs 3",
    ".=1",
    "a..b=1",
    ".epochs=1",
    "epochs.=1",
    "epochs.x=1",
    "optim=1",
    "optim=[1]",
    "losses=3",
    "losses.kd=7",
    "optim.lr.x=1",
    "data.mean.0.x=1",
    "losses.unknown.weight=1",
    "losses..weight=1",
    "optim.lr=null",
    "epochs=[[1]]",
    "epochs={a: 1}",
    "optim.milestones=a,b",
    "optim={lr: 0.1, lr: 0.2}",
    "optim={lr: !!float 1}",
    "losses={kd: &a {weight: *a}}",
)


def make(rng: random.Random, _: Path) -> Case:
    """One override of the quickstart recipe."""
    makers = (_text, _typed_text, _whole, _real, _switch, _word, _bad_number, _unknown, _garbage)
    words, key, expected = rng.choice(makers)(rng)

    overrides = [*BESIDE.get(key, ()), words]

    def run() -> Any:
        return _value_of(load_recipe(BASE, overrides=overrides), key)

    return Case(f"load_recipe({BASE!r}, overrides={overrides!r})", run, expected)


def _value_of(recipe: Recipe, key: str) -> Any:
    return reduce(
        lambda node, part: node[part] if isinstance(node, dict) else getattr(node, part),
        key.split("."),
        recipe,
    )


def _text(rng: random.Random) -> tuple[str, str, Any]:
    """Characters as they stand; those that no terminal shows are refused."""
    key = rng.choice(TEXTS)
    alphabet = LETTERS + SPECIAL
    raw = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40)))
    if rng.random() < 0.25:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice(CONTROL + "\ud800\udfff") + raw[at:]
        return f"{key}={raw}", key, REFUSED
    return f"{key}={raw}", key, raw if raw != "null" else None


def _typed_text(rng: random.Random) -> tuple[str, str, Any]:
    key = rng.choice(TEXTS[:-1])
    raw = rng.choice((*TYPED, "", "null"))
    return f"{key}={raw}", key, None if raw in ("", "null") else raw


def _whole(rng: random.Random) -> tuple[str, str, Any]:
    key = rng.choice(list(WHOLE))
    least, most = WHOLE[key]
    number = rng.choice((least, most, rng.randint(least, most)))
    text = rng.choice((str(number), f"+{number}", f" {number} ", f"{number}.0"))
    return f"{key}={text}", key, number


def _real(rng: random.Random) -> tuple[str, str, Any]:
    key = rng.choice(list(REAL))
    least, most = REAL[key]
    number = rng.choice((least, most, rng.uniform(least, most)))
    text = rng.choice((repr(number), f"{number:.17g}", f"{number:.12e}", f"+{number!r}"))
    return f"{key}={text}", key, number


def _switch(rng: random.Random) -> tuple[str, str, Any]:
    key, value = rng.choice(SWITCHES), rng.random() < 0.5
    text = rng.choice((str(value), str(value).lower(), str(value).upper()))
    return f"{key}={text}", key, value


def _word(rng: random.Random) -> tuple[str, str, Any]:
    key = rng.choice(list(WORDS))
    word = rng.choice(WORDS[key])
    if rng.random() < 0.4:
        wrong = rng.choice((word + "x", word[:-1] or "x", word[::-1] + "?", "7", "[a]", "{a: b}"))
        # Less its last letter, adamw is another word.
        return f"{key}={wrong}", key, wrong if wrong in WORDS[key] else REFUSED
    return f"{key}={word}", key, word


def _bad_number(rng: random.Random) -> tuple[str, str, Any]:
    key = rng.choice((*WHOLE, *REAL))
    digits = rng.choice(("9" * 5000, "1" * 400, "-1" + "0" * 400))
    wrong = ("-7", "nan", ".nan", ".inf", "-.inf", "1e999", "a", "1,2", "0x1F", "²", "1:30")
    wrong = (*wrong, "true", "{}", "[]", "''", "2024-05-01", "[" * 5000, "{a: " * 300, digits)
    return f"{key}={rng.choice(wrong)}", key, REFUSED


def _unknown(rng: random.Random) -> tuple[str, str, Any]:
    alphabet = string.ascii_lowercase + "._" + rng.choice(("", "é", "\x1b", "\n", "²", "\ud800"))
    key = "".join(rng.choice(alphabet) for _ in range(rng.choice((3, 8, 30, 500))))
    return f"zz{key}={rng.choice(('1', 'a', '', '[1]'))}", "name", REFUSED


def _garbage(rng: random.Random) -> tuple[str, str, Any]:
    return rng.choice(GARBAGE), "name", REFUSED
