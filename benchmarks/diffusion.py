"""Time of one training step of the generator, against the arithmetic that it needs.

    python -m benchmarks.diffusion [--quick]

The operations are those that XLA counts in the compiled step; the ceiling is a float32 matrix product of 1024 x 1024
measured in the same run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measuring import median_seconds, print_line
from experiments import command_line
from gpdiff_jax.base import initial_params
from gpdiff_jax.cities import SimulationConfig, simulate_cities
from gpdiff_jax.codec import encode_zoo, fit_codec
from gpdiff_jax.diffusion.denoiser import Denoiser
from gpdiff_jax.diffusion.losses import bind_functional, make_diffusion_loss
from gpdiff_jax.diffusion.training import PretrainConfig, ZooCodes, draw_batch
from gpdiff_jax.models import make_model
from gpdiff_jax.prompts.prompt import fit_prompt_scaler, scale_prompts
from gpdiff_jax.sources import DataConfig, prepare_sources
from gpdiff_jax.tokens import make_layout, to_tokens

flags.DEFINE_bool("quick", False, "fewer repeats; ends within two minutes")


def main(argv: list[str]) -> None:
    """Measures the step on simulated cities."""
    del argv
    repeats = 9 if flags.FLAGS.quick else 33
    square = jax.random.normal(jax.random.key(0), (1024, 1024))
    product = jax.jit(lambda x: x @ x)
    ceiling = 2 * 1024**3 / median_seconds(lambda: product(square), 2 * repeats)
    print_line("diffusion", "matmul_1024", "rate", ceiling / 1e9, "GFLOP/s")
    cities = simulate_cities(SimulationConfig(cities=2, regions=48, days=28), seed=0)
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
    seconds = median_seconds(lambda: step(variables, batch, jax.random.key(6)), repeats)
    cost: Any = step.lower(variables, batch, jax.random.key(6)).compile().cost_analysis()
    print_line("diffusion", "training_step", "time", 1e3 * seconds, "ms")
    print_line("diffusion", "training_step", "operations", cost["flops"] / 1e6, "MFLOP")
    print_line("diffusion", "training_step", "share_of_matmul_ceiling", cost["flops"] / seconds / ceiling, "1")


if __name__ == "__main__":
    command_line.run(main)
