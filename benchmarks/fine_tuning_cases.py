"""In: a generator and a stretch of a city that it never saw. Out: what every way of fine-tuning errs there; a table.

A way starts from the pooled model or from generated parameters, and leaves them as they are, adds the update that the
city shares, or takes steps in codes as well, `48x4x0.9` for 48 of length 4 with a momentum of .9 and `12x1` for a dozen
of length 1 without any; or it draws from the posterior at a rate, and goes on by the shared update and steps in codes.
"""

import contextlib
import dataclasses
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gpdiff_jax.cities import City
from gpdiff_jax.data.target import Target
from gpdiff_jax.errors import InputError, NotFiniteError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.prompts.prompt import region_prompts
from gpdiff_jax.training.parallel import rows_side_by_side
from gpdiff_jax.transfer.adapt_config import AdaptConfig, CodeMoves
from gpdiff_jax.transfer.codes import move_along_directions
from gpdiff_jax.transfer.evaluate import observed_truth, sampled_forecast
from gpdiff_jax.transfer.posterior import PosteriorConfig, draw_posterior
from gpdiff_jax.transfer.shared import add_to_all, shared_update
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.pooled import broadcast_regions


class Ways(NamedTuple):
    """What is measured beside the starts themselves: steps in codes, and posterior rates with the steps after them."""

    codes: tuple[CodeMoves, ...]
    rates: tuple[float, ...]
    after: CodeMoves

    def without(self, known: Container[str]) -> "Ways":
        """Those that are not among names of `errors_of_ways`."""
        return Ways(
            tuple(moves for moves in self.codes if f"generated codes {_word(moves)}" not in known),
            tuple(rate for rate in self.rates if f"posterior {rate:g} codes {_word(self.after)}" not in known),
            self.after,
        )


def _word(moves: CodeMoves) -> str:
    words = f"{moves.steps}x{moves.rate:g}"
    return f"{words}x{moves.momentum:g}" if moves.momentum else words


def ways_of(codes: Sequence[str], rates: Sequence[str]) -> Ways:
    """The ways of words such as 48x4 or 48x4x0.9 and 960; the last of the steps in codes follow the posterior, too.

    Raises:
      InputError: a word is no such number, or no fine-tuning takes it.
    """
    try:
        split = [word.split("x") if word.count("x") == 2 else (*word.split("x"), "0") for word in codes]
        moves = tuple(CodeMoves(int(steps), float(rate), float(momentum)) for steps, rate, momentum in split)
        ways = Ways(moves, tuple(map(float, rates)), moves[-1])
    except (ValueError, IndexError) as error:
        raise InputError(
            f"steps in codes (={','.join(codes)}) must be as 48x4 or 48x4x0.9, and posterior rates "
            f"(={','.join(rates)}) numbers"
        ) from error
    for one in ways.codes:
        AdaptConfig(code_steps=one.steps, code_rate=one.rate, code_momentum=one.momentum)
    for rate in ways.rates:
        PosteriorConfig(rate=rate)
    return ways


def errors_of_ways(
    generator: Hypernetwork,
    city: City,
    target: Target,
    ways: Ways,
    *,
    key: Key,
    generate: GenerateConfig,
    adapt: AdaptConfig = AdaptConfig(),
) -> dict[str, float | None]:
    """Mean absolute errors of every way in the test windows of a stretch.

    Args:
      generator: trained without the city.
      city: one channel.
      target: of `held_out_stretches.stretches`.
      ways: what to measure.
      key: random key.
      generate: how parameters are drawn.
      adapt: what the ways share: windows, directions and the update of the city.

    Returns:
      By way, as "pooled codes 48x4" or "posterior 960 shared", in the unit of the city; None where steps in codes, or
      those after a draw from the posterior, drove parameters until something was not finite.

    Raises:
      NotFiniteError: the loss of the pooled model or of generated parameters is not finite.
    """
    model, found = generator.model, {}
    truth, _ = observed_truth(city, target)
    seen = np.isfinite(truth)

    def note(way: str, params: Params, initial: Params | None = None) -> None:
        error = np.abs(sampled_forecast(model, target, params, initial)[0] - truth)[seen].mean(dtype=np.float64)
        found[way] = float(error) if np.isfinite(error) else None

    directions = jax.tree.map(lambda leaf: leaf[: adapt.directions], generator.directions)
    prompts = region_prompts(city, [target.split.support], generator.prompt_encoder)
    generated = generator.generate(prompts, key=key, config=generate, any_kind=True).params
    pooled = broadcast_regions(generator.pooled, target.num_regions)

    def in_codes(params: Params, moves: CodeMoves, update: Params | None) -> Params:
        batch = rows_side_by_side(adapt.regions_per_batch)
        along: Any = {**moves._asdict(), "most_windows": adapt.code_windows, "rows_side_by_side": batch}
        return move_along_directions(model, target, params, directions, **along, update=update)

    def go_on(
        start: str, params: Params, codes: Sequence[CodeMoves], config: AdaptConfig, initial: Params
    ) -> tuple[int, float | None]:
        """Notes what follows a start; the shared steps that were taken, and their rate."""
        names = {moves: f"{start} codes {_word(moves)}" for moves in codes}
        found.update(dict.fromkeys((f"{start} shared", *names.values())))
        update, steps, rate = shared_update(model, config, target, params, key=key)
        note(f"{start} shared", add_to_all(params, update), initial)
        for moves, name in names.items():
            with contextlib.suppress(NotFiniteError):
                note(name, in_codes(params, moves, update), initial)
        return steps, rate

    note("pooled", pooled)
    go_on("pooled", pooled, ways.codes, adapt, pooled)
    note("generated", generated)
    steps, rate = go_on("generated", generated, ways.codes, adapt, generated)
    # What is drawn from the posterior takes the steps that were chosen from the generated parameters.
    chosen = dataclasses.replace(
        adapt, shared_steps=steps, shared_folds=0, shared_rates=adapt.shared_rates if rate is None else (rate,)
    )
    for strength in ways.rates:
        config = PosteriorConfig(rate=strength)
        drawn = draw_posterior(generator, target, prompts, key=key, generate=generate, config=config, any_kind=True)
        note(f"posterior {strength:g}", drawn, generated)
        with contextlib.suppress(NotFiniteError):
            go_on(f"posterior {strength:g}", drawn, (ways.after,), chosen, generated)
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """What every way errs, as a part of what the untuned pooled model does, as Markdown.

    A city's part is the geometric mean over its stretches and seeds, and the last column the mean over cities. A way
    that is missing, or not finite, in one result of a city has no number there.
    """
    by_city: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_city.setdefault(result["city"], []).append(result["error"])
    ways = list(dict.fromkeys(way for errors in by_city.values() for one in errors for way in one))
    rows = [["", *by_city, "mean"], ["---", *["---:"] * (len(by_city) + 1)]]
    for way in ways[1:]:
        parts = [
            float(np.exp(np.mean([np.log((one.get(way) or np.nan) / (one["pooled"] or np.nan)) for one in errors])))
            for errors in by_city.values()
        ]
        rows.append([way, *(f"{part:.3f}" if np.isfinite(part) else "-" for part in (*parts, np.mean(parts)))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
