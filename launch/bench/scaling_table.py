#!/usr/bin/env python3
"""Puts runs of drrl-bench scaling side by side: scaling_table.py OUT RUN.json... Prints the table;
OUT gets {"runs", "efficiency"}.

Efficiency is tokens per second and process, basis_ratio the processor time that the slowest process
spends on Grams and bases, both over those of the smallest run. Processors of shared machines become
slower and faster from one second to the next: on a CPU, times are counted in those of the
yardsticks meanwhile. Runs must differ in nothing but their processes.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "prepare"))
from drrl_prepare.files import write_atomically  # noqa: E402

FREE = {
    "tp",
    "cp",
    "dp",
    "json",
    "threads",
}  # options in which runs may differ; threads: the count in use is compared
SAME = ("scaling", "attention", "parameters", "threads", "device", "versions", "timed_steps")


def shape_of_run(run):
    options = {name: value for name, value in run["options"].items() if name not in FREE}
    return {"options": options, **{key: run[key] for key in SAME}}


def speedless(run):
    """Of a step of this run, times in those of the yardsticks meanwhile, on CUDA in ms: the step,
    Grams and bases of the slowest process (None on CUDA)."""
    yardsticks = [step["yardstick_ms"] for step in run["steps"]]
    if None in yardsticks:
        return run["step_ms"], None
    bases = max(rank["basis_cpu_ms"] for rank in run["ranks"])
    return statistics.median(
        step["ms"] / step["yardstick_ms"] for step in run["steps"]
    ), bases / statistics.mean(yardsticks)


def efficiency(runs):
    runs = sorted(runs, key=lambda run: run["world_size"])
    steps, bases = zip(*map(speedless, runs))
    each = [run["tokens_per_step"] / run["world_size"] / step for run, step in zip(runs, steps)]
    keys = (
        "world_size",
        "tp",
        "cp",
        "dp",
        "step_ms",
        "tokens_per_second",
        "exposed_share",
        "basis_share",
        "basis_bytes",
        "sent_bytes",
    )
    return [
        {
            **{key: run[key] for key in keys},
            "efficiency": rate / each[0],
            "basis_ratio": basis / bases[0] if basis and bases[0] else None,
        }
        for run, rate, basis in zip(runs, each, bases)
    ]


def main():
    out, *paths = sys.argv[1:]
    runs = [json.loads(Path(path).read_text()) for path in paths]
    for path, run in zip(paths, runs):
        if shape_of_run(run) != shape_of_run(runs[0]):
            first, this = shape_of_run(runs[0]), shape_of_run(run)
            different = [key for key in SAME if first[key] != this[key]]
            different += [
                f"--{name}"
                for name, value in first["options"].items()
                if this["options"].get(name) != value
            ]
            print(
                f"scaling_table: error: {path} and {paths[0]} differ in {', '.join(different)}",
                file=sys.stderr,
            )
            return 2
    try:
        rows = efficiency(runs)
    except KeyError as missing:
        print(
            f"scaling_table: error: {', '.join(paths)}: expected the key {missing}, which "
            "drrl-bench scaling writes",
            file=sys.stderr,
        )
        return 2

    def cell(value, pattern):
        return "-" if value is None else pattern % value  # null on CUDA

    def share(value):
        return cell(value and 100 * value, "%.1f %%")

    print(f"{runs[0]['scaling']} scaling, {runs[0]['attention']}")
    print(
        f"{'processes':>9} {'tp x cp x dp':>12} {'step ms':>9} {'tokens/s':>9} {'efficiency':>10} "
        f"{'exposed':>8} {'bases':>7} {'ratio':>6} {'sent MB':>9} {'of bases':>9}"
    )
    for row in rows:
        layout = f"{row['tp']} x {row['cp']} x {row['dp']}"
        print(
            f"{row['world_size']:>9} {layout:>12} {row['step_ms']:>9.1f} "
            f"{row['tokens_per_second']:>9.0f} {row['efficiency']:>10.2f} "
            f"{share(row['exposed_share']):>8} {share(row['basis_share']):>7} "
            f"{cell(row['basis_ratio'], '%.2f'):>6} {row['sent_bytes'] / 1e6:>9.3f} "
            f"{row['basis_bytes'] / 1e6:>9.3f}"
        )
    write_atomically(out, json.dumps({"runs": runs, "efficiency": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
