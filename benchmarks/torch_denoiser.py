"""In: the sizes of a denoiser. Out: the same Transformer and its training step in plain PyTorch, to stand beside it.

Written for this comparison: the denoiser of `gpdiff_jax.diffusion.denoiser` with the prompt in the adaptive norm, the
token loss of the v objective on the cosine schedule, gradients clipped to norm 1, AdamW and an averaged copy.
"""

import copy
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
from torch import nn

from gpdiff_jax.diffusion.denoiser import DenoiserConfig

_LAYER_NORM_EPSILON = 1e-6  # flax's


class AdaLNZero(nn.Module):
    """Layer norm with shift and scale, and the gate of the branch behind it, from the condition [B, D]."""

    def __init__(self, width: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON, elementwise_affine=False)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the modulated tokens [B, L, D] and the gate [B, 1, D]."""
        shift, scale, gate = self.modulation(nn.functional.silu(condition))[:, None].chunk(3, dim=-1)
        return self.norm(x) * (1 + scale) + shift, gate


class Attention(nn.Module):
    """Self-attention by PyTorch's own fused function."""

    def __init__(self, width: int, heads: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, D]."""
        batch, length, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Attention and feed-forward, each behind its norm and gate."""

    def __init__(self, config: DenoiserConfig) -> None:
        """Makes the layers."""
        super().__init__()
        self.attention_norm, self.feed_forward_norm = AdaLNZero(config.width), AdaLNZero(config.width)
        self.attention = Attention(config.width, config.heads)
        self.feed_forward_in = nn.Linear(config.width, 4 * config.width)
        self.feed_forward_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, D]."""
        normed, gate = self.attention_norm(x, condition)
        x = x + gate * self.attention(normed)
        normed, gate = self.feed_forward_norm(x, condition)
        hidden = nn.functional.gelu(self.feed_forward_in(normed), approximate="tanh")
        return x + gate * self.feed_forward_out(hidden)


class TorchDenoiser(nn.Module):
    """The Transformer over L tokens of width W of B regions, conditioned on prompts of E entries."""

    def __init__(self, config: DenoiserConfig, tokens: int, token_width: int, prompt_width: int) -> None:
        """Makes the layers."""
        super().__init__()
        width = config.width
        self.prompt = nn.Sequential(
            nn.Linear(prompt_width, config.prompt_bottleneck), nn.SiLU(), nn.Linear(config.prompt_bottleneck, width)
        )
        self.null = nn.Parameter(0.02 * torch.randn(width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-2, 5, width // 2, base=2.0))
        self.tokens_in = nn.Linear(token_width, width)
        self.code = nn.Parameter(0.2 * torch.randn(tokens, width))  # of place, layer and kind, which add up to one
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.out_norm = AdaLNZero(width)
        self.tokens_out = nn.Linear(width, token_width)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor
    ) -> torch.Tensor:
        """Returns v [B, L, W]; t and prompt_mask are [B], the prompt is [B, E]."""
        angles = t[:, None] * self.frequencies
        step = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        condition = step + prompt_mask[:, None] * self.prompt(prompt) + (1 - prompt_mask[:, None]) * self.null
        x = self.tokens_in(x_t) + self.code
        for layer in self.layers:
            x = layer(x, condition)
        return self.tokens_out(self.out_norm(x, condition)[0])


def load_flax(
    network: TorchDenoiser, variables: dict, layer_of_token: Sequence[int], kind_of_token: Sequence[int]
) -> None:
    """Gives a network the variables of a Flax denoiser with the prompt in the adaptive norm, in place.

    Args:
      network: of the same sizes.
      variables: of `Denoiser`, as `init` makes them.
      layer_of_token: index of every token's layer.
      kind_of_token: index of every token's kind in `models.kinds.LAYER_KINDS`.
    """
    held = jax.tree.map(np.asarray, variables)
    positions = (
        held["place_embedding"]
        + held["layer_embedding"][list(layer_of_token)]
        + held["kind_embedding"][list(kind_of_token)]
    )
    state = {"null": held["condition"]["prompt_null"], "code": positions, "frequencies": network.frequencies.numpy()}

    def put(name: str, layer: dict) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = layer["kernel"].T, layer["bias"]

    put("prompt.0", held["condition"]["prompt_in"])
    put("prompt.2", held["condition"]["prompt_out"])
    put("time.0", held["condition"]["time_in"])
    put("time.2", held["condition"]["time_out"])
    put("tokens_in", held["tokens_in"])
    put("tokens_out", held["tokens_out"])
    put("out_norm.modulation", held["out_norm"]["modulation"])
    for index in range(len(network.layers)):
        for norm in ("attention_norm", "feed_forward_norm"):
            put(f"layers.{index}.{norm}.modulation", held[f"{norm}_{index}"]["modulation"])
        for dense in ("feed_forward_in", "feed_forward_out"):
            put(f"layers.{index}.{dense}", held[f"{dense}_{index}"])
        attention = held[f"attention_{index}"]
        width = attention["out"]["bias"].shape[0]
        parts = [attention[name] for name in ("query", "key", "value")]
        kernel = np.concatenate([part["kernel"].reshape(width, width) for part in parts], axis=1)
        put(
            f"layers.{index}.attention.qkv",
            {"kernel": kernel, "bias": np.concatenate([part["bias"].reshape(-1) for part in parts])},
        )
        out = {"kernel": attention["out"]["kernel"].reshape(width, width), "bias": attention["out"]["bias"]}
        put(f"layers.{index}.attention.out", out)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})


def make_torch_step(
    config: DenoiserConfig, *, tokens: int, token_width: int, prompt_width: int, batch: int, compiled: bool
) -> Callable[[], float]:
    """A training step on one batch of noise, on the GPU in bfloat16 where there is one, else on all cores.

    Args:
      config: size of the network.
      tokens: L.
      token_width: W.
      prompt_width: E.
      batch: B.
      compiled: whether the loss goes through `torch.compile`.

    Returns:
      A function that takes one step and returns its loss.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = TorchDenoiser(config, tokens, token_width, prompt_width).to(device)
    x0, prompt = torch.randn(batch, tokens, token_width, device=device), torch.randn(batch, prompt_width, device=device)
    average = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)

    def loss_of(x0: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        t = torch.rand(len(x0), device=device)
        prompt_mask = (torch.rand(len(x0), device=device) >= 0.15).float()
        noise = torch.randn_like(x0)
        angle = (0.5 * math.pi * t)[:, None, None]
        alpha, sigma = angle.cos(), angle.sin()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            v = network(alpha * x0 + sigma * noise, t, prompt, prompt_mask).float()
        return (v - (alpha * noise - sigma * x0)).square().mean()

    loss_fn = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = loss_fn(x0, prompt)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 0.01)
        return loss.item()

    return step
