"""In: the length of a city's series. Out: the chronological spans that may be seen, and those that may not.

The protocol is DESIGN section 4's: a source is split 80 / 20 in time; the last 30 % of a target is test, the support
days lie right before it, and nothing earlier is ever seen. Beside it stands that of the published code, which is not
leak-free, for comparison with its numbers alone.
"""

import dataclasses

from gpdiff_jax.errors import InputError, check_at_least

TRAIN_FRACTION = 0.8
TEST_FRACTION = 0.3

PROTOCOLS = ("leak-free", "paper")
"""How cities are split: as DESIGN says, or as the published code does (`split_published`)."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A half-open range of time steps, [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


@dataclasses.dataclass(frozen=True)
class SourceSplit:
    """The spans of a source city: what harvest trains on, and what it stops on."""

    train: Span
    validation: Span


@dataclasses.dataclass(frozen=True)
class TargetSplit:
    """The spans of a target city: adaptation and validation days (together the support), and the test."""

    adaptation: Span
    validation: Span
    test: Span

    @property
    def support(self) -> Span:
        """All visible days of the target."""
        return Span(self.adaptation.start, self.validation.stop)


def split_source(
    num_steps: int, *, history: int, horizon: int, name: str = "source", protocol: str = "leak-free"
) -> SourceSplit:
    """Splits a source city by time into training and validation.

    Args:
      num_steps: T, the length of the series in steps.
      history: H, steps that a model sees.
      horizon: P, steps that it forecasts.
      name: the city's name, for the message.
      protocol: one of `PROTOCOLS`.

    Returns:
      The first 80 % as `train`, the rest as `validation`; in the paper's protocol the last 70 % and what is before.

    Raises:
      InputError: the city is too short for one window in each part.
    """
    if protocol == "paper":
        boundary = round(num_steps * TEST_FRACTION)
        train, validation = Span(boundary, num_steps), Span(0, boundary)
        shortest = min(len(train), len(validation))
    else:
        boundary = round(num_steps * TRAIN_FRACTION)
        train, validation = Span(0, boundary), Span(boundary, num_steps)
        shortest = min(len(train), len(validation) + history)
    if shortest < history + horizon:
        raise InputError(
            f"city {name!r} has {num_steps} steps, too few for history (={history}) + horizon (={horizon}) in both its "
            "training and its validation span; use a longer series or a shorter interval"
        )
    return SourceSplit(train, validation)


def split_target(
    num_steps: int,
    steps_per_day: int,
    support_days: int,
    *,
    history: int,
    horizon: int,
    name: str = "target",
    protocol: str = "leak-free",
) -> TargetSplit:
    """Splits a target city into support days (adaptation, validation) and the test that follows them.

    Args:
      num_steps: T, the length of the series in steps.
      steps_per_day: steps in 24 hours.
      support_days: d, the visible days; the last max(1, d // 3) of them are validation.
      history: H, steps that a model sees.
      horizon: P, steps that it forecasts.
      name: the city's name, for the message.
      protocol: one of `PROTOCOLS`; for the paper's see `split_published`.

    Returns:
      The three spans. With one support day the adaptation span is empty.

    Raises:
      InputError: `support_days` is below 1, shorter than the history or longer than the data before the test, or the
        test holds no window.
    """
    if protocol == "paper":
        return split_published(num_steps, steps_per_day, support_days, history=history, horizon=horizon, name=name)
    test_start = num_steps - round(num_steps * TEST_FRACTION)
    test = Span(test_start, num_steps)
    split = split_before(test, steps_per_day, support_days, history=history, before="its test span", name=name)
    if num_steps - test_start < horizon:
        raise InputError(
            f"city {name!r} has {num_steps} steps, too few for history (={history}) + horizon (={horizon}) around its "
            "test span (the last 30 %); use a longer series or a shorter interval"
        )
    return split


def split_published(
    num_steps: int, steps_per_day: int, support_days: int, *, history: int, horizon: int, name: str = "target"
) -> TargetSplit:
    """Splits a target city as the published code does (tsinghua-fib-lab/GPD, Pretrain/datasets.py): not leak-free.

    The first 30 % are test and the last days of the series are fine-tuned on. No day validates: what is chosen, as the
    number of steps, is chosen by the error of the test itself, and a region's scale is made of its whole series
    (`data.target.prepare_target`; in the published code, of its neighbours' too).

    Args:
      num_steps: T, the length of the series in steps.
      steps_per_day: steps in 24 hours.
      support_days: d, the days that are fine-tuned on.
      history: H, steps that a model sees.
      horizon: P, steps that it forecasts.
      name: the city's name, for the message.

    Returns:
      The spans; the validation span is empty.

    Raises:
      InputError: `support_days` reach into the test, or one of the two holds no window.
    """
    check_at_least(1, {"support_days": support_days})
    test, support_start = Span(0, round(num_steps * TEST_FRACTION)), num_steps - support_days * steps_per_day
    if support_start < test.stop:
        raise InputError(
            f"`support_days` (={support_days}) are more than the {(num_steps - test.stop) / steps_per_day:.1f} days "
            f"that city {name!r} has behind its test span (the first 30 % in the paper's protocol); use fewer"
        )
    if min(len(test), support_days * steps_per_day) < history + horizon:
        raise InputError(
            f"city {name!r} has {num_steps} steps, too few for history (={history}) + horizon (={horizon}) in both its "
            "test span (the first 30 % in the paper's protocol) and its support days; use a longer series"
        )
    return TargetSplit(Span(support_start, num_steps), Span(num_steps, num_steps), test)


def split_before(
    test: Span, steps_per_day: int, support_days: int, *, history: int, before: str, name: str
) -> TargetSplit:
    """Support days right before any span that is to be forecast.

    Args:
      test: what is forecast.
      steps_per_day: steps in 24 hours.
      support_days: d, the visible days; the last max(1, d // 3) of them are validation.
      history: H, steps that a model sees.
      before: what `test` is, for the message.
      name: the city's name, for the message.

    Returns:
      The three spans. With one support day the adaptation span is empty.

    Raises:
      InputError: `support_days` is below 1, shorter than the history or longer than the data before `test`.
    """
    check_at_least(1, {"support_days": support_days})
    support_start = test.start - support_days * steps_per_day
    if support_start < 0:
        most = test.start // steps_per_day
        if not most:
            raise InputError(
                f"city {name!r} has {test.start} steps before {before}, and a day takes {steps_per_day}; give a series "
                "of at least a day before it"
            )
        raise InputError(
            f"`support_days` (={support_days}) is longer than the {test.start / steps_per_day:.1f} days that city "
            f"{name!r} has before {before}; use at most {most}"
        )
    if support_days * steps_per_day < history:
        raise InputError(
            f"`support_days` (={support_days}) hold {support_days * steps_per_day} steps of city {name!r}, fewer than "
            f"history (={history}), which would reach into hidden days; use more days or a shorter interval"
        )
    validation_start = test.start - max(1, support_days // 3) * steps_per_day
    return TargetSplit(Span(support_start, validation_start), Span(validation_start, test.start), test)
