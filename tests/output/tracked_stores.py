"""What trackers have kept, read back with the trackers' own means: epochs, values, ids."""

import json
import struct
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def installed(package: str) -> bool:
    return find_spec(package) is not None


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def wandb_parts(folder: Path, parts: int, *, killed: bool = False) -> list[list[Any]]:
    """The records of every part of an offline run, in the order in which they were begun.

    W&B's own process writes them, and may still do so when the run is over.
    """
    last = time.monotonic() + 60
    while True:
        files = sorted(folder.glob("offline-run-*/run-*.wandb"))
        found = [wandb_records(file) for file in files]
        ended = [any(r.WhichOneof("record_type") == "exit" for r in one) for one in found]
        if len(found) == parts and all(ended[killed:]):
            return found
        assert time.monotonic() < last, (files, ended)
        time.sleep(0.05)


def wandb_records(file: Path) -> list[Any]:
    return list(_records(file))


def _records(file: Path) -> Any:
    """W&B's transaction log: a header of 7 bytes, then the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too short for another header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(data):
            return
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    """The rows of one part that have metrics, with their step.

    W&B itself adds the last epoch to a row of pictures.
    """
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            names = [item.key or "/".join(item.nested_key) for item in record.history.item]
            values = [json.loads(item.value_json) for item in record.history.item]
            row = dict(zip(names, values, strict=True))
            if "train/loss" in row:
                found.append(row | {"step": record.history.step.num})
    return found


def wandb_ids(parts: list[list[Any]]) -> set[str]:
    """The run ids of all parts."""
    return {r.run.run_id for part in parts for r in part if r.WhichOneof("record_type") == "run"}


def mlflow_runs(uri: str) -> dict[str, Any]:
    """Every run of the experiment by its name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fastkd")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def mlflow_points(uri: str, id: str, name: str) -> list[tuple[int, float]]:
    """Step and value of one metric, as often as they were logged."""
    from mlflow.tracking import MlflowClient

    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(id, name)]


def trackio_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows with an epoch by the name of their run, in the order in which they were written."""
    import sqlite3

    with sqlite3.connect(folder / "fastkd.db") as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, step, metrics in rows:
        row = json.loads(metrics) | {"step": step}
        if "epoch" in row:
            found.setdefault(name, []).append(row)
    return found
