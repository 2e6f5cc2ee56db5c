"""Time of the two steps that the main job is made of, against the arithmetic that they need.

    python -m benchmarks.training_steps [--quick]

Cases: one training step of one region's STGCN (forward, backward, Adam) inside the compiled loop of harvest, and one
training step of the generator. The operations are those that XLA counts in the compiled step; the ceiling is a float32
matrix product of 1024 x 1024 measured in the same run.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import command_line
from gpdiff_jax.base import initial_params, validation_error
from gpdiff_jax.cities import SimulationConfig, simulate_cities
from gpdiff_jax.codec import encode_zoo, fit_codec
from gpdiff_jax.diffusion.denoiser import Denoiser
from gpdiff_jax.diffusion.losses import bind_functional, make_diffusion_loss
from gpdiff_jax.diffusion.training import PretrainConfig, ZooCodes, draw_batch
from gpdiff_jax.harvest import HarvestConfig, make_region_trainer
from gpdiff_jax.models import make_model
from gpdiff_jax.prompts.prompt import fit_prompt_scaler, scale_prompts
from gpdiff_jax.sources import DataConfig, prepare_sources
from gpdiff_jax.tokens import make_layout, to_tokens

flags.DEFINE_bool("quick", False, "fewer repeats; ends within two minutes")


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time after one warm-up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _print(case: str, metric: str, value: float, unit: str) -> None:
    device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    line = {
        "benchmark": "training_steps",
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "device": device,
    }
    print(json.dumps(line), flush=True)


def _ceiling(repeats: int) -> float:
    """float32 operations per second of a large matrix product."""
    square = jax.random.normal(jax.random.key(0), (1024, 1024))
    product = jax.jit(lambda x: x @ x)
    return 2 * 1024**3 / _seconds(lambda: product(square), repeats)


def _operations(function: Callable, *arguments: object) -> float:
    cost: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float(cost["flops"])


def _report(case: str, seconds: float, operations: float, ceiling: float) -> None:
    _print(case, "time", 1e3 * seconds, "ms")
    _print(case, "operations", operations / 1e6, "MFLOP")
    _print(case, "share_of_matmul_ceiling", operations / seconds / ceiling, "1")


def main(argv: list[str]) -> None:
    """Measures both steps on simulated cities."""
    del argv
    repeats = 3 if flags.FLAGS.quick else 11
    ceiling = _ceiling(5 * repeats)
    _print("matmul_1024", "rate", ceiling / 1e9, "GFLOP/s")
    cities = simulate_cities(SimulationConfig(cities=2, regions=48, days=28), seed=0)
    for covariates in ("none", "calendar", "profile"):
        sources = prepare_sources(cities, DataConfig(covariates=covariates), key=jax.random.key(0))
        model = make_model("stgcn", sources.sizes)
        start = initial_params(model, sources.graphs, sources.sizes, key=jax.random.key(1))
        # As in harvest, 40 steps between two evaluations.
        config = HarvestConfig(steps=40, evaluate_every=40, snapshots=1)
        train = make_region_trainer(model, sources, config, key=jax.random.key(2))
        regions = jnp.arange(16)
        many = jax.jit(lambda rows, train=train, start=start: jax.lax.map(lambda row: train(start, row), rows))
        seconds = _seconds(lambda many=many, regions=regions: many(regions), repeats) / (16 * config.steps)
        # XLA counts a loop's body once: one step, and the validation before and after the 40.
        validation = _operations(partial(validation_error, model, start, sources), regions[0])
        total = _operations(partial(train, start), regions[0])
        operations = total - 2 * validation + 2 * validation / config.steps
        _report(f"stgcn_region_step_{covariates}", seconds, operations, ceiling)
    _pretrain_step(cities, ceiling, repeats)


def _pretrain_step(cities: list, ceiling: float, repeats: int) -> None:
    sources = prepare_sources(cities, DataConfig(), key=jax.random.key(0))
    model, config = make_model("stgcn", sources.sizes), PretrainConfig()
    keys = jax.random.split(jax.random.key(3), sources.num_regions)
    zoo = jax.vmap(lambda key: initial_params(model, sources.graphs, sources.sizes, key=key))(keys)
    layout = make_layout(jax.tree.map(lambda leaf: leaf[0], zoo), config.codec.token_width)
    tokens = np.asarray(jax.vmap(lambda params: to_tokens(layout, params))(zoo))
    codec = fit_codec(layout, tokens[0], tokens, np.ones(len(tokens)), config.codec.components)
    prompts = scale_prompts(sources.prompts, fit_prompt_scaler(sources.prompts, np.asarray(sources.city_index)))
    codes = ZooCodes(encode_zoo(codec, jnp.asarray(tokens)[:, None]), prompts, jnp.ones(sources.num_regions))
    mask = jnp.asarray(codec.mask())
    denoiser = Denoiser(config.denoiser, codec.layer_of_code, mask.shape[1])
    loss_fn = make_diffusion_loss(
        denoiser,
        bind_functional(model, sources, codec, config.windows),
        mask,
        functional_weight=config.functional_weight,
        token_weight=config.token_weight,
        prompt_dropout=config.prompt_dropout,
        prompt_noise=config.prompt_noise,
        pure_noise_share=config.pure_noise_share,
    )
    batch = draw_batch(codes, config.batch, key=jax.random.key(4))
    example = codes.x0[0, 0], jnp.zeros(()), prompts[0, 0], jnp.ones(())
    variables = denoiser.init(jax.random.key(5), *example)["params"]
    step = jax.jit(jax.grad(loss_fn, has_aux=True))
    seconds = _seconds(lambda: step(variables, batch, jax.random.key(6)), 3 * repeats)
    operations = _operations(jax.grad(loss_fn, has_aux=True), variables, batch, jax.random.key(6))
    _report("generator_step_profile", seconds, operations, ceiling)


if __name__ == "__main__":
    command_line.run(main)
