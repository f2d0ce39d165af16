#!/usr/bin/env python3
"""Puts runs of drrl-bench scaling side by side: scaling_table.py OUT RUN.json... Prints the table; OUT gets {"runs", "efficiency"}.

Efficiency is tokens per second and process, over those of the smallest run. Runs must differ in nothing but their processes.
"""

import json
import sys
from pathlib import Path

FREE = {"tp", "cp", "dp", "json", "threads"}  # options in which runs may differ; threads: the count in use is compared
SAME = ("scaling", "attention", "parameters", "threads", "device", "versions", "timed_steps")


def shape_of_run(run):
    options = {name: value for name, value in run["options"].items() if name not in FREE}
    return {"options": options, **{key: run[key] for key in SAME}}


def efficiency(runs):
    runs = sorted(runs, key=lambda run: run["world_size"])
    each = [run["tokens_per_second"] / run["world_size"] for run in runs]
    keys = ("world_size", "tp", "cp", "dp", "step_ms", "tokens_per_second", "exposed_share", "basis_share", "sent_bytes")
    return [{**{key: run[key] for key in keys}, "efficiency": rate / each[0]} for run, rate in zip(runs, each)]


def main():
    out, *paths = sys.argv[1:]
    runs = [json.loads(Path(path).read_text()) for path in paths]
    for path, run in zip(paths, runs):
        if shape_of_run(run) != shape_of_run(runs[0]):
            first, this = shape_of_run(runs[0]), shape_of_run(run)
            different = [key for key in SAME if first[key] != this[key]]
            different += [f"--{name}" for name, value in first["options"].items() if this["options"].get(name) != value]
            print(f"scaling_table: error: {path} and {paths[0]} differ in {', '.join(different)}", file=sys.stderr)
            return 2
    rows = efficiency(runs)
    share = lambda value: "-" if value is None else f"{100 * value:.1f} %"
    print(f"{runs[0]['scaling']} scaling, {runs[0]['attention']}")
    print(f"{'processes':>9} {'tp x cp x dp':>12} {'step ms':>9} {'tokens/s':>9} {'efficiency':>10} {'exposed':>8} {'bases':>7} {'sent MB':>9}")
    for row in rows:
        layout = f"{row['tp']} x {row['cp']} x {row['dp']}"
        print(f"{row['world_size']:>9} {layout:>12} {row['step_ms']:>9.1f} {row['tokens_per_second']:>9.0f} {row['efficiency']:>10.2f} "
              f"{share(row['exposed_share']):>8} {share(row['basis_share']):>7} {row['sent_bytes'] / 1e6:>9.3f}")
    Path(out).write_text(json.dumps({"runs": runs, "efficiency": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
