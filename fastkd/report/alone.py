"""The student alone of a run's own comparison, below the run's folder: a run to be read like it."""

from pathlib import Path

from fastkd.errors import UserError
from fastkd.report.runs_read import ReportedRun, read_run

__all__ = ["alone_folder", "own_alone"]


def alone_folder(run: ReportedRun) -> Path | None:
    """The folder of the best of its baselines (`baseline.lrs`); None where there is none."""
    alone = (run.summary or {}).get("alone")
    rate = alone.get("lr") if isinstance(alone, dict) else None
    if not isinstance(rate, int | float):
        return None
    folder = run.path / "alone" / f"lr-{rate:g}"
    return folder if (folder / "config.yaml").exists() else None


def own_alone(run: ReportedRun) -> ReportedRun | None:
    """The best of its baselines; None where there is none, or it cannot be read."""
    folder = alone_folder(run)
    try:
        return None if folder is None else read_run(folder)
    except UserError:
        return None
