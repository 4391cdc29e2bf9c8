"""The transformer of `jaxzoo.nn.transformer` with its head, in PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore
from torch import nn  # pyright: ignore
from torch.nn import functional as F  # pyright: ignore

__all__ = ["training_step"]


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.RMSNorm(width, eps=1e-5)
        self.norm_2 = nn.RMSNorm(width, eps=1e-5)
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        batch, length, width = x.shape
        parts = self.mixed(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, hidden: int, length: int):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        size = width // heads
        speeds = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(length)[:, None] * speeds[None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Any) -> Any:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = self.norm(x)
        return x @ self.embedding.weight.T / x.shape[-1] ** 0.5


def training_step(
    tokens: np.ndarray, *, width: int, depth: int, heads: int, hidden: int
) -> Callable[[], Any]:
    """A call that takes one step of AdamW, PyTorch's fused one, on the same batch."""
    given = torch.tensor(tokens).long()
    model = Model(width, depth, heads, hidden, given.shape[1] - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def call() -> Any:
        optimizer.zero_grad()
        logits = model(given[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, 256), given[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call
