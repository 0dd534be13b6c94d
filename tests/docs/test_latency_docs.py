"""What docs/latency.md shows runs, and its numbers are the rule's."""

import re
from pathlib import Path
from typing import Any

import pytest

from fastkd.deploy.latency import QUICK, RULE
from fastkd.deploy.latency.backends import BACKENDS
from fastkd.deploy.latency.runtime import HALF_TOLERANCE, TOLERANCES
from fastkd.models import create_model

PAGE = (Path(__file__).parents[2] / "docs" / "latency.md").read_text()


def test_every_backend_has_its_row() -> None:
    assert set(re.findall(r"^\| `([a-z][a-z-]+)` \|", PAGE, re.MULTILINE)) == set(BACKENDS)


def test_the_numbers_are_the_rules() -> None:
    text = " ".join(PAGE.split())
    assert f"at least {RULE.window_calls} calls and {RULE.window_s:g} s" in text
    assert f"at most {100 * RULE.tolerance:g} %; after {RULE.warm_up_s:g} s" in text
    assert f"at least {RULE.calls} calls and {RULE.seconds:g} s are timed" in text
    assert f"{QUICK.calls} calls and {QUICK.seconds:g} s" in text
    assert f"differ by {TOLERANCES['cpu']:g} of the largest" in text
    assert TOLERANCES["cuda"] == HALF_TOLERANCE and f"16 bits by {HALF_TOLERANCE:g}" in text


def test_the_python_runs() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"network": create_model("torchvision:resnet18", 10)}
    exec(compile(code.replace("224, 224", "32, 32"), "docs/latency.md", "exec"), names)
    assert names["layer"].on == "eager" and names["found"].threads == 2
