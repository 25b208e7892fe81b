"""Fair timing on a busy machine: the sides take turns, and a ratio is the median over turns."""

import statistics
import time
from collections.abc import Callable, Sequence


def take_turns(
    sides: dict[str, Callable[[], object]],
    seconds: float = 0.0,
    turns: int = 1,
    calls: int = 1,
    warm: int = 1,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, [turns * calls] a side; side by side, so that what slows the machine slows all alike.

    At least `turns` turns, and more until `seconds` have passed. In a turn each side is called `calls` times, after
    `warm` calls that are not counted: they pay for what the side before left in the caches, and for threads that it let
    fall asleep. synchronize waits for the device.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # compiles, and fills the allocator's pools
        for _ in range(3 * warm):
            side()
    end, done = time.perf_counter() + seconds, 0
    while done < turns or time.perf_counter() < end:
        for name, side in sides.items():
            for _ in range(warm):
                side()
            synchronize()  # else the device could still be busy with the warm-up
            for _ in range(calls):
                start = time.perf_counter()
                side()
                synchronize()  # a GPU's calls return before they are done
                times[name].append(time.perf_counter() - start)
        done += 1
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of a single value three times that."""
    # inclusive: quartiles lie within what was measured.
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def row(
    what: str, ours: Sequence[float], theirs: Sequence[float] | None = None, against: str = "", unit: str = "s",
    note: str = "", **more,
) -> dict:  # fmt: skip
    """A row of the table from the values of two sides, turn by turn; with one side there is no ratio.

    ratio: median over turns of theirs / ours, above 1 where ours is faster; spread: its quartiles.
    """
    result = dict(what=what, ours=statistics.median(ours), unit=unit, note=note, turns=len(ours), **more)
    if theirs is not None:
        # Turn by turn, because what slows the machine then slows both sides of a ratio.
        low, middle, high = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
        result |= dict(theirs=statistics.median(theirs), against=against, ratio=middle, spread=[low, high])
    return result
