"""In: what a user says of fine-tuning. Out: the configuration that every method is tuned by."""

import dataclasses
import math
from typing import NamedTuple

from gpdiff_jax.errors import InputError, check_above_zero, check_at_least, named

UPDATES = ("codes", "shared", "own")


class CodeMoves(NamedTuple):
    """Steps in codes: how many, how long, and what part of each the next goes on with."""

    steps: int
    rate: float
    momentum: float


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """How starts are fine-tuned.

    `update` is "shared", at most `shared_steps` of Adam in all weights, the same for all regions of the city: as many,
    and at that learning rate of `shared_rates`, as forecast support days best that were left out, in turn and in
    `shared_folds` parts (0: all steps, at the last rate; see `shared.choose_steps`); "codes", after these `code_steps`
    of length `code_rate`, each with `code_momentum` of the one before, along the first `directions` of the zoo (all,
    where it has fewer; a generator keeps at most 64), half of every gradient the region's own and half its city's mean;
    or "own", all weights of every region on its own, for which the rest is. The first two see all support days, and
    their numbers were chosen on cities that are no targets (docs/experiments.md, sections 27, 39 and 45). Where windows
    have no profile, which alone tells a start how a region's days go, starts are further off: None of `shared_steps` is
    400 instead of 100 (section 48), and None of the steps in codes 48 of length 4 with a momentum of .9 instead of a
    dozen of length 1 without (section 52). With
    `refit`, the chosen learning rate and number of steps are used once more on all support days. With
    `one_standard_error`, the least fine-tuning within one standard error of the best is chosen (see
    `adapt.choose_adaptation`); without it, which suits random initial parameters, the best. Where the support is too
    short to choose on, parameters stay as they are, or, with `blind_learning_rate`, which suits random ones too, take
    all steps at that rate. `regions_per_batch` rows are tuned side by side, each a region with all its samples or one
    of them; None takes what suits the device (`parallel.rows_side_by_side`). With `seen_kinds_only`, fine-tuned
    parameters forecast kinds of day that the support shows, and the initial ones the others (see
    `damped.on_seen_kinds`); random ones have nothing to say of those. The validation day judges the fine-tuned
    parameters themselves, whatever its kind.
    """

    update: str = "codes"
    directions: int = 32
    code_steps: int | None = None
    code_rate: float | None = None
    code_momentum: float | None = None
    code_windows: int = 128
    shared_steps: int | None = None
    shared_rates: tuple[float, ...] = (3e-4,)
    shared_folds: int = 3
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    steps: int = 120
    evaluate_every: int = 10
    batch: int = 64
    refit: bool = True
    one_standard_error: bool = True
    blind_learning_rate: float | None = None
    regions_per_batch: int | None = None
    seen_kinds_only: bool = True

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise InputError(f"`update` must be one of {', '.join(UPDATES)}, got {self.update!r}")
        check_above_zero(named(self, "directions", "code_windows", "code_rate"))
        if self.code_momentum is not None and not 0 <= self.code_momentum < 1:
            raise InputError(f"`code_momentum` must be at least 0 and below 1, got {self.code_momentum}")
        check_at_least(0, named(self, "shared_steps", "shared_folds"))
        if self.shared_folds == 1:
            raise InputError(
                "`shared_folds` (=1) leaves out every day at once; it must be 0 for no choice, or at least 2"
            )
        if not self.shared_rates or not all(0 < rate < math.inf for rate in self.shared_rates):
            raise InputError(f"`shared_rates` must be numbers above 0, got {self.shared_rates}")
        blind = () if self.blind_learning_rate is None else (self.blind_learning_rate,)
        if not self.learning_rates or not all(0 < rate < math.inf for rate in (*self.learning_rates, *blind)):
            rates = f"{self.learning_rates}, {self.blind_learning_rate}"
            raise InputError(f"`learning_rates` and `blind_learning_rate` must be numbers above 0, got {rates}")
        check_at_least(1, named(self, "code_steps", "steps", "evaluate_every", "batch", "regions_per_batch"))

    def most_shared(self, has_profile: bool) -> int:
        """How many steps a city shares at most, where windows have a profile or none."""
        return (100 if has_profile else 400) if self.shared_steps is None else self.shared_steps

    def code_moves(self, has_profile: bool) -> CodeMoves:
        """The steps in codes, where windows have a profile or none."""
        steps, rate, momentum = (12, 1.0, 0.0) if has_profile else (48, 4.0, 0.9)
        return CodeMoves(
            steps if self.code_steps is None else self.code_steps,
            rate if self.code_rate is None else self.code_rate,
            momentum if self.code_momentum is None else self.code_momentum,
        )
