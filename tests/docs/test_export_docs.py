"""What docs/export.md shows runs as written, and its prediction is that of fastkd."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastkd.cli.arguments import parse
from fastkd.data.geometry import Normalizer
from fastkd.data.sources.cuts import framing_cut
from fastkd.deploy.export import export_network
from fastkd.deploy.source import Choice, Source
from fastkd.models import create_model
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts, Framing

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
PREDICT, PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^fastkd (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
MEAN_STD = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def test_the_page_runs(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    network = create_model("resnet8", 4, width=0.25).eval()
    framing = Framing(resize=24, crop=21, interpolation="bicubic")
    data = DataFacts(classes=("a", "b", "c", "d"), evaluation=framing)
    facts = NetworkFacts(num_classes=4, normalization=MEAN_STD, data=data)
    export_network(Source.of(network, facts=facts), "student.onnx")
    picture = Image.effect_noise((50, 37), 90).convert("RGB")
    picture.save("photo.png")
    names: dict[str, Any] = {}
    exec(compile(PREDICT.replace("photo.jpg", "photo.png"), "docs/export.md", "exec"), names)
    square = framing_cut(picture.size, framing).of(picture)
    pixels_NHWC = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    images_NCHW = Normalizer(*MEAN_STD, torch.float32, False)(pixels_NHWC.view(1, 21, 21, 3))
    with torch.no_grad():
        wanted = network(images_NCHW)
    torch.testing.assert_close(torch.from_numpy(names["logits"]), wanted, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == f"{'abcd'[wanted.argmax()]}\n"

    names = {"network": network}
    code = PYTHON.replace("Choice(dynamic_batch=True)", "Choice(format='torch-export')")
    assert code != PYTHON
    exec(compile(code, "docs/export.md", "exec"), names)
    assert names["done"].proof.compared.max_difference < 1e-4
    assert Choice(dynamic_batch=True)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_are_understood(words: str) -> None:
    assert parse(shlex.split(words)).command in ("export", "eval")
