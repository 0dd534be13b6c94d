"""From the name of a loss to formula, paper, reference, oracle and test: docs/losses.md leads on.

The page is made from the code; a loss that is added without its row, a docstring that lacks a
field, a test that does not know the loss and a file that is gone fail here.
"""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from fastkd.cli.commands import main
from fastkd.errors import UserError
from fastkd.losses.base.catalogue import FIELDS, catalogue, entry_of
from fastkd.losses.base.registry import ALIASES, NO_LOSSES, called, config_class, plain, term_names
from fastkd.recipes.loading import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "losses.md"
names = pytest.mark.parametrize("name", term_names())


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_losses", ROOT / "docs" / "make_losses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says() -> None:
    same = PAGE.read_text() == generator().page()
    assert same, "docs/losses.md is out of date: python docs/make_losses.py"


def test_every_link_leads_somewhere() -> None:
    page = PAGE.read_text()
    targets = re.findall(r"\]\((.*?)\)", page)
    headings = {f"#{name}" for name in re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)}
    assert headings == {f"#{name}" for name in term_names()}
    for target in targets:
        if target.startswith("#"):
            assert target in headings
        elif target.startswith("../"):
            assert (PAGE.parent / target).is_file(), target
        else:
            known = (
                r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|github\.com/[\w-]+/[\w-]+/blob/[\w/.-]+)"
            )
            assert re.fullmatch(known, target), target


@names
def test_a_loss_names_its_origin_and_its_proof(name: str) -> None:
    entry = entry_of(name)
    assert isinstance(config_class(name)(**required(name)).build(name), entry.term)
    assert name == "ce" or re.search(r"arXiv:\d{4}\.\d{4,5}|NeurIPS|CVPR|AlignKD", entry.source)
    of_torch = "`torch.nn." in entry.source
    assert of_torch or re.search(r"[\w-]+/[\w-]+(@\w+)? [\w/-]+\.py", entry.source)
    texts = {path: (ROOT / path).read_text() for path in entry.tests}
    tests = {path: text for path, text in texts.items() if path.endswith(".py")}
    assert any(re.search(rf"\b{entry.term.__name__}\b", text) for text in tests.values())
    for oracle in texts.keys() - tests.keys():
        assert any(Path(oracle).name in text for text in tests.values()), oracle


@names
def test_the_command_names_proofs_by_their_path(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["losses", name]) == 0
    shown = capsys.readouterr().out
    proof = shown.partition("\nTests: ")[2].partition("\n\n")[0]
    paths = re.findall(r"[\w./-]+\.(?:py|json)", proof)
    assert paths and all("/" in path and (ROOT / path).is_file() for path in paths)
    assert tuple(paths) == entry_of(name).tests
    word = {"at": "attention", "soft_ce": "meal_v2"}.get(name, name)
    for oracle in (path for path in paths if path.endswith(".json")):
        text = f"{Path(oracle).name} {(ROOT / oracle).read_text()}"
        assert re.search(rf"(?<![A-Za-z]){word}(?![A-Za-z])", text), f"{oracle} has no {word}"


@names
def test_weight_and_keys_are_those_of_the_class(name: str) -> None:
    entry = entry_of(name)
    arguments = inspect.signature(entry.term).parameters
    fields = config_class(name).model_fields
    stated = float(re.findall(r"^\d+(?:\.\d+)?", entry.weight)[0])
    assert stated == arguments["weight"].default
    for key, field in fields.items():
        if not field.is_required() and arguments[key].default is not inspect.Parameter.empty:
            assert field.default == arguments[key].default, key
        assert field.description, key


def required(name: str) -> dict[str, object]:
    """Values for the keys that a recipe must give."""
    values = {"weight": 1.0, "ce_weight": 0.1, "pairs": {"stage1": "stage1"}}
    if name == "fsp":
        values["pairs"] = {"stage1": "stage1", "stage2": "stage2"}
    fields = config_class(name).model_fields
    return {key: values[key] for key, field in fields.items() if field.is_required()}


def test_a_docstring_without_a_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    term = entry_of("sp").term
    assert term.__doc__ is not None
    monkeypatch.setattr(term, "__doc__", term.__doc__.replace("Weight:", "weight"))
    with pytest.raises(ValueError, match=r"SP must end with Source, Needs, Weight, Tests"):
        entry_of("sp")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [entry.name for entry in catalogue()]
    assert main(["losses", "sp"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{field}: " in shown for field in FIELDS)
    assert "G~_i = G_i / |G_i|" in shown
    assert "losses.sp.gather=true  # Compare the samples" in shown
    assert main(["losses", "kdd"]) == 2
    assert "did you mean losses.kd?" in capsys.readouterr().err


def test_other_names_lead_to_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    for alias, means in ALIASES.items():
        assert alias not in term_names()
        assert called(alias) == means
        for one in means:
            loss, _, key = one.partition(".")
            assert loss in term_names()
            assert not key or key.partition("=")[0] in config_class(loss).model_fields
            assert f"`{alias}`" in page.partition(f"\n## {loss}\n")[2].partition("\n## ")[0]
    assert main(["losses", "lskd"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("lskd is losses.kd.standardize=true\n\nfastkd.losses.KD\n")
    assert main(["losses", "meal"]) == 0
    shown = capsys.readouterr().out
    assert "\nfastkd.losses.SoftCE\n" in shown
    assert "\nfastkd.losses.Discriminator\n" in shown


@pytest.mark.parametrize("name", [*NO_LOSSES, "TLCutMix", "label-smoothing"])
def test_what_is_not_a_loss_is_told_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastkd: {plain(name)} is not a loss; set ")
    keys = [word.rstrip(",") for word in said.split() if "=" in word]
    assert keys
    given = ["augment.xprime=cutmix", "losses.kd.views=x,xprime"]
    given += ["losses.kd.ce_weight=0", "losses.ce.weight=1", "augment.flip=true"]
    load_recipe("quickstart", overrides=[*given, *keys])
    with pytest.raises(UserError, match=f"{name} is not a loss; set "):
        load_recipe("quickstart", overrides=[f"losses.{name}.weight=1"])


def test_a_view_by_the_paper_s_name_is_told_its_own() -> None:
    with pytest.raises(UserError, match="did you mean cutmix"):
        load_recipe("quickstart", overrides=["augment.xprime=tlcutmix"])


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("lskd", "losses.kd.standardize=true"),
        ("Logit-Standardisation", "losses.kd.standardize=true"),
        ("hint", "losses.fitnet"),
        ("hinton", "losses.kd"),
        ("factor", "losses.ft"),
        ("meal", "losses.soft_ce and losses.discriminator"),
        ("DKD", "losses.dkd"),
    ],
)
def test_a_recipe_with_another_name_is_told(name: str, means: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no loss {name!r}, did you mean {means}? ")):
        config_class(name)
