"""Metrics as a run of MLflow."""

from __future__ import annotations

import itertools
import posixpath
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pyro_elbo_ext.training.callbacks import Callback
from pyro_elbo_ext.training.trackers.values import flat, missing

# Most in one request (MLflow's REST API)
_METRICS = 1000
_PARAMS = 100
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MLflowTracker(Callback):
    """Record a run with MLflow: metrics by step, settings as parameters, the summary as metrics and tags.

    Metrics keep their names, but characters of a site's name that MLflow does not allow become "_". Model and guide are
    tags too. At the end numbers of the summary are metrics ``final/NAME``, and texts are tags.

    A resumed run goes on in the same run of MLflow; steps after the checkpoint that it already has are not recorded twice.
    MLflow's active run, and the tracking URI that others use, stay as they are. A request is made, and waited for, each time
    that metrics are logged.

    Parameters
    ----------
    experiment
        Its name; it is made where there is none.
    run_name
        MLflow makes one up if it is None.
    tracking_uri
        A server, or a database such as ``sqlite:///mlflow.db``. None: what MLflow is set to.
    tags
        Further tags of the run.

    Attributes
    ----------
    run_id : str or None
        MLflow's id of the run, once it has started.

    Raises
    ------
    ImportError
        Without MLflow, saying how to install it.
    ValueError
        While logging, if two metrics have the same name but for characters that MLflow does not allow.
    """

    def __init__(
        self,
        experiment: str = "Default",
        run_name: str | None = None,
        *,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        try:
            from mlflow import entities
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise missing("MLflowTracker", "mlflow", error) from error
        self.run_id: str | None = None
        self._client_of, self._entities = MlflowClient, entities
        self._experiment, self._run_name, self._tracking_uri = experiment, run_name, tracking_uri
        self._tags = dict(tags or {})
        self._names: dict[str, str] = {}  # MLflow's -> the metric's
        self._recorded: dict[str, int] = {}  # metric -> last step that was there when the run went on

    def start(self, settings: Mapping[str, Any]) -> None:
        """Make the run, or go on with the one of the checkpoint."""
        self._client = self._client_of(tracking_uri=self._tracking_uri)
        if self.run_id is None:
            self._make_run(flat(settings))
        else:
            self._client.update_run(self.run_id, status="RUNNING")
            self._recorded = {
                name: max(metric.step for metric in self._client.get_metric_history(self.run_id, name))
                for name in self._client.get_run(self.run_id).data.metrics
            }

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record all metrics of a step."""
        self._record(step, {self._name(name): float(value) for name, value in metrics.items()})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the summary and end the run."""
        if self.run_id is None:
            return
        values = flat(summary)
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._recorded = {}
        step = int(numbers.get("steps", 0))
        self._record(step, {self._name(f"final/{name}"): value for name, value in numbers.items()})
        for name in values.keys() - numbers.keys():
            self._client.set_tag(self.run_id, name, str(values[name]))
        self._client.set_terminated(self.run_id, _STATUS[str(values.get("status", "finished"))])

    def state_dict(self) -> dict[str, Any]:
        """The id of the run."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with this run."""
        self.run_id = state["run_id"]

    def _make_run(self, settings: Mapping[str, Any]) -> None:
        known = self._client.get_experiment_by_name(self._experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(self._experiment)
        tags = {name: str(settings[name]) for name in ("model", "guide") if name in settings}
        run = self._client.create_run(experiment, run_name=self._run_name, tags={**tags, **self._tags})
        self.run_id = run.info.run_id
        params = [self._entities.Param(_allowed(name), str(value)) for name, value in settings.items()]
        for some in _batches(params, _PARAMS):
            self._client.log_batch(self.run_id, params=some)

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._entities.Metric(name, value, now, step)
            for name, value in values.items()
            if step > self._recorded.get(name, -1)
        ]
        assert self.run_id is not None
        for some in _batches(metrics, _METRICS):
            self._client.log_batch(self.run_id, metrics=some)

    def _name(self, metric: str) -> str:
        name = _allowed(metric)
        if self._names.setdefault(name, metric) != metric:
            raise ValueError(
                f"MLflow can't tell the metrics '{self._names[name]}' and '{metric}' apart, both are '{name}': rename a site"
            )
        return name


def _allowed(name: str) -> str:
    """The name as MLflow allows it: letters, digits, and "_", "-", ".", " ", and "/" where it makes a proper path."""
    name = re.sub(r"[^/\w.\- ]", "_", name)
    return name if posixpath.normpath(name) == name else name.replace("/", "_")


def _batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    remaining = iter(items)
    while some := list(itertools.islice(remaining, size)):
        yield some
