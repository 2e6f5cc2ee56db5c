"""In: a `SimulationConfig` and a seed.
Out: cities drawn from one law, in which what a region is decides how it behaves; and the truth behind them.

The law, the same for every city. Regions lie at random on a disc and are linked by a Gabriel graph. Region i mixes
four functions (residential, office, leisure, transit): z_i = softmax of smooth Gaussian fields over the map. Then z_i
fixes what its readings show at once and what they show only over time:

    profile    d_i(t) = z_i . shapes(hour, workday or free day), the visible rhythm
    deviation  u_i(t) = a_i u_i(t-1) + s_i mean_j w_ij u_j(t-1) + b_i (g(t) - a_i g(t-1)) + sigma_i eps_i(t) + e_i(t)
    demand     x_i(t) = d_i(t) exp(u_i(t))

with persistence a_i, spill-over s_i, response b_i to good and bad days g and noise sigma_i all linear in z_i. Events e
(concerts, accidents) strike one region and travel along the graph through s. A crowd is a negative binomial count
around level_i x_i; a speed falls from its free flow as x_i nears the capacity. So a forecaster that reads z off a few
days of rhythm knows the dynamics that those days are too short to reveal. The days of offices repeat, those of leisure
differ. Every series begins on a Sunday, so that three support days before the last 30 % of four weeks are workdays, and
what a free day is like has to be known from elsewhere.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from gpdiff_jax.cities.city import City, check_city, edges_of
from gpdiff_jax.errors import InputError, check_types

FUNCTIONS = ("residential", "office", "leisure", "transit")

# Bumps of demand per function: (hour of the peak, width in hours, height), on workdays and on free days.
_WORKDAY = (
    ((7.3, 1.1, 0.9), (18.8, 2.0, 0.7), (22.0, 1.5, 0.2)),
    ((9.0, 1.0, 1.0), (12.7, 1.2, 0.4), (17.3, 1.2, 0.9)),
    ((13.0, 1.5, 0.3), (20.3, 2.0, 1.0)),
    ((8.0, 0.8, 1.2), (14.0, 3.0, 0.3), (17.8, 0.9, 1.2)),
)
_FREE_DAY = (
    ((10.5, 2.0, 0.6), (19.5, 2.5, 0.6)),
    ((13.0, 3.0, 0.2),),
    ((15.0, 2.5, 1.0), (21.5, 2.2, 1.3)),
    ((12.0, 2.5, 0.5), (18.0, 2.5, 0.5)),
)
_QUIET = 0.04  # demand that never stops

# Per function, at steps of one hour. Persistence and spill-over add up to less than one, so deviations die out.
_PERSISTENCE = np.array([0.60, 0.20, 0.92, 0.10])
_SPILLOVER = np.array([0.10, 0.60, 0.02, 0.80])
_NOISE = np.array([0.12, 0.07, 0.22, 0.10])
_RESPONSE = np.array([0.3, 0.2, 1.3, 0.6])
_LOG_LEVEL = np.array([0.0, 0.4, 0.2, 0.8])
_EVENT_CHANCE = np.array([0.1, 0.2, 1.0, 0.6])
_LOAD = np.array([0.8, 1.0, 0.9, 1.3])  # demand over the capacity of the roads

_CLOSED_HOURS = (1.0, 5.0)
_DISPERSION = 60.0  # of the negative binomial: variance = mean + mean^2 / dispersion
_KM_PER_DEGREE = 111.2


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Raises:
      InputError: a field is out of its range.
    """

    cities: int = 4
    regions: int = 24  # per city
    days: int = 28
    interval_minutes: int = 60  # divides 60; resample for longer ones
    kind: str = "crowd"  # "crowd" counts per interval, or "speed" in km/h
    missing_rate: float = 0.02  # share of readings lost, half of them one by one, half in outages of hours
    closing_share: float = 0.25  # share of the crowd cities whose service closes at night, on top of the lost readings

    def __post_init__(self) -> None:
        check_types(self)
        for name, low, high in (("cities", 1, 1000), ("regions", 2, 1000), ("days", 2, 3660)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"`{name}` (={value}) must be in {low}..{high}; choose a number in that range")
        if self.interval_minutes < 1 or 60 % self.interval_minutes:
            raise InputError(f"`interval_minutes` (={self.interval_minutes}) must divide 60; choose e.g. 5, 15 or 60")
        if self.kind not in ("crowd", "speed"):
            raise InputError(f"`kind` (={self.kind!r}) cannot be simulated; choose crowd or speed")
        if not 0 <= self.missing_rate <= 0.5:
            raise InputError(f"`missing_rate` (={self.missing_rate}) must be in 0..0.5; choose a share, e.g. 0.02")
        if not 0 <= self.closing_share <= 1:
            raise InputError(f"`closing_share` (={self.closing_share}) must be in 0..1; choose a share, e.g. 0.25")


@dataclasses.dataclass(frozen=True, eq=False)
class SimulationTruth:
    """What a simulated city keeps to itself; M = 4 functions, S = steps per day."""

    functions: Float[np.ndarray, "N M"]  # the mixture z, rows sum to one
    workday_profile: Float[np.ndarray, "S N"]  # demand without deviation
    free_day_profile: Float[np.ndarray, "S N"]
    deviations: Float[np.ndarray, "T N"]  # u in the log of the demand
    persistence: Float[np.ndarray, " N"]  # a per step
    spillover: Float[np.ndarray, " N"]  # s per step
    noise: Float[np.ndarray, " N"]  # sigma per step
    level: Float[np.ndarray, " N"]  # counts per interval at demand one; free-flow speed in km/h


def simulate_cities(config: SimulationConfig, *, seed: int) -> list[City]:
    """Draw cities from the law of this module.

    Args:
      config: how many, how large and of which kind.
      seed: at least 0. City i depends on the seed, i and the kind, not on the number of cities.

    Returns:
      Cities named "crowd_0", "crowd_1", ... or "speed_0", ...

    Raises:
      InputError: the seed is negative.

    Example:
      >>> import gpdiff_jax as gpd
      >>> cities = gpd.simulate_cities(gpd.SimulationConfig(cities=2, regions=6, days=3), seed=0)
      >>> [(city.name, city.values.shape) for city in cities]
      [('crowd_0', (72, 6, 1)), ('crowd_1', (72, 6, 1))]
    """
    return [simulate_city_with_truth(config, index=index, seed=seed)[0] for index in range(config.cities)]


def simulate_city_with_truth(config: SimulationConfig, *, index: int, seed: int) -> tuple[City, SimulationTruth]:
    """Draw one city together with what a forecaster is not told.

    Args:
      config: the size and kind of the city.
      index: which city of the seed, from 0.
      seed: at least 0.

    Returns:
      The city and its truth.

    Raises:
      InputError: the seed or the index is negative.
    """
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise InputError(f"`{name}` (={value}) must be at least 0; choose another")
    # One stream per part: a longer series has the same map, and the missing readings leave the rest alone.
    family = np.random.SeedSequence(seed, spawn_key=(int(config.kind == "speed"), index))
    map_rng, rhythm_rng, motion_rng, reading_rng, loss_rng = (np.random.default_rng(s) for s in family.spawn(5))

    positions = _scatter(config.regions, map_rng)
    adjacency = _gabriel_graph(positions)
    functions = _draw_functions(positions, map_rng)
    start = np.datetime64("2024-01-07T00:00", "m") + np.timedelta64(int(map_rng.integers(4)), "W")
    workday, free_day = _profiles(functions, 24 * 60 // config.interval_minutes, rhythm_rng)
    weekday = (start.astype("datetime64[D]").astype(np.int64) + 3 + np.arange(config.days)) % 7
    profile = np.where((weekday < 5)[:, None, None], workday, free_day).reshape(-1, config.regions)

    hours = config.interval_minutes / 60
    truth = SimulationTruth(
        functions=functions,
        workday_profile=workday,
        free_day_profile=free_day,
        persistence=(functions @ _PERSISTENCE) ** hours,
        spillover=(functions @ _SPILLOVER) * hours,
        noise=(functions @ _NOISE) * np.sqrt(hours),
        deviations=np.zeros_like(profile),
        level=_levels(config, functions, rhythm_rng),
    )
    truth = dataclasses.replace(truth, deviations=_deviations(config, truth, adjacency, motion_rng))
    readings = _readings(config, truth, profile, reading_rng)
    values = np.where(_lost(config, len(profile), loss_rng), np.nan, readings).astype(np.float32)

    senders, receivers, weights = edges_of(adjacency.astype(np.float32))
    centre = map_rng.uniform([-40.0, -120.0], [55.0, 120.0])
    latitude, longitude = (centre + positions / (_KM_PER_DEGREE * np.array([1.0, np.cos(np.radians(centre[0]))]))).T
    city = City(
        name=f"{config.kind}_{index}",
        kind=config.kind,
        values=values[:, :, None],
        senders=senders,
        receivers=receivers,
        weights=weights,
        interval_minutes=config.interval_minutes,
        start=start,
        feature_names=("speed_kmh",) if config.kind == "speed" else ("visitors",),
        node_ids=tuple(f"r{region}" for region in range(config.regions)),
        latitude=np.ascontiguousarray(latitude),
        longitude=np.ascontiguousarray(longitude),
        poi=map_rng.poisson(25.0 * functions).astype(np.float32),
        poi_names=FUNCTIONS,
        place=f"Simulated {config.kind} city {index}",
    )
    return check_city(city), truth


def _scatter(regions: int, rng: np.random.Generator) -> Float[np.ndarray, "N 2"]:
    """Points in km on a disc with about one region per square km, no two much closer than their spacing."""
    radius = np.sqrt(regions / np.pi)
    points = np.zeros((regions, 2))
    for placed in range(regions):
        candidates = rng.normal(size=(12, 2))
        candidates *= (radius * np.sqrt(rng.uniform(size=12)) / np.linalg.norm(candidates, axis=1))[:, None]
        gaps = np.linalg.norm(candidates[:, None] - points[None, :placed], axis=2).min(axis=1, initial=np.inf)
        points[placed] = candidates[np.argmax(gaps)]
    return points


def _gabriel_graph(positions: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N N"]:
    """Link two points if no third lies in the circle over them: planar and connected. Weight: Gaussian of distance."""
    squared = _squared_distances(positions)
    linked = np.ones_like(squared, dtype=bool)
    for third in range(len(positions)):
        through = squared[:, third, None] + squared[None, third]
        blocked = through < squared * (1 - 1e-9)
        blocked[third], blocked[:, third] = False, False
        linked &= ~blocked
    np.fill_diagonal(linked, False)
    return np.where(linked, np.maximum(np.exp(-squared / (2 * np.median(squared[linked]))), 0.05), 0.0)


def _draw_functions(positions: Float[np.ndarray, "N 2"], rng: np.random.Generator) -> Float[np.ndarray, "N M"]:
    radius = np.linalg.norm(positions, axis=1).max()
    squared = _squared_distances(positions)
    smooth = np.linalg.cholesky(np.exp(-squared / (2 * (0.35 * radius) ** 2)) + 1e-6 * np.eye(len(positions)))
    fields = smooth @ rng.normal(size=(len(positions), len(FUNCTIONS)))
    fields += 0.5 * rng.normal(size=fields.shape)  # neighbours differ a little
    centrality = 0.5 - np.linalg.norm(positions, axis=1, keepdims=True) / radius
    logits = 2.4 * fields + centrality * np.array([-1.5, 1.5, 0.5, 0.5])
    mixture = np.exp(logits - logits.max(axis=1, keepdims=True))
    return mixture / mixture.sum(axis=1, keepdims=True)


def _squared_distances(positions: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N N"]:
    return ((positions[:, None] - positions[None]) ** 2).sum(axis=2)


def _profiles(
    functions: Float[np.ndarray, "N M"], steps_per_day: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "S N"], Float[np.ndarray, "S N"]]:
    hours = np.arange(steps_per_day)[:, None] * 24 / steps_per_day
    # Some cities wake later than others, and so do some regions of a city.
    hours = hours - 0.4 * rng.normal() - 0.2 * rng.normal(size=len(functions))
    height = np.exp(0.1 * rng.normal(size=len(FUNCTIONS)))

    def mix(day: tuple[tuple[tuple[float, float, float], ...], ...]) -> np.ndarray:
        demand = np.full(hours.shape, _QUIET)
        for share, factor, bumps in zip(functions.T, height, day, strict=True):
            for peak, width, size in bumps:
                apart = (hours - peak + 12) % 24 - 12
                demand += share * factor * size * np.exp(-0.5 * (apart / width) ** 2)
        return demand

    return mix(_WORKDAY), mix(_FREE_DAY)


def _levels(
    config: SimulationConfig, functions: Float[np.ndarray, "N M"], rng: np.random.Generator
) -> Float[np.ndarray, " N"]:
    own = rng.normal(size=len(functions))
    if config.kind == "speed":
        return np.clip(48 + 4 * rng.normal() + 9 * own, 25, 90)
    hourly = np.exp(5.0 + 0.2 * rng.normal() + functions @ _LOG_LEVEL + 0.4 * own)
    return hourly * config.interval_minutes / 60


def _deviations(
    config: SimulationConfig, truth: SimulationTruth, adjacency: Float[np.ndarray, "N N"], rng: np.random.Generator
) -> Float[np.ndarray, "T N"]:
    steps, steps_per_hour = len(truth.deviations), 60 // config.interval_minutes
    warm_up = 48 * steps_per_hour
    spread = truth.spillover[:, None] * adjacency / adjacency.sum(axis=1, keepdims=True)
    # Noise first, then shocks: mood g drifts over days, the same for all, felt by each region in its own measure.
    pushes = truth.noise * rng.normal(size=(warm_up + steps, config.regions))
    mood = np.zeros(warm_up + steps)
    keep = 0.97 ** (1 / steps_per_hour)
    for step, draw in enumerate(rng.normal(size=len(mood))):
        mood[step] = keep * mood[step - 1] + 0.07 * np.sqrt(1 - keep**2) * draw
    before = np.concatenate([[0.0], mood[:-1]])
    pushes += (truth.functions @ _RESPONSE) * (mood[:, None] - truth.persistence * before[:, None])

    chance = 0.004 * (truth.functions @ _EVENT_CHANCE) / steps_per_hour
    for step, region in np.argwhere(rng.uniform(size=pushes.shape) < chance):  # an event builds up for two hours
        pushes[step : step + 2 * steps_per_hour, region] += rng.uniform(0.3, 0.8) / steps_per_hour

    deviations = np.zeros_like(pushes)
    for step in range(1, len(pushes)):
        deviations[step] = truth.persistence * deviations[step - 1] + spread @ deviations[step - 1] + pushes[step]
    return deviations[warm_up:]


def _readings(
    config: SimulationConfig, truth: SimulationTruth, profile: Float[np.ndarray, "T N"], rng: np.random.Generator
) -> Float[np.ndarray, "T N"]:
    demand = profile * np.exp(np.clip(truth.deviations, -3, 3))
    if config.kind == "crowd":
        mean = truth.level * demand
        return rng.poisson(mean * rng.gamma(_DISPERSION, 1 / _DISPERSION, size=mean.shape)).astype(float)
    load = demand * (truth.functions @ _LOAD)
    slowed = 1 - 0.7 * load**2 / (0.35 + load**2)
    return np.maximum(truth.level * slowed * (1 + 0.03 * rng.normal(size=demand.shape)), 2.0)


def _lost(config: SimulationConfig, steps: int, rng: np.random.Generator) -> Bool[np.ndarray, "T N"]:
    """True where no reading is kept; every region keeps at least one."""
    steps_per_hour = 60 // config.interval_minutes
    hour_of_day = np.arange(steps) / steps_per_hour % 24
    closes = config.kind == "crowd" and rng.uniform() < config.closing_share
    closed = closes & (hour_of_day >= _CLOSED_HOURS[0]) & (hour_of_day < _CLOSED_HOURS[1])
    # The two halves overlap in a product's share; each is raised so that the union has the rate asked for.
    share = 1 - np.sqrt(1 - config.missing_rate)
    lost = rng.uniform(size=(steps, config.regions)) < share
    mean_length = min(8 * steps_per_hour, steps // 4)
    begins = rng.uniform(size=lost.shape) < -np.log1p(-share) / mean_length
    for step, region in np.argwhere(begins):
        lost[step : step + rng.geometric(1 / mean_length), region] = True
    lost |= closed[:, None]
    lost[np.argmin(closed), lost.all(axis=0)] = False
    return lost
