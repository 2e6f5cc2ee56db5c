"""In: readings, and the value above which they are missing. Out: a line that says how many, and which is the first."""

import numpy as np
from jaxtyping import Shaped


def told_above(
    values: Shaped[np.ndarray, "T N *channels"],
    limit: float,
    *,
    ids: tuple[str, ...],
    interval_minutes: int,
    start: np.datetime64 | None,
) -> str:
    """How many readings are missing since they lie above a value, and the first of them in time.

    Args:
      values: readings, NaN where there is none.
      limit: the value.
      ids: of the regions.
      interval_minutes: of a step.
      start: of the first step; None where it is not known.

    Returns:
      A line for the user.
    """
    wrong = values > limit
    if not wrong.any():
        return f"no reading is above {limit:g}"
    step, region, *channel = map(int, np.argwhere(wrong)[0])
    when = f"step {step}" if start is None else f"{start + np.timedelta64(step * interval_minutes, 'm')}"
    return (
        f"{np.count_nonzero(wrong)} readings above {limit:g} are missing, the first "
        f"{values[step, region, *channel]:.7g} of region {ids[region]!r} at {when}"
    )
