"""In: sizes. Out: STGCN and Graph WaveNet in plain PyTorch, the same functions as the library's, as a peer to time.

They are written as a PyTorch user would: convolutions over [B, C, N, T], and all nodes of a region graph until the head
picks its centre, as in the published code. `centre_only` leaves out what does not reach the centre.
"""

from typing import Any

import torch
from torch import nn

_KERNEL = 4


class Head(nn.Module):
    """The forecast of every horizon step from the centre's features and that step's covariates."""

    def __init__(self, features: int, horizon: int, num_covariates: int, hidden: int = 64) -> None:
        """Makes the weights."""
        super().__init__()
        self.state = nn.Linear(features, hidden, bias=False)
        self.lead = nn.Parameter(torch.zeros(horizon, hidden))
        self.covariates = nn.Linear(num_covariates, hidden, bias=False) if num_covariates else None
        self.direct = nn.Linear(num_covariates, 1, bias=False) if num_covariates else None
        self.readout = nn.Parameter(torch.randn(horizon, hidden) / hidden**0.5)
        self.bias = nn.Parameter(torch.zeros(horizon))

    def forward(self, features: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """[B, D] and [B, P, F] to [B, P]."""
        units = self.state(features)[:, None] + self.lead
        if self.covariates is not None:
            units = units + self.covariates(ahead)
        forecast = (torch.relu(units) * self.readout).sum(-1) + self.bias
        return forecast if self.direct is None else forecast + self.direct(ahead)[..., 0]


def _with_covariates(history: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[B, N, H, I] and [B, H, F] to [B, I + F, N, H]."""
    nodes = history.shape[1]
    return torch.cat([history, seen[:, None].expand(-1, nodes, -1, -1)], -1).permute(0, 3, 1, 2)


class TorchSTGCN(nn.Module):
    """`gpdiff_jax.models.stgcn`."""

    def __init__(self, history: int, horizon: int, num_inputs: int, num_covariates: int, *, centre_only: bool) -> None:
        """Makes the weights."""
        super().__init__()
        self.centre_only, self.history = centre_only, history
        self.gate_in = nn.Conv2d(num_inputs + num_covariates, 64, (1, _KERNEL))
        self.graph = nn.Linear(64, 8)
        self.gate_mid = nn.Conv2d(8, 64, (1, _KERNEL))
        length = history - 2 * (_KERNEL - 1)
        self.gate_out = nn.Conv2d(32, 64, (1, min(_KERNEL, length)))
        self.head = Head(32 * (length - min(_KERNEL, length) + 1), horizon, num_covariates)

    def forward(self, walks: Any, history: torch.Tensor, covariates: torch.Tensor) -> torch.Tensor:
        """Returns [B, P]."""
        x = nn.functional.glu(self.gate_in(_with_covariates(history, covariates[:, : self.history])), 1)
        x = x.permute(0, 2, 3, 1)
        if self.centre_only:
            flow, x = torch.einsum("n,bntc->btc", walks[0][0], x)[:, None], x[:, :1]
        else:
            flow = torch.einsum("mn,bntc->bmtc", walks[0], x)
        x = torch.relu(self.graph(torch.cat([x, flow], -1))).permute(0, 3, 1, 2)
        x = nn.functional.glu(self.gate_out(nn.functional.glu(self.gate_mid(x), 1)), 1)
        features = x[:, :, 0].transpose(1, 2).flatten(1)
        return self.head(features, covariates[:, self.history :])


class TorchGraphWaveNet(nn.Module):
    """`gpdiff_jax.models.graph_wavenet`."""

    def __init__(self, history: int, horizon: int, num_inputs: int, num_covariates: int, *, centre_only: bool) -> None:
        """Makes the weights."""
        super().__init__()
        self.centre_only, self.history = centre_only, history
        blocks = max(1, -(-(history - 1) // 3))
        self.dilations = (1, 2) * blocks
        self.input = nn.Conv2d(num_inputs + num_covariates, 32, (1, 1), bias=False)
        self.gates = nn.ModuleList(nn.Conv2d(32, 64, (1, 2), dilation=(1, d)) for d in self.dilations)
        self.graphs = nn.ModuleList(nn.Conv2d(160, 32, (1, 1)) for _ in self.dilations[:-1])
        self.skip = nn.Linear(32 * len(self.dilations), 64)
        self.head = Head(64, horizon, num_covariates)

    def forward(self, walks: Any, history: torch.Tensor, covariates: torch.Tensor) -> torch.Tensor:
        """Returns [B, P]."""
        x = self.input(_with_covariates(history, covariates[:, : self.history]))
        x = nn.functional.pad(x, (1 + sum(self.dilations) - x.shape[-1], 0))
        skips = []
        for layer, (dilation, gate) in enumerate(zip(self.dilations, self.gates, strict=True)):
            value, gated = gate(x).chunk(2, 1)
            h = torch.tanh(value) * torch.sigmoid(gated)
            skips.append(h[:, :, 0, -1])
            if layer == len(self.dilations) - 1:
                break
            rows = slice(0, 1 if self.centre_only and layer == len(self.dilations) - 2 else None)
            parts = [h[:, :, rows], *(torch.einsum("mn,bcnt->bcmt", walk[rows], h) for walk in walks)]
            x = x[:, :, rows, dilation:] + self.graphs[layer](torch.cat(parts, 1))
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
        return self.head(torch.relu(self.skip(torch.cat(skips, 1))), covariates[:, self.history :])


TORCH_MODELS = {"stgcn": TorchSTGCN, "graph_wavenet": TorchGraphWaveNet}
