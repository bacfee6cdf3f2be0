"""Intervals of shares that are looked at once. (Duels, which are looked at after every vote, have their own: `duel.py`.)"""

import math


def wilson(successes: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share. Returns (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return centre - half, centre + half
