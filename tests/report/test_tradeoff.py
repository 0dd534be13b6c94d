"""The picture of accuracy against cost: what its axis shows."""

from pathlib import Path

import pytest
from PIL import Image

from fastkd.report.tradeoff import Point, draw_tradeoff

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("slowest", "limit", "end"),
    [(2.1, None, 2.1), (2.2, 3.0, 3.0), (50.0, None, 2.5), (50.0, 4.0, 5.0)],
)
def test_one_long_bar_does_not_stretch_the_axis(tmp_path, monkeypatch, slowest, limit, end):
    from matplotlib.figure import Figure

    ends = []
    real = Figure.savefig

    def saving(self, *args, **more):
        ends.append(self.axes[0].get_xlim())
        return real(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", saving)
    points = [
        Point("original", 2.0, 0.9, cost_from=1.9, cost_to=slowest),
        Point("chosen", 1.0, 0.8, cost_from=0.9, cost_to=1.1),
    ]
    file = Path(tmp_path / "a.png")
    assert draw_tradeoff(file, points, cost="ms", limit=limit) == f"picture {file}"
    assert Image.open(file).size[0] > 500
    assert ends == [(0.0, pytest.approx(1.05 * end))]
