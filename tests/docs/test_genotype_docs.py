"""What docs/genotypes.md shows runs as written: its Python and its commands."""

import re
import shlex
from pathlib import Path

import pytest

from fastkd.models import count, create_model
from fastkd.recipes.loading import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "genotypes.md").read_text()
(CODE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^fastkd (.*)$", PAGE, re.MULTILINE)


def test_its_python_runs():
    made = {}
    exec(CODE, made)
    assert count(made["short"], (3, 64, 64)).params < count(made["other"], (3, 64, 64)).params


@pytest.mark.parametrize("words", COMMANDS)
def test_its_commands_run(words, command):
    verb, *rest = shlex.split(words, comments=True)
    if verb == "cheapen":
        said = command(verb, *rest)
        assert (said.code, said.err) == (0, "")
        keys = shlex.split(said.out.splitlines()[-1])[1:]
        student = load_recipe("quickstart", overrides=[*keys, "student.width=null"]).student
    else:
        name, *keys = rest
        student = load_recipe(name, overrides=[*keys, "data.root=x"]).student
    assert student.blocks == {"layer1": "G(4)", "layer3.*": "BG(2,M/8)"}
    create_model(student.name, 10, **student.options())


def test_a_short_wrn_is_the_shallow_one_as_it_says():
    assert "`wrn_40_2` with `depth=2,2,2` is `wrn_16_2`" in PAGE
    short, other = create_model("wrn_40_2", 10, depth=[2, 2, 2]), create_model("wrn_16_2", 10)
    assert short.state_dict().keys() == other.state_dict().keys()
