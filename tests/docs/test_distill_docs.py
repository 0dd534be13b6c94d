"""What docs/distill.md shows runs as written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = (Path(__file__).parents[2] / "docs" / "distill.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ATTRIBUTES = re.findall(r"^\| `result\.(\w+)", PAGE, re.MULTILINE)


def test_the_page_runs_and_its_table_names_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    names: dict[str, Any] = {
        "student": nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
        "teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
        "train_loader": DataLoader(data, batch_size=4),
        "val_loader": DataLoader(data, batch_size=4),
    }
    for block in CODE:
        exec(compile(block, "docs/distill.md", "exec"), names)
    result = names["result"]
    assert len(names["rows"]) == 2
    torch.testing.assert_close(names["shares"].sum(1), torch.ones(8))
    assert names["logits"].shape == (8, 4)
    assert len(ATTRIBUTES) == 8
    for name in ATTRIBUTES:
        assert hasattr(result, name)
    files = set(
        re.findall(r"`(\w+\.\w+)`", PAGE.partition("**The folder**")[2].partition("For")[0])
    )
    assert files == {path.name for path in (tmp_path / "runs/mine").iterdir()}
    assert "Result of distill: Sequential" in capsys.readouterr().out
