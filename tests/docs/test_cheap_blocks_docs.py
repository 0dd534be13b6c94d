"""docs/cheap_blocks.md: made from results, shares of the dense network, and up to date."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_cheap_blocks", DOCS / "make_cheap_blocks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(date: str = "2026-01-01 00:00 UTC") -> dict[str, Any]:
    rows = [
        {
            "block": block,
            "mode": mode,
            "MMACs an image": macs,
            "batch": 32,
            "plain ms": plain,
            "fastkd ms": fast,
        }
        for mode in ("training", "inference")
        for block, macs, plain, fast in (("S", 320.0, 400.0, 404.0), ("G(N)", 40.0, 200.0, 60.0))
    ]
    facts = {"gpu": None, "cpu": "A CPU, avx2", "threads": 2, "torch": "2.15", "commit": "abc"}
    seconds = {"case": {"plain": [0.1] * 20, "fastkd": [0.1] * 20}}
    return {"environment": facts | {"date": date}, "rows": rows, "seconds": seconds}


def test_times_and_arithmetic_are_shares_of_the_dense_plain_network(maker: ModuleType) -> None:
    text = maker.page(result())
    assert "| S | 100.0% | 400 | 404 | 100% | 101% |" in text
    assert "| G(N) | 12.5% | 200 | 60 | 50% | 15% |" in text
    assert "## Training step, batch 32" in text
    assert "Medians of 20 turns on A CPU, avx2, 2 threads, torch 2.15" in text


def test_the_newest_result_is_taken(maker: ModuleType, tmp_path: Path) -> None:
    for name, date in (("a", "2026-03-01 00:00 UTC"), ("b", "2026-02-01 00:00 UTC")):
        file = tmp_path / f"grouped_pointwise_picture_{name}.json"
        file.write_text(json.dumps(result(date)))
    assert maker.newest(tmp_path)["environment"]["date"] == "2026-03-01 00:00 UTC"
    with pytest.raises(SystemExit, match="there is no grouped_pointwise_picture_"):
        maker.newest(tmp_path / "empty")


def test_the_picture_is_a_png(maker: ModuleType, tmp_path: Path) -> None:
    maker.draw(result(), tmp_path / "images" / "picture.png")
    assert (tmp_path / "images" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_what_the_results_say(maker: ModuleType) -> None:
    measured = list(maker.RESULTS.glob("grouped_pointwise_picture_*.json"))
    assert maker.TARGET.exists() == maker.PICTURE.exists() == bool(measured)
    if measured:
        assert maker.TARGET.read_text() == maker.page(maker.newest())
