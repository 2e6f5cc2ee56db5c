"""Speed of training and of drawing from the generator, beside the same Transformer in PyTorch where that is there.

    python -m benchmarks.diffusion [--quick] [--nopeer]
    python -m benchmarks.diffusion --devices 1,2     the step with the functional loss, spread over so many devices

Training is the token loss alone with AdamW and an averaged copy, at three sizes: the default one, and the tokens of the
published STGCN (265 x 64) and Graph WaveNet (359 x 256) at a width of 512 (Yuan et al., arXiv 2402.11922); and, without
a peer, the default one with the functional loss. Draws are of a thousand regions, at the default size and, elsewhere
than on a CPU, at that of `--preset paper` with STGCN (289 tokens of 64). The operations are those of the step's matrix
products, without what is computed again; the ceiling is a matrix product of 8192 x 8192 (1024 x 1024 on a CPU) in the
type that the denoiser computes in, measured in the same run. The peer takes its steps in turn with ours, on the same
batch size and threads.

With --devices, twenty steps of the same batches are taken on each number of devices from the same start, and the
largest difference between the parameters that they end with is printed too. Virtual devices of a CPU share its cores:
what is measured there is what spreading costs. Set PJRT_NPROC to twice the largest number, or they can wait for ever.
"""

import dataclasses
import functools
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measuring import matrix_products, median_seconds, print_line, product_operations
from experiments import command_line
from gpdiff_jax.cities import SimulationConfig, simulate_cities
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, make_denoiser
from gpdiff_jax.diffusion.losses import DiffusionBatch, bind_functional, make_diffusion_loss
from gpdiff_jax.diffusion.training import PretrainConfig, TrainingData, ZooLatents, draw_batch, make_network_step
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models import make_model
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, scale_prompts
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.training.loop import compile_steps
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import first_copy, replicate, training_devices, use_every_core
from gpdiff_jax.training.step import start_training
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.codec import encode_zoo, fit_codec
from gpdiff_jax.zoo.pooled import initial_params
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

flags.DEFINE_bool("quick", False, "fewer repeats, sizes and samplers; ends within two minutes")
flags.DEFINE_bool("peer", True, "measure PyTorch too, where it is installed")
flags.DEFINE_list("devices", None, "numbers of devices, separated by commas, to spread the training step over")
flags.DEFINE_integer("batch", None, "batch at the published sizes; 8 on a CPU, 256 elsewhere, if not given", 1)

_PUBLISHED = DenoiserConfig(width=512, layers=4, heads=8)
_TOKENS = {"published_stgcn": (265, 64), "published_graph_wavenet": (359, 256)}
_PROMPT_WIDTH = 64
_CHAIN = 4  # products of the ceiling
_SAMPLERS = (("ddim", 10), ("ddim", 20), ("ddim", 50), ("dpm_solver", 10), ("dpm_solver", 20), ("ddpm", 100))
_PAPER_SAMPLERS = (("ddim", 20), ("ddpm", 500))


class _Steps(NamedTuple):
    """Training steps that can be taken, and what one of them costs."""

    take: Callable[[], Any]
    number: int  # that one call takes
    operations: float  # of one step
    temporary: int  # bytes beside state and data
    params: Callable[[], Any]  # that they have come to, on the host


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    if flags.FLAGS.devices:
        return _measure_devices([_count(word) for word in flags.FLAGS.devices])
    use_every_core()
    quick, on_cpu = flags.FLAGS.quick, jax.default_backend() == "cpu"
    ceiling = _measure_ceiling(on_cpu)
    small = Settings.from_preset("small")
    (data, own), config = _simulated(small), small.pretrain
    _measure("small_with_functional_loss", _our_steps(data, config, functional=True), ceiling, {}, quick)
    _measure_draws("", data, own, config.denoiser, _SAMPLERS[1:2] if quick else _SAMPLERS)
    if not on_cpu:
        paper = Settings.from_preset("paper")
        samplers = _PAPER_SAMPLERS[: 1 if quick else None]
        _measure_draws("paper_preset, ", *_simulated(paper), paper.pretrain.denoiser, samplers)
    sizes = {"small": (data.zoo.x0.shape[-2:], config)}
    batch = flags.FLAGS.batch or (8 if on_cpu else 256)
    for name, shape in ({} if quick and on_cpu else _TOKENS).items():
        sizes[name] = shape, PretrainConfig(denoiser=_PUBLISHED, batch=batch)
    for name, (shape, config) in sizes.items():
        ours = _our_steps(TrainingData(data.sources, _random_latents(shape), data.codec), config, functional=False)
        peers = _peers(shape, config, quick) if flags.FLAGS.peer else {}
        _measure(name, ours, ceiling, peers, quick)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise InputError(f"--devices names {word!r}, which is no number of devices; name numbers of at least 1")
    return int(word)


def _measure_devices(counts: list[int]) -> None:
    """Steps per second on each number of devices, and how far apart they end."""
    jax.config.update("jax_num_cpu_devices", max(counts))  # where the devices are those of a CPU
    if len(jax.local_devices()) < max(counts):
        raise InputError(f"--devices names {max(counts)}, there are {len(jax.local_devices())}; name fewer")
    (data, _), ends = _simulated(Settings.from_preset("small")), []
    for count in counts:
        steps = _our_steps(data, PretrainConfig(), functional=True, devices=jax.local_devices()[:count])
        steps.take()
        ends.append(steps.params())
        seconds = median_seconds(steps.take, 3 if flags.FLAGS.quick else 9) / steps.number
        print_line("diffusion", f"small_with_functional_loss_{count}_devices", "training_steps", 1 / seconds, "1/s")
    for count, end in zip(counts[1:], ends[1:], strict=True):
        apart = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ends[0], end)), strict=True))
        case = f"small_with_functional_loss_{counts[0]}_and_{count}_devices"
        print_line("diffusion", case, "largest_difference_after_20_steps", apart, "1")


def _measure_ceiling(on_cpu: bool) -> float:
    """Operations per second of a matrix product on all devices together."""
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, DenoiserConfig().compute_dtype)
    devices = jax.local_devices()
    square = jax.random.normal(jax.random.key(0), (len(devices), size, size), dtype) / math.sqrt(size)
    # One after another in one program, so that starting it is not measured.
    chain = jax.pmap(lambda x: jax.lax.fori_loop(0, _CHAIN, lambda _, y: x @ y, x), devices=devices)
    rate = len(devices) * _CHAIN * 2 * size**3 / median_seconds(lambda: chain(square), 33)
    print_line("diffusion", f"matmul_{size}_{np.dtype(dtype).name}", "rate", rate / 1e9, "GFLOP/s")
    return rate


def _simulated(settings: Settings) -> tuple[TrainingData, Prompts]:
    """Sources, latents of random parameters, and their codec; and the prompts of the sources."""
    codec_config = settings.pretrain.codec
    cities = simulate_cities(SimulationConfig(cities=2, regions=48, days=28), seed=0)
    sources = with_prompts(prepare_sources(cities, settings.data, key=jax.random.key(0)), cities)
    model = make_model("stgcn", sources.sizes)
    keys = jax.random.split(jax.random.key(3), sources.num_regions)
    zoo = jax.vmap(lambda key: initial_params(model, sources.graphs, sources.sizes, key=key))(keys)
    layout = make_layout(jax.tree.map(lambda leaf: leaf[0], zoo), codec_config.token_width)
    tokens = np.asarray(jax.vmap(lambda params: to_tokens(layout, params))(zoo))
    codec = fit_codec(layout, tokens[0], tokens, np.ones(len(tokens)), codec_config.components)
    prompts = scale_prompts(sources.prompts, fit_prompt_scaler(sources.prompts, np.asarray(sources.city_index)))
    x0 = encode_zoo(codec, jnp.asarray(tokens)[:, None])
    latents = ZooLatents(x0, prompts, jnp.ones(sources.num_regions), sources.prompts.spatial)
    return TrainingData(sources, latents, codec), sources.prompts


def _random_latents(shape: tuple[int, ...]) -> ZooLatents:
    keys = jax.random.split(jax.random.key(1))
    x0 = jax.random.normal(keys[0], (64, 1, *shape))
    return ZooLatents(x0, jax.random.normal(keys[1], (1, 64, _PROMPT_WIDTH)), jnp.ones(64))


def _our_steps(
    data: TrainingData, config: PretrainConfig, *, functional: bool, devices: list[Any] | None = None
) -> _Steps:
    shape, model = data.zoo.x0.shape[2:], make_model("stgcn", data.sources.sizes)
    if functional:
        mask, denoiser = jnp.asarray(data.codec.mask()), make_denoiser(config.denoiser, data.codec, data.zoo.spatial)
    else:
        mask, denoiser = jnp.ones(shape), Denoiser(config.denoiser, tuple(row % 5 for row in range(shape[0])), shape[1])
    # Of 32 bits, so that attention is made of products that can be counted.
    counted = denoiser.clone(config=dataclasses.replace(config.denoiser, dtype="float32"))

    def loss_fn(
        variables: Params, data: TrainingData, batch: DiffusionBatch, key: Key, denoiser: Denoiser = denoiser
    ) -> Any:
        judge = bind_functional(model, data.sources, data.codec, config.windows) if functional else _unjudged
        loss = make_diffusion_loss(
            denoiser,
            judge,
            mask,
            functional_weight=config.functional_weight,
            token_weight=config.token_weight,
            prompt_dropout=config.prompt_dropout,
            prompt_noise=config.prompt_noise,
            pure_noise_share=config.pure_noise_share,
        )
        return loss(variables, batch, key)

    example = data.zoo.x0[0, 0], jnp.zeros(()), data.zoo.prompts[0, 0], jnp.ones(())
    variables: Params = denoiser.init(jax.random.key(5), *example)["params"]
    key = jax.random.key(6)
    batch = draw_batch(data.zoo, config.batch, key=key)
    grad = jax.grad(functools.partial(loss_fn, denoiser=counted), has_aux=True)
    operations = product_operations(matrix_products(grad, variables, data, batch, key))
    optimiser = clipped_adam(1e-4, weight_decay=config.weight_decay)
    chosen = tuple(training_devices(config.batch, devices))
    number = 20 if shape[0] < 50 or jax.default_backend() != "cpu" else 1
    run: Any = compile_steps(make_network_step(loss_fn, optimiser, config, len(chosen)), number, chosen)
    state = replicate(start_training(variables, optimiser, averaged=True), chosen)
    shared = replicate((data, key), chosen)
    run = run.lower(state, *shared).compile()
    held = [state]

    def take() -> None:
        held[0], metrics = run(held[0], *shared)
        jax.block_until_ready(metrics)

    temporary = run.memory_analysis().temp_size_in_bytes
    return _Steps(take, number, operations, temporary, lambda: first_copy(held[0].params))


def _unjudged(x0: jax.Array, batch: DiffusionBatch, *, key: Key) -> jax.Array:
    del batch, key
    return jnp.zeros(x0.shape[0])


def _peers(shape: tuple[int, ...], config: PretrainConfig, quick: bool) -> dict[str, Callable[[], Any]]:
    """The step in PyTorch, as it is and compiled; empty where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed; no peer", file=sys.stderr)
        return {}
    from benchmarks.torch_denoiser import make_torch_step

    kinds = {"torch eager": False} | ({} if quick else {"torch compiled": True})
    sizes = {"tokens": shape[0], "token_width": shape[1], "prompt_width": _PROMPT_WIDTH}
    return {
        name: make_torch_step(config.denoiser, **sizes, batch=config.batch, compiled=compiled)
        for name, compiled in kinds.items()
    }


def _measure(case: str, ours: _Steps, ceiling: float, peers: dict[str, Callable[[], Any]], quick: bool) -> None:
    """Takes steps in turn, and prints."""
    repeats = 5 if quick or ours.number == 1 else 15
    ours.take()
    for step in peers.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    for _ in range(repeats):
        for name, step in (("ours", ours.take), *peers.items()):
            begin = time.perf_counter()
            for _ in range(1 if name == "ours" else ours.number):
                step()
            times[name].append((time.perf_counter() - begin) / ours.number)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    rate = 1 / seconds["ours"]
    for name in peers:
        peer = {"peer": name, "peer_value": 1 / seconds[name], "ratio": seconds[name] / seconds["ours"]}
        print_line("diffusion", case, "training_steps", rate, "1/s", **peer)
    if not peers:
        print_line("diffusion", case, "training_steps", rate, "1/s")
    print_line("diffusion", case, "operations", ours.operations / 1e9, "GFLOP per step")
    print_line("diffusion", case, "share_of_matmul_ceiling", ours.operations * rate / ceiling, "1")
    print_line("diffusion", case, "temporary_memory", ours.temporary / 2**20, "MiB")


def _measure_draws(
    case: str, data: TrainingData, own: Prompts, config: DenoiserConfig, samplers: Sequence[tuple[str, int]]
) -> None:
    """Parameters per second, from a network that was not trained."""
    regions = 1000
    variables: Params = make_denoiser(config, data.codec, data.zoo.spatial).init(
        jax.random.key(5), data.zoo.x0[0, 0], jnp.zeros(()), data.zoo.prompts[0, 0], jnp.ones(())
    )["params"]
    width = len(own.names)
    hypernetwork = Hypernetwork(
        model_name="stgcn",
        sizes=data.sources.sizes,
        data=data.sources.config,
        denoiser_config=config,
        variables=variables,
        codec=data.codec,
        prompt_scaler=fit_prompt_scaler(own, np.asarray(data.sources.city_index)),
        prompt_names=own.names,
    )
    values = jax.random.normal(jax.random.key(7), (1, regions, width))
    prompts = dataclasses.replace(own, values=values, region_ids=jnp.arange(regions, dtype=jnp.uint32))
    for sampler, steps in samplers:
        drawn = GenerateConfig(samples=1, steps=steps, sampler=sampler)
        seconds = median_seconds(lambda: hypernetwork.generate(prompts, key=jax.random.key(8), config=drawn).params, 3)  # noqa: B023
        print_line("diffusion", f"{case}{sampler}_{steps}", "draws", regions / seconds, "regions/s")


if __name__ == "__main__":
    command_line.run(main)
