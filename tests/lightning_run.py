"""Training by Lightning in two processes, as its Trainer starts them from a script.

python -m tests.lightning_run FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.training.distributed.lightning import LightningELBO
from tests import distributed_cases as cases

NOISE = torch.randn(cases.N, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def data() -> Dataset[Any]:
    return TensorDataset(cases.X, NOISE)


def module() -> LightningELBO:
    """The autoencoder of ``distributed_cases``, whose parameters are all in a module, with noise that is given."""
    pyro.set_rng_seed(3)
    vae = cases.VAE()
    vae.offset = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def sgd(parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    return LightningELBO(vae.model, vae.guide, DecomposedELBO(), sgd)


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, "devices": 1, **options},
    )


def result(elbo: LightningELBO, by: Trainer) -> dict[str, Any]:
    parameters = {name: value.clone() for name, value in elbo.state_dict().items()}
    metrics = {name: float(value) for name, value in by.callback_metrics.items()}
    return {"parameters": parameters, "metrics": metrics, "table": cases.table(elbo.objective)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Lightning on the number of workers
    two = trainer(devices=2, strategy="ddp", use_distributed_sampler=False)
    elbo = module()
    half = torch.utils.data.Subset(data(), range(two.local_rank, cases.N, 2))  # every other row: half of each batch
    two.fit(elbo, DataLoader(half, batch_size=cases.BATCH // 2), DataLoader(half, batch_size=cases.N // 2))
    found = result(elbo, two)
    bad = [torch.full((4, 3), float("nan") if two.local_rank else 0.0, dtype=torch.float64), NOISE[:4]]
    pyro.enable_validation(False)
    found["error"] = cases.message(lambda: elbo.training_step(bad, 0))
    torch.save(found, Path(sys.argv[1], f"{two.local_rank}.pt"))
