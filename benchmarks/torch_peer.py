"""In: source regions. Out: the time of a plain PyTorch loop over them, one region after another."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.torch_models import TORCH_MODELS
from gpdiff_jax.data.sources import Sources
from gpdiff_jax.models.graphs import diffusion_walks

_DELTA = 0.5
_WARM_UP = 3


def _region_tensors(sources: Sources, region: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walks [S, N, N], scaled readings with their mask [T, N, 2], calendar [T, F] and allowed starts of a region."""
    bank, graph = sources.bank, jax.tree.map(lambda leaf: leaf[region], sources.graphs)
    real = int(graph.n_node[0])
    nodes = np.asarray(graph.nodes)[:real]
    walks = np.array(jax.jit(lambda one: diffusion_walks(one, 2))(graph))[:, :real, :real]
    length = int(sources.train.length[nodes[0]])
    values, observed, offset = (np.asarray(array) for array in (bank.values, bank.observed, bank.node_offset))
    series = np.stack([values[offset[node] :][:length] for node in nodes], -1)
    mask = np.stack([observed[offset[node] :][:length] for node in nodes], -1)
    mean, std = (np.asarray(array)[0, nodes] for array in (bank.mean, bank.std))
    series = np.stack([(series - mean) / std * mask, mask], -1).astype(np.float32)
    clock = np.array(bank.calendar)[int(bank.city_offset[nodes[0]]) :][:length]
    first, count = int(sources.train.first[nodes[0]]), int(sources.train.count[nodes[0]])
    starts = np.array(sources.train.starts[first : first + count]).astype(np.int64)
    walks, series, clock, starts = (torch.from_numpy(array) for array in (walks, series, clock, starts))
    return walks, series, clock, starts


def _batches(
    series: torch.Tensor, clock: torch.Tensor, starts: torch.Tensor, length: int, windows: int, *, loader: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows [B, H + P, N, 2] and their calendar [B, H + P, F], for ever."""
    if loader:
        data = _Windows(series, clock, starts, length)
        while True:
            yield from torch.utils.data.DataLoader(data, windows, shuffle=True, drop_last=True)
    while True:
        at = starts[torch.randint(len(starts), (windows,))][:, None] + torch.arange(length)
        yield series[at], clock[at]


class _Windows(torch.utils.data.Dataset):
    """The windows of one region, one by one, as a DataLoader asks for them."""

    def __init__(self, series: torch.Tensor, clock: torch.Tensor, starts: torch.Tensor, length: int) -> None:
        """Keeps the series; windows are cut when they are asked for."""
        self.series, self.clock, self.starts, self.length = series, clock, starts.tolist(), length

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One window [H + P, N, 2] and its calendar [H + P, F]."""
        at = slice(self.starts[index], self.starts[index] + self.length)
        return self.series[at], self.clock[at]


def torch_seconds(
    name: str, sources: Sources, steps: int, *, windows: int, loader: bool, centre_only: bool, regions: int = 4
) -> float:
    """Seconds per region-step of the loop, over the first few regions.

    Args:
      name: "stgcn" or "graph_wavenet".
      sources: calendar covariates.
      steps: per region.
      windows: batch size.
      loader: feed windows through a standard DataLoader instead of indexing the series.
      centre_only: leave out what does not reach the centre.
      regions: how many to train.

    Returns:
      The mean time of a step.
    """
    sizes = sources.sizes
    seconds = 0.0
    for region in range(regions):
        torch.manual_seed(region)
        walks, series, clock, starts = _region_tensors(sources, region)
        model = TORCH_MODELS[name](*sizes, centre_only=centre_only)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

        def train(batch: tuple, model: Any = model, walks: Any = walks, optimiser: Any = optimiser) -> None:
            window, covariates = batch
            ahead = window[:, sizes.history :, 0]
            forecast = model(walks, window[:, : sizes.history].transpose(1, 2), covariates)
            loss = torch.nn.functional.huber_loss(forecast, ahead[..., 0], reduction="none", delta=_DELTA) / _DELTA
            loss = (loss * ahead[..., 1]).sum() / ahead[..., 1].sum().clamp(min=1.0)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

        feed = _batches(series, clock, starts, sizes.history + sizes.horizon, windows, loader=loader)
        for batch in itertools.islice(feed, _WARM_UP):
            train(batch)
        begin = time.perf_counter()
        for batch in itertools.islice(feed, steps):
            train(batch)
        seconds += time.perf_counter() - begin
    return seconds / (regions * steps)


def num_parameters(name: str, sources: Sources) -> int:
    """Parameters of a peer."""
    model = TORCH_MODELS[name](*sources.sizes, centre_only=False)
    return sum(weight.numel() for weight in model.parameters())
