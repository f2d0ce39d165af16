"""What the studies of rank policies share: runs of drrl-eval, and statistics of paired differences."""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from statistics import NormalDist

import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / os.environ.get("DRRL_PRESET", "cpu-release")


def evaluate(build, flags):
    """The JSON of one drrl-eval run; None if its budget cannot be met at this length (exit status 2, usage)."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        command = [str(part) for part in (build / "bin/drrl-eval", *flags, "--json", result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if "cannot be met" in done.stderr:
            return None
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(result.read_text())


def interval(difference, seed=1, draws=10000, level=0.95):
    """Mean and bootstrap interval of paired differences."""
    picks = numpy.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = numpy.percentile(difference[picks].mean(axis=1), [50 * (1 - level), 50 * (1 + level)])
    return float(difference.mean()), float(low), float(high)


def score_statistic(better, worse, n, delta):
    """Tango's score statistic (Statistics in Medicine 17, 1998) of n pairs, for a difference `delta` of their two rates. It falls as delta grows.

    better, worse: pairs of which only the first, only the second counts. The variance is that under delta, so that pairs that all agree still leave
    doubt: without any difference, 268 pairs are needed to exclude one of 0.01 at level 0.05.
    """
    a, b, c = 2 * n, -better - worse + (2 * n - better + worse) * delta, -worse * delta * (1 - delta)
    worse_rate = (math.sqrt(max(0, b * b - 4 * a * c)) - b) / (2 * a)
    distance = better - worse - n * delta
    return distance and distance / math.sqrt(n * max(1e-300, 2 * worse_rate + delta * (1 - delta)))


def tost(difference, margin, alpha=0.05):
    """Two one-sided tests of equivalence: is the mean of paired differences of right (1) and wrong (0) answers within +- margin?

    difference [n] of -1, 0 and 1. Returns {"p": the larger of the two p values, "interval": Tango's, of level 1 - 2 alpha, "equivalent": p < alpha,
    which is the same as the interval within the margin} (Nam, Biometrics 53, 1997).
    """
    if not numpy.isin(difference, (-1, 0, 1)).all():
        raise ValueError("differences of right and wrong answers are -1, 0 or 1")
    pairs = int((difference > 0).sum()), int((difference < 0).sum()), len(difference)

    def crossing(z):
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score_statistic(*pairs, middle) > z else (low, middle)
        return (low + high) / 2

    p = max(NormalDist().cdf(-score_statistic(*pairs, -margin)), NormalDist().cdf(score_statistic(*pairs, margin)))
    z = NormalDist().inv_cdf(1 - alpha)
    return {"p": p, "interval": [crossing(z), crossing(-z)], "equivalent": p < alpha}
