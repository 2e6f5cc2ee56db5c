"""In: denoisers that hear the prompt in five ways. Out: which tokens hear which part, and that each can be trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities.splits import Span
from gpdiff_jax.diffusion.conditioning import STRATEGIES, check_conditioning, time_features
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise, make_denoiser
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import ModelSizes, make_model
from gpdiff_jax.models.kinds import kinds_of_layers
from gpdiff_jax.models.protocol import abstract_params
from gpdiff_jax.prompts.prompt import region_prompts
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics
from gpdiff_jax.zoo.codec import fit_codec
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

_WIDTH, _BATCH = 4, 6
_LAYER_OF_TOKEN = (0, 0, 1, 2, 3)
_KINDS = ("temporal", "graph", "output", "mixed")
_SPATIAL = (0, 0, 1, 0, 1)
_CONFIG = DenoiserConfig(width=8, layers=1, heads=2, prompt_bottleneck=5)


@functools.cache
def _network(conditioning: str, kinds: tuple[str, ...] = _KINDS):
    """A denoiser, variables without the zeros that training begins with, and its compiled batch."""
    config = dataclasses.replace(_CONFIG, conditioning=conditioning)
    denoiser = Denoiser(config, _LAYER_OF_TOKEN, _WIDTH, kinds, _SPATIAL)
    example = jnp.zeros((5, _WIDTH)), jnp.zeros(()), jnp.zeros(5), jnp.ones(())
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *example)["params"]
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    return denoiser, variables, jax.jit(functools.partial(denoise, denoiser))


def _inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(2), 3)
    x_t = jax.random.normal(keys[0], (_BATCH, 5, _WIDTH))
    return x_t, jax.random.uniform(keys[1], (_BATCH,)), jax.random.normal(keys[2], (_BATCH, 5))


@pytest.mark.parametrize("conditioning", STRATEGIES)
def test_every_part_of_the_prompt_is_heard_unless_it_is_dropped(conditioning):
    _, variables, run = _network(conditioning)
    x_t, t, prompt = _inputs()
    conditioned, dropped = (
        np.asarray(run(variables, x_t, t, prompt, jnp.full(_BATCH, prompt_mask))) for prompt_mask in (1.0, 0.0)
    )
    for column in range(5):
        other = prompt.at[:, column].add(1.0)
        assert np.abs(np.asarray(run(variables, x_t, t, other, jnp.ones(_BATCH))) - conditioned).max() > 1e-3, column
        np.testing.assert_array_equal(run(variables, x_t, t, other, jnp.zeros(_BATCH)), dropped)


@pytest.mark.parametrize("conditioning", STRATEGIES)
def test_a_dropped_prompt_is_one_that_says_what_the_null_vectors_say(conditioning):
    _, variables, run = _network(conditioning)
    x_t, t, prompt = _inputs()
    condition = dict(variables["condition"])
    for name in [name.removesuffix("_null") for name in condition if name.endswith("_null")]:
        condition[f"{name}_out"] = {
            "kernel": jnp.zeros_like(condition[f"{name}_out"]["kernel"]),
            "bias": condition[f"{name}_null"],
        }
    saying_null = {**variables, "condition": condition}
    dropped = run(variables, x_t, t, prompt, jnp.zeros(_BATCH))
    np.testing.assert_allclose(run(saying_null, x_t, t, prompt, jnp.ones(_BATCH)), dropped, atol=1e-5)


@pytest.mark.parametrize("conditioning", STRATEGIES)
def test_regions_do_not_hear_each_other(conditioning):
    _, variables, run = _network(conditioning)
    x_t, t, prompt = _inputs()
    expected = np.asarray(run(variables, x_t, t, prompt, jnp.ones(_BATCH)))
    changed = np.asarray(run(variables, x_t.at[1].add(3.0), t, prompt.at[1].add(3.0), jnp.ones(_BATCH)))
    np.testing.assert_array_equal(np.delete(changed, 1, axis=0), np.delete(expected, 1, axis=0))
    assert (changed[1] != expected[1]).any()


@pytest.mark.parametrize("conditioning", STRATEGIES)
def test_every_leaf_is_trained_and_what_depends_on_the_prompt_is_learned(conditioning):
    denoiser, variables, _ = _network(conditioning)
    x_t, t, prompt = _inputs()
    prompt_mask = jnp.ones(_BATCH).at[0].set(0.0)
    # Of opposite sign in regions that differ in their prompts alone.
    x_t, t = jnp.broadcast_to(x_t[:1], x_t.shape), jnp.full(_BATCH, 0.5)
    wanted = jnp.broadcast_to(jnp.asarray([0.0, 1, -1, 1, -1, 1])[:, None, None], x_t.shape)

    def loss_fn(variables: dict) -> jax.Array:
        return jnp.square(denoise(denoiser, variables, x_t, t, prompt, prompt_mask) - wanted).mean()

    def step(variables: dict, _: None) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(variables)
        moved = jax.tree.map(lambda leaf, grad: leaf - 0.05 * grad, variables, grads)
        return moved, (loss, jax.tree.map(lambda grad: abs(grad).max(), grads))

    losses, largest = jax.jit(lambda variables: jax.lax.scan(step, variables, length=300)[1])(variables)
    # Who does not hear the prompt cannot come below five sixths.
    assert np.isfinite(losses).all() and losses[-1] < 0.4, losses[-1]
    for path, grad in jax.tree_util.tree_leaves_with_path(largest):
        name = jax.tree_util.keystr(path)
        # A shift of all keys alike cancels in the softmax.
        if "'key']['bias" not in name:
            assert grad[0] > 1e-8, name


def _after_first_norm(prompt: jax.Array) -> np.ndarray:
    """Tokens of one region as they enter the first attention: no token has attended to another yet."""
    denoiser, variables, _ = _network("inductive_bias")
    x_t, t, _ = _inputs()
    keep = functools.partial(denoiser.apply, capture_intermediates=lambda module, _: module.name == "attention_norm_0")
    _, seen = jax.jit(keep)({"params": variables}, x_t[0], t[0], prompt, jnp.ones(()))
    return np.asarray(seen["intermediates"]["attention_norm_0"]["__call__"][0][0])


def test_with_inductive_bias_a_token_is_told_what_concerns_it():
    prompt = _inputs()[2][0]
    before = _after_first_norm(prompt)
    kind = np.asarray([_KINDS[layer] for layer in _LAYER_OF_TOKEN])
    for spatial, deaf in ((1, ("temporal", "output")), (0, ("graph",))):
        columns = np.flatnonzero(np.asarray(_SPATIAL) == spatial)
        moved = np.abs(_after_first_norm(prompt.at[columns].add(2.0)) - before).max(axis=1)
        assert (moved[np.isin(kind, deaf)] == 0).all() and (moved[~np.isin(kind, deaf)] > 1e-3).all(), moved


def test_a_model_without_a_graph_holds_nothing_for_the_spatial_part_that_it_never_hears():
    _, variables, run = _network("inductive_bias", ("temporal", "output", "temporal", "output"))
    assert {name for name in variables["condition"] if name.startswith(("spatial", "temporal"))} == {
        "temporal_in",
        "temporal_out",
        "temporal_null",
    }
    x_t, t, prompt = _inputs()
    plain = run(variables, x_t, t, prompt, jnp.ones(_BATCH))
    np.testing.assert_array_equal(run(variables, x_t, t, prompt.at[:, 2].add(1.0), jnp.ones(_BATCH)), plain)


@pytest.mark.parametrize(
    ("spatial", "held"),
    [((0, 0), "temporal entries alone"), ((1, 1), "spatial entries alone"), ((), "no entry")],
)
def test_strategies_that_need_both_parts_refuse_a_prompt_of_one(spatial, held):
    for name in ("inductive_bias", "pre_adaptive", "post_adaptive"):
        with pytest.raises(InputError, match=f"`conditioning` '{name}' needs .* got {held}; add a part"):
            check_conditioning(name, spatial)
    check_conditioning("adaptive_norm", spatial)
    check_conditioning("pre_conditioning", spatial)


def test_an_unknown_strategy_is_refused_with_the_names():
    with pytest.raises(
        InputError, match="`conditioning` must be one of pre_conditioning, inductive_bias, pre_adaptive"
    ):
        DenoiserConfig(conditioning="film")


def test_the_layers_of_every_model_are_told_apart_by_what_the_model_says(simulated_cities):
    sizes = ModelSizes(12, 6, 5, 23, anomaly=True)
    kinds = {}
    for name in ("stgcn", "graph_wavenet_adaptive", "dcrnn", "stid"):
        model = make_model(name, sizes)
        kinds[name] = model.layer_kinds(abstract_params(model, sizes))
        for layer, kind in kinds[name].items():
            assert (kind == "output") == layer.startswith(("head", "skip")), layer
            assert (kind == "graph") == layer.startswith(("graph", "adaptive")), layer
            assert (kind == "mixed") == layer.startswith("cell"), layer
    assert kinds["stgcn"]["graph"] == "graph" and kinds["stgcn"]["gate_in_covariates"] == "temporal"
    assert "graph" not in kinds["stid"].values()


def test_a_model_that_does_not_say_the_kinds_of_its_layers_is_refused_by_the_strategy_that_needs_them():
    """Layers w1 and w2 tell nothing: to condition all of them alike would be another strategy."""
    spatial = (0, 0, 1)
    with pytest.raises(InputError, match=r"'inductive_bias' needs to know which layers .*Model\(.*kinds="):
        check_conditioning("inductive_bias", spatial, ("mixed", "mixed"))
    check_conditioning("inductive_bias", spatial, ("mixed", "output"))
    check_conditioning("adaptive_norm", spatial, ("mixed", "mixed"))
    params = {"w1": jnp.ones((2, 3)), "w2": jnp.ones(3)}
    layout = make_layout(params, 3)
    assert layout.kinds == ("mixed", "mixed")
    flat = np.asarray(to_tokens(layout, params))
    codec = fit_codec(layout, flat, np.stack([flat, flat + 1]), np.ones(2), 0)
    with pytest.raises(InputError, match="'inductive_bias' needs to know which layers"):
        make_denoiser(DenoiserConfig(conditioning="inductive_bias"), codec, spatial)
    layout = make_layout(params, 3, {"w1": "temporal", "w2": "output"})
    codec = fit_codec(layout, flat, np.stack([flat, flat + 1]), np.ones(2), 0)
    denoiser = make_denoiser(DenoiserConfig(conditioning="inductive_bias"), codec, spatial)
    assert (denoiser.layer_kinds, denoiser.spatial) == (("temporal", "output"), spatial)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ((("w", "time"),), "kind 'time' of layer 'w' must be one of temporal, graph, output, mixed"),
        ((("w1", "graph"),), "layer 'w2' has no kind; name one of temporal, graph, output, mixed"),
    ],
)
def test_kinds_that_leave_a_layer_out_or_do_not_exist_are_refused(kinds, words):
    with pytest.raises(InputError, match=words):
        kinds_of_layers(kinds, ("w1", "w2"))


def test_the_longest_beginning_of_a_layers_name_counts():
    kinds = (("w", "temporal"), ("w_out", "output"))
    assert kinds_of_layers(kinds, ("w_in", "w_out")) == {"w_in": "temporal", "w_out": "output"}


def test_a_prompt_says_which_of_its_entries_are_spatial(simulated_cities):
    city = simulated_cities[0]
    prompts = region_prompts(city, [Span(0, 72)])
    expected = [0] * len(temporal_statistics(city, Span(0, 72))[1]) + [1] * len(spatial_statistics(city)[1])
    assert list(prompts.spatial) == expected and prompts.variant(0).spatial == prompts.spatial
    with pytest.raises(InputError, match="needs a prompt of temporal and spatial entries"):
        check_conditioning("pre_adaptive", ())


def test_time_features_are_bounded_and_tell_times_apart():
    times = jnp.linspace(0.0, 1.0, 101)
    features = np.asarray(jax.vmap(lambda t: time_features(t, 16))(times))
    assert features.shape == (101, 16) and np.abs(features).max() <= 1
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)[~np.eye(101, dtype=bool)]
    assert apart.min() > 0.05
