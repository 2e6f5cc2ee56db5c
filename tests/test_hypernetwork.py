"""In: a zoo of random parameters. Out: a generator that draws, saves and loads without changing a bit."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork, _make_draw
from gpdiff_jax.models import Model, ModelSizes, registry
from gpdiff_jax.pretraining import pretrain
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, target_prompts
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.training.storage import load_arrays, save_arrays
from gpdiff_jax.zoo.codec import CodecConfig, fit_codec
from gpdiff_jax.zoo.parameter_zoo import HeldVectors, ParameterZoo
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

_DENOISER = DenoiserConfig(width=8, layers=1, heads=2, prompt_bottleneck=4)
_GENERATE = GenerateConfig(samples=3, steps=4)


@functools.cache
def _make_linear(sizes: ModelSizes) -> Model:
    """The last reading, scaled and shifted: compiles in no time."""

    def init(key, graph, history, covariates):
        del key, graph, history, covariates
        return {"head": {"bias": jnp.zeros(sizes.horizon)}, "scale": jnp.ones((sizes.horizon, 1))}

    def apply(params, graph, history, covariates):
        del graph, covariates
        return history[0, -1, 0] * params["scale"] + params["head"]["bias"][:, None]

    return Model("linear", init, apply, kinds=(("head", "output"), ("scale", "temporal")))


@pytest.fixture(scope="module", autouse=True)
def _linear_is_registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "linear", _make_linear)
        yield


@pytest.fixture(scope="module", name="zoo")
def _zoo(simulated_cities: list[City]) -> ParameterZoo:
    data = DataConfig(covariates="calendar", variants=3, max_neighbours=2)
    cities = simulated_cities[:2]
    sources = with_prompts(prepare_sources(cities, data, key=jax.random.key(0), validation_windows=4), cities)
    rng = np.random.default_rng(0)
    pooled = {"head": {"bias": jnp.zeros(6)}, "scale": jnp.ones((6, 1))}
    return ParameterZoo(
        model="linear",
        pooled=pooled,
        vectors=HeldVectors(
            jax.tree.map(
                lambda leaf: np.asarray(leaf) + rng.normal(size=(16, 2, *leaf.shape)).astype(np.float32), pooled
            )
        ),
        validation_mae=np.ones((16, 2), np.float32),
        start_mae=np.ones(16, np.float32),
        step=np.ones((16, 2), np.int32),
        seed=np.zeros((16, 2), np.int32),
        data_window=np.zeros((16, 2), np.int32),
        prompts=sources.prompts,
        names=sources.names,
        city_index=np.asarray(sources.city_index),
        sources=sources,
    )


def _generator(zoo: ParameterZoo, components: int, space: str = "layers") -> Hypernetwork:
    """A generator of random weights: what it draws depends on all of them."""
    layout = make_layout(zoo.pooled, 4, {"head": "output", "scale": "temporal"})
    tokens = np.asarray(jax.vmap(jax.vmap(functools.partial(to_tokens, layout)))(jax.tree.map(jnp.asarray, zoo.params)))
    tokens = tokens.reshape(32, layout.num_tokens, 4)
    codec = fit_codec(layout, np.asarray(to_tokens(layout, zoo.pooled)), tokens, np.ones(32), components, space=space)
    rows, width = codec.mask().shape
    example = jnp.zeros((rows, width)), jnp.zeros(()), zoo.prompts.values[0, 0], jnp.ones(())
    init = Denoiser(_DENOISER, codec.layer_of_row, width).init
    shapes = jax.eval_shape(init, jax.random.key(0), *example)["params"]
    rng = np.random.default_rng(1)
    return Hypernetwork(
        model_name="linear",
        sizes=ModelSizes(12, 6, 2, 20),
        data=DataConfig(covariates="calendar", variants=3, max_neighbours=2),
        denoiser_config=_DENOISER,
        variables=jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), shapes),
        codec=codec,
        prompt_scaler=fit_prompt_scaler(zoo.prompts, zoo.city_index),
        prompt_names=zoo.prompts.names,
    )


@pytest.fixture(scope="module", name="hypernetwork")
def _hypernetwork(zoo: ParameterZoo) -> Hypernetwork:
    return _generator(zoo, 5)


@pytest.fixture(scope="module", name="prompts")
def _told(simulated_cities: list[City]) -> Prompts:
    return target_prompts(simulated_cities[2], support_days=3)


def _leaves(
    hypernetwork: Hypernetwork, prompts: Prompts, config: GenerateConfig = _GENERATE, seed: int = 2
) -> np.ndarray:
    """All generated parameters as [K, R, ...] in one row per region."""
    params = hypernetwork.generate(prompts, key=jax.random.key(seed), config=config).params
    return np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(params)], axis=2)


@pytest.mark.parametrize(("components", "space"), [(5, "layers"), (0, "layers"), (9, "joint")])
def test_a_saved_generator_draws_the_same_bit_for_bit(tmp_path, zoo, prompts, hypernetwork, components, space):
    hypernetwork = hypernetwork if components == 5 else _generator(zoo, components, space)
    hypernetwork.save(tmp_path / "made")
    read = Hypernetwork.load(tmp_path / "made")
    np.testing.assert_array_equal(_leaves(read, prompts), _leaves(hypernetwork, prompts))
    for name in ("model_name", "sizes", "data", "denoiser_config", "prompt_names"):
        assert getattr(read, name) == getattr(hypernetwork, name), name
    assert read.codec.layout == hypernetwork.codec.layout and read.codec.space == space
    chex.assert_trees_all_equal(read.pooled, zoo.pooled)
    assert json.loads(read.summary()) == json.loads(hypernetwork.summary())


def test_what_is_drawn_fits_the_model_and_depends_on_the_key_and_the_prompt(hypernetwork, zoo, prompts):
    drawn = hypernetwork.generate(prompts, key=jax.random.key(2), config=_GENERATE)
    assert (drawn.model, drawn.data) == ("linear", hypernetwork.data)
    for leaf, like in zip(jax.tree.leaves(drawn.params), jax.tree.leaves(zoo.pooled), strict=True):
        assert leaf.shape == (3, 8, *like.shape) and np.isfinite(leaf).all()
    values = _leaves(hypernetwork, prompts)
    assert all((values[k] != values[j]).any() for k in range(3) for j in range(k))
    np.testing.assert_array_equal(_leaves(hypernetwork, prompts), values)
    assert (_leaves(hypernetwork, prompts, seed=3) != values).any()
    moved = dataclasses.replace(prompts, values=prompts.values.at[0, 4].multiply(0.5))
    changed = _leaves(hypernetwork, moved)
    assert (changed[:, 4] != values[:, 4]).any()
    # A region hears its own prompt alone.
    np.testing.assert_array_equal(np.delete(changed, 4, axis=1), np.delete(values, 4, axis=1))


def test_a_null_prompt_is_what_guidance_pushes_away_from(hypernetwork, prompts):
    without = _leaves(hypernetwork, prompts, dataclasses.replace(_GENERATE, guidance=0.0))
    np.testing.assert_allclose(_leaves(hypernetwork, prompts.null), without, rtol=1e-5, atol=1e-6)
    assert (_leaves(hypernetwork, prompts) != without).any(axis=(0, 2)).all()
    # Nothing of a null prompt is looked at, region by region.
    half = dataclasses.replace(prompts, mask=jnp.arange(8) < 4)
    drawn = _leaves(hypernetwork, half)
    np.testing.assert_array_equal(drawn[:, 4:], _leaves(hypernetwork, prompts.null)[:, 4:])
    np.testing.assert_array_equal(drawn[:, :4], _leaves(hypernetwork, prompts)[:, :4])


@pytest.mark.parametrize("space", ["layers", "joint"])
def test_shrinkage_goes_from_the_pooled_model_to_what_is_drawn(zoo, prompts, space):
    generator = _generator(zoo, 5, space)
    whole, half, none = (
        _leaves(generator, prompts, dataclasses.replace(_GENERATE, shrinkage=share)) for share in (1.0, 0.5, 0.0)
    )
    pooled = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(zoo.pooled)])
    np.testing.assert_allclose(none, np.broadcast_to(pooled, none.shape), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(half, (whole + pooled) / 2, rtol=1e-5, atol=1e-5)
    assert (whole != pooled).any()
    with pytest.raises(InputError, match=r"`shrinkage` must be in \[0, 1\], got 1.5"):
        GenerateConfig(shrinkage=1.5)


def test_the_noise_of_a_draw_and_that_of_its_steps_have_keys_of_their_own(hypernetwork, prompts, monkeypatch):
    """The key that is folded with the number of a step draws nothing itself."""
    codec, key = hypernetwork.codec, jax.random.key(2)
    mask = jnp.asarray(codec.mask())

    def drawn(what):
        def sample(sampler, schedule, denoise_fn, noise, steps, fresh):
            return noise if what == "start" else fresh(jnp.int32(what))

        monkeypatch.setattr("gpdiff_jax.diffusion.drawing.sample", sample)
        return _leaves(hypernetwork, prompts)

    parts = {}
    for what in ("start", 0, 1):
        _make_draw.cache_clear()
        parts[what] = drawn(what)
    _make_draw.cache_clear()

    @jax.jit
    def directly(region):
        own = jax.random.fold_in(jax.random.fold_in(key, 0), region)
        return codec.params(jax.random.normal(own, mask.shape) * mask)

    parts["unsplit"] = np.concatenate(
        [np.asarray(leaf).reshape(1, 1, -1) for leaf in jax.tree.leaves(directly(prompts.region_ids[0]))], axis=2
    )
    rows = [part[0, 0] for part in parts.values()]
    assert all((one != other).any() for k, one in enumerate(rows) for other in rows[:k])


def test_a_regions_draws_do_not_depend_on_the_regions_beside_it(hypernetwork, prompts):
    rows = np.array([6, 1, 3])
    some = dataclasses.replace(prompts, values=prompts.values[:, rows], region_ids=prompts.region_ids[rows])
    np.testing.assert_allclose(
        _leaves(hypernetwork, some), _leaves(hypernetwork, prompts)[:, rows], rtol=1e-4, atol=1e-5
    )


def test_saved_on_one_number_of_devices_and_loaded_on_another_it_draws_the_same_bits(tmp_path, hypernetwork, prompts):
    many = jnp.tile(prompts.values, (1, 12, 1))  # 96 regions, so that every device gets a chunk
    ids = jnp.arange(many.shape[1], dtype=jnp.uint32)
    drawn = hypernetwork.generate(Prompts(many, ids, prompts.names), key=jax.random.key(2), config=_GENERATE).params
    hypernetwork.save(tmp_path / "made")
    np.savez(tmp_path / "prompts.npz", values=many, region_ids=ids)
    for devices in (1, 4):
        assert len(jax.local_devices()) != devices
        command = [sys.executable, "-m", "tests.generator_worker", str(tmp_path), str(devices)]
        subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], check=True, timeout=120)
        with np.load(tmp_path / f"drawn_{devices}.npz") as held:
            for place, leaf in enumerate(jax.tree.leaves(drawn)):
                np.testing.assert_array_equal(held[str(place)], leaf)


def test_more_samples_begin_with_the_same_ones(hypernetwork, prompts):
    more = _leaves(hypernetwork, prompts, dataclasses.replace(_GENERATE, samples=5))
    np.testing.assert_array_equal(more[:3], _leaves(hypernetwork, prompts))


def test_without_guidance_the_prompt_is_not_heard_and_with_more_it_is_heard_more(hypernetwork, prompts):
    other = dataclasses.replace(prompts, values=prompts.values * 0.5 + 1.0)

    def gap(guidance: float) -> float:
        config = dataclasses.replace(_GENERATE, guidance=guidance)
        return float(np.abs(_leaves(hypernetwork, prompts, config) - _leaves(hypernetwork, other, config)).mean())

    assert gap(0.0) == 0.0
    assert 0 < gap(1.0) < gap(2.0)


def test_prompts_with_other_entries_are_refused_by_name(hypernetwork, prompts):
    named = dataclasses.replace(prompts, names=("profile_99h", *prompts.names[1:]))
    with pytest.raises(InputError, match=r"differ in \['profile_00h', 'profile_99h'\]; make the prompts"):
        hypernetwork.generate(named, key=jax.random.key(0))


def test_prompts_in_another_order_are_refused_in_words_that_say_so(hypernetwork, prompts):
    swapped = dataclasses.replace(prompts, names=(prompts.names[1], prompts.names[0], *prompts.names[2:]))
    with pytest.raises(InputError, match="profile_0"):
        hypernetwork.generate(swapped, key=jax.random.key(0))


def test_a_folder_that_holds_no_generator_is_refused(tmp_path, hypernetwork):
    with pytest.raises(InputError, match="no hypernetwork at"):
        Hypernetwork.load(tmp_path / "none")
    hypernetwork.save(tmp_path / "made")
    arrays, facts = load_arrays(tmp_path / "made", 7, "hypernetwork")
    save_arrays(tmp_path / "newer", arrays, facts | {"format": 99})
    with pytest.raises(InputError, match="has format 99"):
        Hypernetwork.load(tmp_path / "newer")
    largest = max(
        (p for p in pathlib.Path(tmp_path / "made").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    largest.unlink()
    with pytest.raises(InputError, match=r"the hypernetwork at .* is damaged"):
        Hypernetwork.load(tmp_path / "made")


@pytest.mark.parametrize(
    ("array", "fact", "words"),
    [
        ({"prompts/std": np.ones(2, np.float32)}, {}, r"the array 'prompts/std' has the shape \(2,\), not \(\d+\)"),
        ({"prompts/mean": None}, {}, "it lacks the array 'prompts/mean'"),
        ({"variables/more": np.ones(2, np.float32)}, {}, "it holds an array 'variables/more' that nothing reads"),
        (
            {"variables/tokens_out/bias": np.nan},
            {},
            "not all values of the array 'variables/tokens_out/bias' are finite",
        ),
        ({"codec/scale": 1}, {}, "the array 'codec/scale' is of int32, not of floating-point numbers"),
        ({}, {"interval_minutes": "60"}, "`interval_minutes` is '60'"),
        ({}, {"prompt_names": ["a", 1]}, r"`prompt_names` is \['a', 1\]"),
        ({}, {"model": None}, "`model` is None"),
        ({}, {"denoiser/layers": 10**9}, "`denoiser.layers` is 1000000000, and there are"),
        ({}, {"denoiser/width": 16}, "the array 'variables/.*' has the shape"),
        ({}, {"denoiser/width": 8.0}, "`denoiser.width` is 8.0"),
        ({}, {"data/history": None}, "`data.history` is None"),
        ({}, {"data/near_days": -1.0}, "`near_days` must be at least 0, got -1.0"),
        ({}, {"data/unheard_of": 1}, "unexpected keyword argument 'unheard_of'"),
        ({}, {"sizes/history": 10**9}, "`sizes` is"),
    ],
)
def test_a_folder_whose_parts_do_not_go_together_is_refused_by_name(tmp_path, hypernetwork, array, fact, words):
    """Whole folders, whose hash is right: another program or version wrote them."""
    hypernetwork.save(tmp_path / "made")
    arrays, facts = load_arrays(tmp_path / "made", 7, "hypernetwork")
    flat = flax.traverse_util.flatten_dict(arrays, sep="/")
    for name, value in array.items():
        if value is None:
            del flat[name]
        elif np.ndim(value):
            flat[name] = value
        else:
            flat[name] = np.full_like(flat[name], value, dtype=np.int32 if value == 1 else np.float32)
    told = flax.traverse_util.flatten_dict(facts, sep="/", is_leaf=lambda path, _: path[:1] == ("layout",))
    save_arrays(
        tmp_path / "forged",
        flax.traverse_util.unflatten_dict(flat, sep="/"),
        flax.traverse_util.unflatten_dict(told | fact, sep="/"),
    )
    with pytest.raises(
        InputError, match=rf"the hypernetwork at '.*forged' is not what this version writes \(.*{words}"
    ):
        Hypernetwork.load(tmp_path / "forged")


def test_residuals_where_no_source_had_a_reading_come_back(tmp_path, hypernetwork):
    residuals = np.ones((hypernetwork.sizes.horizon, 3), np.float32)
    residuals[0] = np.nan
    dataclasses.replace(hypernetwork, residuals=jax.device_put(residuals)).save(tmp_path / "made")
    np.testing.assert_array_equal(np.asarray(Hypernetwork.load(tmp_path / "made").residuals), residuals)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("denoiser", "training", "sampler"),
    [
        (
            {"conditioning": "pre_adaptive", "schedule": "linear", "objective": "eps"},
            {"min_snr_gamma": 5.0, "functional_by_signal": True},
            "ddpm",
        ),
        ({"conditioning": "inductive_bias", "schedule": "rectified_flow", "objective": "flow"}, {}, "euler"),
        ({"schedule": "cosine"}, {"codec": CodecConfig(token_width=4, components=9, space="joint")}, "ddim"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(str(part) for part in value.values() if part),
)
def test_other_kinds_of_generators_are_trained_saved_loaded_and_drawn_from(
    tmp_path, zoo, prompts, denoiser, training, sampler
):
    config = PretrainConfig(
        denoiser=dataclasses.replace(_DENOISER, **denoiser),
        **{"steps": 240, "batch": 8, "windows": 2, "evaluations": 2, "learning_rate": 5e-3},
        **{"codec": CodecConfig(token_width=4, components=5), **training},
    )
    log: list[dict[str, float]] = []
    made = pretrain(zoo, key=jax.random.key(4), config=config, progress=lambda done, metrics: log.append(metrics))
    assert all(np.isfinite(list(line.values())).all() for line in log)
    assert log[-1]["token_loss"] < log[0]["token_loss"]
    made.save(tmp_path / "made")
    read = Hypernetwork.load(tmp_path / "made")
    assert read.denoiser_config == config.denoiser
    how = dataclasses.replace(_GENERATE, sampler=sampler)
    drawn = _leaves(made, prompts, how)
    np.testing.assert_array_equal(_leaves(read, prompts, how), drawn)
    assert np.isfinite(drawn).all() and (_leaves(made, prompts, how, seed=3) != drawn).any()
    # A region's draws, noise between the steps among them, come from its own id, not from its place.
    backwards = dataclasses.replace(prompts, values=prompts.values[:, ::-1], region_ids=prompts.region_ids[::-1])
    np.testing.assert_allclose(_leaves(made, backwards, how), drawn[:, ::-1], rtol=1e-3, atol=1e-4)


def test_a_sampler_that_does_not_go_with_the_schedule_is_refused(hypernetwork, prompts):
    with pytest.raises(InputError, match="`sampler` 'euler' needs schedule 'rectified_flow', got 'cosine'"):
        hypernetwork.generate(prompts, key=jax.random.key(0), config=GenerateConfig(sampler="euler"))


def test_a_zoo_without_its_sources_or_with_others_is_refused(zoo):
    with pytest.raises(InputError, match="the zoo has no sources attached"):
        pretrain(dataclasses.replace(zoo, sources=None), key=jax.random.key(0))
    with pytest.raises(InputError, match="the zoo and the source cities name different regions"):
        pretrain(dataclasses.replace(zoo, names=("x/0", *zoo.names[1:])), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"guidance": -1.0}, r"`guidance` must be in \[0, 10\], got -1.0"),
        ({"guidance": 11.0}, r"`guidance` must be in \[0, 10\], got 11.0"),
        ({"sampler": "heun"}, "`sampler` must be one of ddim, ddpm, dpm_solver, euler, got 'heun'"),
    ],
)
def test_a_generation_out_of_range_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        GenerateConfig(**values)
