"""Every block of code on the pages is run or parsed by a test, or says why not.

Python runs page by page, in order, with the names of `names_of`. A command is parsed by fastkd's
own parser, and its recipe, with all runs of a sweep, resolved. A block that neither is possible for
has `<!-- not run: REASON -->` in the line above it. Pages that need more have a test of their own.
"""

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastkd.cli.arguments import parse
from fastkd.cli.running import swept
from fastkd.losses.base.catalogue import entry_of
from fastkd.models import create_model
from fastkd.models.card import card_of, sign
from fastkd.recipes.catalogue import find_entry
from fastkd.recipes.listing import matching
from fastkd.recipes.loading import load_recipe
from fastkd.runs.sweep.baselines import with_baselines
from fastkd.runs.sweep.grid import check_sweep, combinations
from fastkd.storage.facts import DataFacts, Framing
from fastkd.storage.weights import describe, save_weights
from tests.docs.page_names import names_of_pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SESSIONS = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
# Pages whose Python has a test of its own.
PYTHON_ELSEWHERE = {
    "compress.md": "test_compress_docs.py",
    "distill.md": "test_distill_docs.py",
    "export.md": "test_export_docs.py",
    "genotypes.md": "test_genotype_docs.py",
    "latency.md": "test_latency_docs.py",
    "README.md": "test_readme.py",
    "transfer.md": "test_transfer_docs.py",
}
# Stands for any recipe, in the words of a page.
ANY_RECIPE = "cifar10/resnet56--resnet20/kd"
FENCE = re.compile(
    r"(?P<above>^[^\n]*\n)?^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
NOT_RUN = re.compile(r"<!-- not run: \w.* -->")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    excused: bool

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        excused = bool(NOT_RUN.fullmatch((found["above"] or "").strip()))
        name = page.relative_to(ROOT).as_posix().removeprefix("docs/")
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(name, line, found["language"], found["text"], excused)


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if not block.excused]
PYTHON = sorted({b.page for b in RUN if b.language == "python"} - set(PYTHON_ELSEWHERE))
SHELL = [block for block in RUN if block.language == "bash"]


def lines_of(block: Block) -> list[str]:
    """Commands of a block, without comments and continuations."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = (re.sub(r"(?:^|\s+)#(?: .*|!.*|)$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def braces(word: str) -> list[str]:
    """`a/{b,c}` as the shell expands it; words in quotes are not asked."""
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", word)
    choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def words_of(line: str) -> list[str]:
    bare = {word: braces(word) for word in line.split() if not set(word) & set("'\"")}
    return [one for word in shlex.split(line) for one in bare.get(word, [word])]


def check_command(words: list[str]) -> None:
    """`fastkd WORDS`: options exist, and recipes resolve."""
    words = [ANY_RECIPE if word == "RECIPE" else word for word in words]
    options = parse(words)
    given: list[str] = getattr(options, "words", [])
    if options.command in ("train", "compare"):
        named = [word for word in given if "=" not in word]
        overrides = [word for word in given if "=" in word]
        choices = combinations(options.sweep) if options.sweep else [()]
        if options.command == "compare":
            choices = [(f"recipe={name}", *one) for name in named for one in choices]
        elif named:
            choices = [(f"recipe={named[0]}", *one) for one in choices]
        if options.command == "train" and not options.sweep:
            (name, *more) = named or ["quickstart"]
            assert not more
            assert options.config or load_recipe(name, overrides=overrides)
            return
        recipes = swept(choices, overrides)
        check_sweep(recipes)
        if options.command == "compare":
            with_baselines(recipes, as_named=any("baseline.lrs=" in word for word in overrides))
    elif options.command in ("cache", "bench"):
        assert load_recipe(given[0], overrides=given[1:])
    elif options.command == "recipes" and given:
        found = find_entry(given[1]) if given[0] == "show" else matching(given[0])
        assert found
    elif options.command == "losses" and options.name:
        assert entry_of(options.name)


def check_line(line: str) -> None:
    """Raises if a line of a shell block is neither understood nor known to be harmless."""
    for part in line.split(" && "):
        words = words_of(part)
        if words[0] == "torchrun":
            at = words.index("-m")
            module, *rest = words[at + 1 :]
            assert all(word.startswith("--") for word in words[1:at])
            assert module in ("fastkd", "fastkd.train")
            check_command(["train", *rest] if module == "fastkd.train" else rest)
        elif words[0] == "fastkd":
            check_command(words[1:])
        elif words[:2] == ["pip", "install"]:
            extras = {one for word in words for one in re.findall(r"\[(.*)\]", word)}
            extras = {one for joined in extras for one in joined.split(",")}
            assert extras <= set(PROJECT["optional-dependencies"])
            assert words[-1].startswith((".", "fastkd"))
        elif words[0] in ("python", "pytest"):
            files = [word for word in words[1:] if word.endswith(".py")]
            assert files or words[0] == "pytest"
            assert [file for file in files if not (ROOT / file).exists()] == []
        elif words[0] == "nox":
            assert {words[at + 1] for at, word in enumerate(words) if word == "-s"} <= SESSIONS
        elif words[0] == "export":
            assert re.fullmatch(r"[A-Z_]+=\S+", words[1])
        else:
            pytest.fail(f"{part!r} is not a command that this test knows: mark its block not run")


def names_of() -> dict[str, Any]:
    """The names that pages take for granted; RUN is a folder that holds a network."""
    names = names_of_pages()
    saved: Any = create_model("resnet8", 4, width=0.25)
    facts = DataFacts(classes=("a", "b", "c", "d"), evaluation=Framing(resize=8, crop=8))
    sign(saved, replace(card_of(saved), data=facts))
    Path("RUN").mkdir()
    save_weights(Path("RUN/best.safetensors"), saved, describe(saved))
    return names


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of()
    for block in RUN:
        if block.page == page and block.language == "python":
            # As many lines in front as on the page, so that a traceback names the right one.
            exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), names)


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_the_commands_of_a_block_are_understood(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--config" in block.text:
        pytest.fail(f"{block.place} reads a file: mark it not run")
    lines = lines_of(block)
    assert lines
    monkeypatch.chdir(tmp_path)  # nothing is written; if it were, then here
    for line in lines:
        check_line(line)


def test_pages_with_a_test_of_their_own_have_one() -> None:
    for page, test in PYTHON_ELSEWHERE.items():
        assert f'"{page}"' in (Path(__file__).parent / test).read_text()
        assert any(block.page == page and block.language == "python" for block in BLOCKS)


def test_every_block_has_a_language_that_is_tested_or_none() -> None:
    """A plain fence shows output or a formula: it must not hide commands."""
    assert {block.language for block in BLOCKS} <= {"", "bash", "python", "mermaid"}
    command = re.compile(r"^(?:fastkd \w|torchrun |pip install |pytest |nox -s)", re.MULTILINE)
    hidden = [block.place for block in RUN if not block.language and command.search(block.text)]
    assert hidden == []


def test_wrong_lines_are_noticed() -> None:
    """What this file promises: a page cannot show what does not exist."""
    for line in (
        "fastkd trian quickstart",
        "fastkd train cifar10/resnet56--resnet20/no_such_method",
        "fastkd train quickstart optim.learning_rate=1",
        "fastkd train --sweep 'seed=0;1' --sweep 'student.blocc=G:4'",
        "fastkd compare cifar10/resnet56--resnet20/{kd,no_such_method} --seeds 2",
        "fastkd recipes no_such_paper",
        "pip install -e '.[no_such_extra]'",
        "python benchmarks/no_such_file.py",
        "make install",
    ):
        with pytest.raises((Exception, pytest.fail.Exception)):
            check_line(line)


def test_the_blocks_were_found() -> None:
    assert len(PYTHON) >= 6
    assert len(SHELL) >= 60
    assert [block.place for block in BLOCKS if block.excused]
