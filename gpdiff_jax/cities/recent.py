"""In: readings of a city as they come, in any order. Out: its last days at a longer interval, as they are known now."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped

from gpdiff_jax.cities.city import AVERAGED, City
from gpdiff_jax.cities.extremes import most_usual
from gpdiff_jax.cities.resample import combine_bins, first_whole_bin
from gpdiff_jax.errors import InputError, check_at_least

_MINUTE = np.timedelta64(1, "m")


class RecentReadings:
    """The last days of a city's readings, in arrays whose size never changes.

    They are kept at the city's own interval, and brought to another like `resample` does it: bin by bin, and only those
    that have changed.
    """

    def __init__(self, city: City, interval_minutes: int, days: int, *, missing_above: float | None = None) -> None:
        """Takes over what a city has read.

        Args:
          city: one channel, of known start.
          interval_minutes: of the bins; a multiple of the city's own.
          days: m, how many days of bins are kept.
          missing_above: above which value readings are missing, and others are taken as they are; None refuses those
            far beyond all that was read.

        Raises:
          InputError: the start of the city is unknown, the interval is no multiple of its own, or `missing_above` is
            below 0.
        """
        check_at_least(0, {"missing_above": missing_above})
        if city.start is None:
            raise InputError(
                f"city {city.name!r} has no start, so what was read last is unknown; give the city its start"
            )
        skipped = first_whole_bin(city, interval_minutes)
        self.node_ids = city.node_ids
        self._name, self._kind, self._missing_above = city.name, city.kind, missing_above
        self._own = np.timedelta64(city.interval_minutes, "m")
        self._bin = np.timedelta64(interval_minutes, "m")
        self._factor = interval_minutes // city.interval_minutes
        self._bins = days * 1440 // interval_minutes
        self._first = city.start + skipped * self._own  # begin of the first bin that the series holds
        self._end = city.start + city.num_steps * self._own  # of the last reading
        # One bin more than is kept: the one that is not over.
        self._readings = np.full(((self._bins + 1) * self._factor, city.num_nodes), np.nan, np.float32)
        self._binned = np.full((self._bins + 1, city.num_nodes), np.nan, np.float32)
        self._changed = np.ones(self._bins + 1, bool)
        self._since = self._first  # begin of the first bin of which something was read
        last = int((self._end - self._begin) // self._own)
        kept = city.values[skipped:, :, 0][-last:]
        self._readings[last - len(kept) : last] = kept
        self._most = self._most_of(city.values[:, :, 0])

    @property
    def end(self) -> np.datetime64:
        """Local end of the last bin that is over."""
        over = (self._end - self._first) // self._bin
        return self._first + over * self._bin

    @property
    def _begin(self) -> np.datetime64:
        return self.end - self._bins * self._bin

    @property
    def steps(self) -> int:
        """How many bins are over since the series began."""
        return int((self.end - self._since) // self._bin)

    def judge_anew(self) -> None:
        """Makes anew of what is kept how large a reading may be, where that says enough."""
        most = self._most_of(self._readings)
        self._most = self._most if most is None else most

    def _most_of(self, readings: Float[np.ndarray, "T N"]) -> Float[np.ndarray, " N"] | None:
        return most_usual(readings, speed=self._kind == "speed")

    def add(
        self, times: Shaped[np.ndarray, " T"] | Sequence[np.datetime64], readings: Float[np.ndarray, "T N"]
    ) -> None:
        """Adds readings, or corrects what is there.

        Args:
          times: [T], local begin of every row's interval, in any order.
          readings: [T, N] in the city's unit, regions in its order; NaN says nothing, and what is known stays, but that
            its time is over. Of two rows of one time, the later one holds.

        Raises:
          InputError: names the first time or reading that cannot be taken, and nothing is changed.
        """
        moments, values = self._checked(times, readings)
        if not len(moments):
            return
        end = moments.max() + self._own
        if end > self._end:
            before = self.end
            self._end = end
            self._move(int((self.end - before) // self._bin))
        step = ((moments - self._begin) // self._own).astype(np.int64)
        rows, nodes = np.nonzero(np.isfinite(values) & (step >= 0)[:, None])
        # Assigned in order, so that the last of several holds.
        self._readings[step[rows], nodes] = values[rows, nodes]
        self._changed[step[rows] // self._factor] = True
        if len(rows):  # also of before what was known
            earliest = self._begin + int(step[rows].min()) // self._factor * self._bin
            self._since = min(self._since, earliest)

    def last_days(self, late: int = 0) -> Float[np.ndarray, "T N"]:
        """The last m days of bins up to some steps after the last that is over.

        Args:
          late: how many steps; the first of them is what was read of the bin that was not over, the others are missing.

        Returns:
          float32 [T, N], the same number of rows always; NaN where nothing was read, as before the series began.
        """
        changed = np.flatnonzero(self._changed)
        if len(changed):
            grouped = self._readings.reshape(self._bins + 1, self._factor, -1, 1)[changed]
            self._binned[changed] = combine_bins(grouped, average=self._kind in AVERAGED)[:, :, 0]
            self._changed[changed] = False
        held = np.full((self._bins, len(self.node_ids)), np.nan, np.float32)
        known = self._binned[late : self._bins + min(late, 1)]
        held[: len(known)] = known
        return held

    def _move(self, bins: int) -> None:
        """Makes room for so many bins at the end."""
        for held, steps, fill in (
            (self._readings, bins * self._factor, np.nan),
            (self._binned, bins, np.nan),
            (self._changed, bins, True),
        ):
            steps = min(steps, len(held))
            held[: len(held) - steps] = held[steps:].copy()
            held[len(held) - steps :] = fill

    def _checked(
        self, times: Shaped[np.ndarray, " T"] | Sequence[np.datetime64], readings: Float[np.ndarray, "T N"]
    ) -> tuple[Shaped[np.ndarray, " T"], Float[np.ndarray, "T N"]]:
        """The same as minutes and float32, if they can be taken."""
        given = np.asarray(times)
        try:
            with warnings.catch_warnings():
                # With an offset from UTC, NumPy would bring it there.
                warnings.simplefilter("error", UserWarning)
                moments, exact = (given.astype(f"datetime64[{unit}]") for unit in "ms")
        except (TypeError, ValueError, UserWarning) as error:
            raise InputError(f"`times` are no local times ({error}); give datetime64 of the city's clocks") from None
        try:
            if isinstance(readings, np.ma.MaskedArray):
                readings = np.ma.filled(readings.astype(np.float32), np.nan)
            values = np.asarray(readings, np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"`readings` are no numbers ({error}); mark a missing reading as NaN") from None
        if moments.ndim != 1 or values.shape != (len(moments), len(self.node_ids)):
            raise InputError(
                f"`readings` {values.shape} must be {(moments.size, len(self.node_ids))}: a row for each of the times, "
                f"a column for each region of city {self._name!r}"
            )
        if np.isnat(moments).any():
            raise InputError(f"`times` are unknown in row {int(np.argmax(np.isnat(moments)))}; leave it out")
        off = ((moments - self._first) % self._own != np.timedelta64(0, "m")) | (exact != moments)
        if off.any():
            raise InputError(
                f"`times` hold {exact[off][0]}, where no interval of {self._own // _MINUTE} minutes of city "
                f"{self._name!r} begins; sum or average the readings to its intervals"
            )
        far = moments >= self._end + self._bins * self._bin
        if far.any():
            raise InputError(
                f"`times` hold {moments[far][0]}, more than {self._bins * self._bin // (1440 * _MINUTE)} days after "
                f"{self._end}, where the readings of city {self._name!r} end; check the clock, or begin with a city "
                "that was read since"
            )
        return moments, self._checked_values(moments, values)

    def _checked_values(
        self, moments: Shaped[np.ndarray, " T"], values: Float[np.ndarray, "T N"]
    ) -> Float[np.ndarray, "T N"]:
        if self._missing_above is not None:
            values = np.where(values > self._missing_above, np.float32(np.nan), values)
        wrong: list[tuple[Bool[np.ndarray, "T N"], str]] = [
            (np.isinf(values), "is infinite; mark a missing reading as NaN"),
            (values < 0, "is negative; mark a missing reading as NaN"),
        ]
        if self._kind == "speed":
            wrong.append((values == 0, "is a speed of zero; zero means missing there: mark it as NaN"))
        if self._most is not None and self._missing_above is None:
            beyond = (
                "is far beyond all that the city reads; mark it as NaN, or make the `Forecaster` with `missing_above`"
            )
            wrong.append((values > self._most, beyond))
        for where, what in wrong:
            if where.any():
                row, node = (int(index) for index in np.argwhere(where)[0])
                raise InputError(
                    f"the reading of region {self.node_ids[node]!r} at {moments[row]} (={values[row, node]:.6g}) {what}"
                )
        return values


def nearly_whole_days(steps: int, per_day: int) -> int:
    """Days of a series; the first one counts where more than half of it lies in the series.

    A series that begins with the first train, or some minutes late, has one more day than it has times 24 hours.

    Args:
      steps: its length.
      per_day: steps of a day.

    Returns:
      0 of less than a day.
    """
    whole, rest = divmod(steps, per_day)
    return whole + int(whole > 0 and 2 * rest > per_day)
