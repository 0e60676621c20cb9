"""Callbacks that write a run's metrics where people look at them: a CSV file, TensorBoard, MLflow, Weights & Biases."""

from pyro_elbo_ext.training.trackers.csv_file import CSVTracker
from pyro_elbo_ext.training.trackers.mlflow_run import MLflowTracker
from pyro_elbo_ext.training.trackers.tensorboard_log import TensorBoardTracker
from pyro_elbo_ext.training.trackers.wandb_run import WandbTracker

__all__ = ["CSVTracker", "MLflowTracker", "TensorBoardTracker", "WandbTracker"]
