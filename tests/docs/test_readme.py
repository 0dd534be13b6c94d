"""What the README shows runs as written: its Python, in order.

Its commands are checked as those of docs/ are, in test_blocks.py; here its Python is also checked
by what it computes, and so is the task for timm of the tutorial that it points to.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import timm.task
import torch
from torch import nn

from tests.docs.page_names import names_of_pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorials" / "own_loop.md").read_text()
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = PYTHON.findall(README)
SHELL = "".join(re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The names that are left after all of the README's Python."""
    names: dict[str, Any] = {"torch": torch, **names_of_pages()}
    for block in CODE:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_networks_are_trained(shown: dict[str, Any]) -> None:
    assert len(shown["result"].metrics["history"]) == 30
    assert 0 <= shown["result"].metrics["accuracy_last"] <= 1


def test_the_loss_of_five_lines_has_its_gradient(shown: dict[str, Any]) -> None:
    student, teacher = shown["student_logits"], shown["teacher_logits"]
    leaf = student.detach().double().requires_grad_()
    p, q = (torch.softmax(x.double() / 4, 1) for x in (teacher, leaf))
    ce = nn.functional.cross_entropy(leaf, shown["labels"])
    (0.1 * ce + 0.9 * 16 * (p * (p / q).log()).sum(1).mean()).backward()
    torch.testing.assert_close(student.grad.double(), leaf.grad, rtol=1e-5, atol=1e-7)


def test_the_fused_task_is_timms() -> None:
    (block,) = (block for block in PYTHON.findall(TUTORIAL) if "class FusedTask" in block)
    shown: dict[str, Any] = {}
    exec(compile(block, "docs/tutorials/own_loop.md", "exec"), shown)
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6) % 10
    nets = [timm.create_model("test_resnet", num_classes=10).eval() for _ in range(2)]
    weights = {"distill_loss_weight": 0.9, "task_loss_weight": 0.1, "temperature": 4.0}
    fused, plain = (
        task(*nets, nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False, **weights)
        for task in (shown["FusedTask"], timm.task.LogitDistillationTask)
    )
    losses = [task.eval()(images, labels)["loss"] for task in (fused, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_its_first_block_is_the_two_commands() -> None:
    """CI, the site and the tests start from them."""
    first, second, *_ = SHELL.splitlines()
    assert first.startswith("pip install -e . && fastkd train ")
    assert second.startswith('pip install -e ".[test]" && pytest -n 2 --dist loadfile')
    assert len(CODE) == 3


def test_every_file_it_points_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:benchmarks|tests)/[\w/.]+)`", README
    )
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
