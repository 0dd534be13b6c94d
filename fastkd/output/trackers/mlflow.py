"""MLflow (`track=mlflow`): a server, a database or a folder, as MLFLOW_TRACKING_URI says.

Flow: `tracking` calls it. Only the client is used, so that several runs may take turns, and the
user's own active run is left alone. A resumed run asks the store which epoch it has last.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from fastkd.output.table import as_markdown
from fastkd.output.trackers.sink import (
    PROJECT,
    Ending,
    Kept,
    Started,
    TrackedRun,
    final_numbers,
    scalars,
)
from fastkd.printable import in_words

__all__ = ["MLflowSink"]

# A server that is gone holds up the training for this long, instead of minutes, before it is given
# up. What the user sets counts.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_AT_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_PARAMS_PER_REQUEST = 100
_LONGEST_PARAM = 500
_LONGEST_KEY = 250
_STATUS = {"stopped": "KILLED", "failed": "FAILED"}


class MLflowSink:
    """One run of MLflow."""

    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""

    @classmethod
    def problem(cls) -> str:
        """A server does not answer, or lets nobody in."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri.startswith(("http://", "https://")):
            return ""
        mlflow: Any = import_module("mlflow")
        try:
            with _environment(_AT_ONCE):
                mlflow.MlflowClient(uri).search_experiments(max_results=1)
        except mlflow.MlflowException as error:
            said = in_words(error)
            return (
                f"the server of MLFLOW_TRACKING_URI={_shown(uri)} cannot be used ({said}): "
                f"start it, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return ""

    def start(self, run: TrackedRun, kept: Kept | None, rows: int) -> Started:
        """Create a run with the configuration, or continue the one of this id."""
        mlflow: Any = import_module("mlflow")
        with _environment(_PATIENCE), _quiet():
            self._client = mlflow.MlflowClient()
            found = self._find(kept.id) if kept else None
            if found is None:
                found = self._create(run)
            else:
                self._client.update_run(found.info.run_id, status="RUNNING")
        self._id = found.info.run_id
        at = _shown(self._client.tracking_uri)
        sent = int(found.data.metrics.get("epoch", 0))
        return Started(self._id, at, sent, f"run {self._id} of {at}")

    def _find(self, id: str) -> Any:
        """The run of this id; None if somebody has deleted it, or the store is another one."""
        mlflow: Any = import_module("mlflow")
        try:
            found = self._client.get_run(id)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.info.lifecycle_stage == "active" else None

    def _create(self, run: TrackedRun) -> Any:
        entities: Any = import_module("mlflow.entities")
        tags = {
            "fastkd.group": run.group,
            "fastkd.stage": run.stage,
            "fastkd.folder": str(run.folder.absolute()),
        }
        found = self._client.create_run(self._experiment(), run_name=run.name, tags=tags)
        values = {_param(key): str(v)[:_LONGEST_PARAM] for key, v in run.config.items()}
        params = [entities.Param(key, value) for key, value in values.items()]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            part = params[first : first + _PARAMS_PER_REQUEST]
            self._client.log_batch(found.info.run_id, params=part)
        return found

    def _experiment(self) -> str:
        """Id of the experiment that the environment names, or of ours."""
        mlflow: Any = import_module("mlflow")
        if id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except mlflow.MlflowException:
            # Another run of a sweep may have made it meanwhile.
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def row(self, row: Mapping[str, Any]) -> None:
        """Log one row at its epoch, in one request, which the store takes whole or not at all."""
        self._log(scalars(row) | {"epoch": row["epoch"]}, step=row["epoch"])

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        entities: Any = import_module("mlflow.entities")
        now_ms = int(time.time() * 1000)
        metrics = [entities.Metric(key, value, now_ms, step) for key, value in numbers.items()]
        with _environment(_PATIENCE):
            self._client.log_batch(self._id, metrics=metrics)

    def finish(
        self,
        summary: Mapping[str, Any],
        files: Sequence[Path],
        table: Sequence[Mapping[str, Any]],
    ) -> None:
        """Log the final numbers, the pictures and the table, and end the run."""
        self._log(final_numbers(summary), step=int(summary.get("epochs", 0)))
        with _environment(_PATIENCE):
            for file in files:
                self._client.log_artifact(self._id, str(file))
            if table:
                self._client.log_text(self._id, as_markdown(table), "table.md")
            self._client.set_terminated(self._id, "FINISHED")

    def close(self, ending: Ending) -> None:
        """End it as killed or failed; a store that has failed is not asked again."""
        if self._id and ending != "broken":
            with _environment(_PATIENCE):
                self._client.set_terminated(self._id, _STATUS[ending])


def _param(key: str) -> str:
    """A key as MLflow takes it: one that it does not would cost the whole run."""
    return re.sub(r"[^\w./: -]", "_", key, flags=re.ASCII)[:_LONGEST_KEY] or "_"


def _shown(uri: str) -> str:
    """An address without user and password, which may be in it."""
    return re.sub(r"//[^/]*@", "//", uri)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables inside the block, unless the user has set them: MLflow reads no others."""
    own = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for key in own:
            os.environ.pop(key, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines about a database that is being made."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
