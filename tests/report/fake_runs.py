"""Run folders with invented numbers: what `fastkd report` reads, made without a training."""

import json
from pathlib import Path
from typing import Any

from fastkd.config.plain_yaml import write_yaml
from fastkd.recipes.loading import load_recipe


def history(values: list[float], **more: list[float]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with these validation accuracies."""
    rows = []
    for number, value in enumerate(values):
        row = {"epoch": number + 1, "val_accuracy": value, "train_loss": 1 / (number + 1)}
        rows.append(row | {key: column[number] for key, column in more.items()})
    return rows


def fake_run(
    folder: Path,
    *keys: str,
    values: list[float],
    alone: float | None = None,
    recipe: str = "quickstart",
    finished: bool = True,
    **more: list[float],
) -> Path:
    """A run of a recipe that reached `values` epoch by epoch, and its student alone `alone`."""
    folder.mkdir(parents=True)
    built = load_recipe(recipe, overrides=[f"epochs={len(values)}", *keys])
    (folder / "config.yaml").write_text(write_yaml(built.model_dump(mode="json")))
    rows = history(values, **more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "facts.json").write_text(json.dumps({"data": {"name": built.data.name}}))
    if not finished:
        return folder
    summary: dict[str, Any] = {
        "recipe": built.name,
        "digest": built.digest(),
        "epochs": len(values),
        "accuracy_last": values[-1],
        "accuracy_best": max(values),
        "best_epoch": values.index(max(values)) + 1,
        "params": 5214,
        "macs": 216224,
        "images_per_s": 400.0,
        "history": rows,
        "teacher": None,
        "alone": None,
    }
    if built.teacher:
        summary["teacher"] = {"name": "wrn_16_2", "accuracy": 0.96, "params": 691674, "macs": 10**7}
    if alone is not None:
        own = history([alone] * len(values), **more)
        summary["alone"] = {
            "accuracy_last": alone,
            "accuracy_best": alone,
            "params": 5214,
            "macs": 216224,
            "images_per_s": 800.0,
            "history": own,
            "digest": "0" * 16,
        }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
