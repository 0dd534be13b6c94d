"""What docs/compress.md shows is understood and runs, and its numbers are the program's."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastkd.cli.arguments import parse, parsers
from fastkd.compress import Target
from fastkd.compress.lessons import RANK_SHARE
from fastkd.compress.proposing import MARGIN
from fastkd.compress.space import CANDIDATES
from fastkd.deploy.export import export_network
from fastkd.deploy.source import Choice, Source
from fastkd.models import create_model
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts, Framing

PAGE = (Path(__file__).parents[2] / "docs" / "compress.md").read_text()
PREDICT, PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^fastkd (.*?)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_are_understood(words: str) -> None:
    options = parse(shlex.split(words))
    assert options.command in ("compress", "export")
    if options.command == "compress":
        Target.parse(options.target)


def test_every_option_is_in_a_table() -> None:
    known = {one for one in parsers()[1]["compress"]._option_string_actions if one[:2] == "--"}
    assert known - {"--help"} <= set(re.findall(r"`(--[a-z-]+)", PAGE)) | {"--data", "--target"}


def test_its_numbers_are_the_programs() -> None:
    text = " ".join(PAGE.split())
    *others, last = CANDIDATES
    assert f"with S, {', '.join(others)} and {last} where they divide" in text
    assert f"at or below {100 * MARGIN:.0f} % of the target" in text
    assert RANK_SHARE == 0.1 and "on a tenth of the training images" in text
    defaults = vars(parse(["compress", "x", "--target", "macs=0.5x"]))
    assert f"| {defaults['keep']}, {defaults['short_epochs']} |" in text
    assert f"| `--draws N` | {defaults['draws']} |" in text


def test_the_prediction_runs(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    network = create_model("resnet8", 4, width=0.25).eval()
    data = DataFacts(classes=("a", "b", "c", "d"), evaluation=Framing(resize=16, crop=16))
    facts = NetworkFacts(num_classes=4, normalization=((0.4,) * 3, (0.2,) * 3), data=data)
    source = Source.of(network, facts=facts)
    export_network(source, "student.onnx", Choice(normalize=True))
    Image.effect_noise((16, 16), 90).convert("RGB").save("photo.png")
    exec(compile(PREDICT.replace("photo.jpg", "photo.png"), "docs/compress.md", "exec"), {})
    images = torch.frombuffer(
        bytearray(Image.open("photo.png").convert("RGB").tobytes()), dtype=torch.uint8
    )
    images_NCHW = (images.view(1, 16, 16, 3).permute(0, 3, 1, 2) / 255 - 0.4) / 0.2
    with torch.no_grad():
        wanted = network(images_NCHW).argmax()
    assert capsys.readouterr().out == f"{'abcd'[wanted]}\n"


def test_the_python_names_what_there_is() -> None:
    request, _, _ = PYTHON.partition("with open_world")
    names: dict[str, Any] = {}
    exec(compile(request, "docs/compress.md", "exec"), names)
    assert names["request"].target.share
    compile(PYTHON, "docs/compress.md", "exec")
