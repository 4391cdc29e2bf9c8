"""A VAE of dense layers in PyTorch, plain and in pythae, for the training steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore
from torch import nn  # pyright: ignore
from torch.nn import functional as F  # pyright: ignore

__all__ = ["pythae_step", "training_step"]


def layers(weights: list[tuple[np.ndarray, np.ndarray]]) -> nn.Sequential:
    """Dense layers with given weights `[in, out]` and tanh between them."""
    modules: list[Any] = []
    for kernel, bias in weights:
        dense = nn.Linear(*kernel.shape)
        dense.weight.data = torch.tensor(np.ascontiguousarray(kernel.T))
        dense.bias.data = torch.tensor(bias)
        modules += [dense, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


class VAE(nn.Module):
    def __init__(self, encoder: Any, decoder: Any):
        super().__init__()
        self.encoder, self.decoder = layers(encoder), layers(decoder)

    def forward(self, x: Any, noise: Any) -> Any:
        """Of noise `[k, batch, latents]`: -ELBO for k = 1, else IWAE's loss."""
        mean, log_std = self.encoder(x).chunk(2, dim=-1)
        z = mean + log_std.exp() * noise
        logits = self.decoder(z.flatten(0, 1)).view(*z.shape[:2], -1)
        error = F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        )
        if len(noise) == 1:
            kl = 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0) - log_std
            return (error[0].sum(-1) + kl.sum(-1)).mean()
        log_w = 0.5 * (noise.square() - z.square()) + log_std
        log_w = log_w.sum(-1) - error.sum(-1)
        return (np.log(len(noise)) - log_w.logsumexp(0)).mean()


def training_step(
    x: np.ndarray, encoder: Any, decoder: Any, *, samples: int, latents: int
) -> tuple[Callable[[], Any], Callable[[np.ndarray], float]]:
    """One step of Adam, and the loss for given noise."""
    model = VAE(encoder, decoder)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    data = torch.from_numpy(x)

    def step() -> Any:
        noise = torch.randn(samples, len(x), latents)
        optimizer.zero_grad()
        loss = model(data, noise)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, lambda noise: float(model(data, torch.from_numpy(noise)).detach())


def pythae_step(
    x: np.ndarray, encoder: Any, decoder: Any, *, samples: int, latents: int
) -> tuple[Callable[[], Any], Callable[[], float]]:
    """The same with pythae's VAE, or its IWAE, and its loss for noise of its own."""
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig  # pyright: ignore
    from pythae.models.base.base_utils import ModelOutput  # pyright: ignore
    from pythae.models.nn import BaseDecoder, BaseEncoder  # pyright: ignore

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body = layers(encoder)

        def forward(self, x: Any) -> Any:
            mean, log_std = self.body(x.flatten(1)).chunk(2, dim=-1)
            return ModelOutput(embedding=mean, log_covariance=2.0 * log_std)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.body = layers(decoder)

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=self.body(z).sigmoid())

    knobs = {"input_dim": (x.shape[1],), "latent_dim": latents}
    knobs["reconstruction_loss"] = "bce"
    if samples == 1:
        model = VAE(VAEConfig(**knobs), Encoder(), Decoder())
    else:
        config = IWAEConfig(number_samples=samples, **knobs)
        model = IWAE(config, Encoder(), Decoder())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    data = {"data": torch.from_numpy(x)}

    def step() -> Any:
        optimizer.zero_grad()
        loss = model(data).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, lambda: float(model(data).loss.detach())
