"""The variational autoencoder in pythae's trainer."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor

from benchmarks.by_hand import LATENT, PIXELS, net


class _Encoder(BaseEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(PIXELS, 2 * LATENT)

    def forward(self, x: Tensor) -> Any:
        loc, log_variance = self.net(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=log_variance)


class _Decoder(BaseDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(LATENT, PIXELS)

    def forward(self, z: Tensor) -> Any:
        return ModelOutput(reconstruction=self.net(z).sigmoid())


def train() -> Callable[[Sequence[Tensor]], None]:
    """An epoch of ``BaseTrainer`` over the batches' data, by its own loader; Adam as it makes it."""
    trainers: dict[int, Any] = {}

    def steps(batches: Sequence[Tensor]) -> None:
        key = batches[0].shape[0]
        if key not in trainers:
            trainers[key] = _trainer(torch.cat(list(batches)), key)
        trainers[key].train_step(epoch=1)

    return steps


def _trainer(data: Tensor, batch_size: int) -> Any:
    logging.getLogger("pythae").setLevel(logging.ERROR)
    model_config = VAEConfig(input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce")
    options = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        optimizer_cls="Adam",
        no_cuda=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dataset = BaseDataset(data, torch.zeros(len(data)))
        trainer = BaseTrainer(VAE(model_config, _Encoder(), _Decoder()), dataset, training_config=options, callbacks=[])
        trainer.prepare_training()
    callbacks = trainer.callback_handler.callbacks
    trainer.callback_handler.callbacks = [each for each in callbacks if "ProgressBar" not in type(each).__name__]
    return trainer
