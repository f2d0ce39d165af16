#!/usr/bin/env python3
"""What balance of ranks recovers when one of two tensor-parallel processes is slow: SmolLM2, say,
on two cores, one of which it shares with a busy loop.

    launch/studies/straggler.py --model DIR --data PREFIX --valid_data PREFIX --policy FILE
            [--seq_len 8192] [--budgets 1 0.585] [--slow 0] [--json FILE]

For each --rank_budget, drrl-train with --tp 2, one thread a process, each on a core of its own,
three times: undisturbed, with a busy loop on the core of process --slow, and so with
--balance_every. Reported are medians of ms a step, the share of the lost time that balance
recovers, and the difference of perplexity, by drrl-eval, between the ranks that balance arrived at
and those without, with a 95 % bootstrap interval over sequences. Exit status: 0 measured, 1 a run
failed.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy
import study

WARM = 1  # steps of a run that are not timed, as memory is new;
EVERY = 2  # under balance, the steps between two measurements of speed,
SETTLE = (
    4  # and those that are not timed: the second choice of ranks knows how fast the first one was
)


@contextlib.contextmanager
def busy(core):
    """A loop that takes every second slice of a core's time from a process there."""
    loop = subprocess.Popen(
        [sys.executable, "-c", "while True: pass"],
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def train(arguments, flags, cores, untimed):
    """ms of each timed step, the last line of metrics, and the result of a run."""
    with tempfile.TemporaryDirectory() as output:
        output = pathlib.Path(output)
        program = [
            arguments.build / "bin/drrl-train",
            "--model",
            arguments.model,
            "--data",
            arguments.data,
            f"--seq_len={arguments.seq_len}",
            "--tp=2",
            f"--steps={untimed + arguments.steps}",
            "--global_batch=1",
            "--lr=1e-5",
            "--valid_fraction=0",
            "--threads=1",
            "--output",
            output,
            "--json",
            output / "result.json",
            *flags,
        ]
        command = ["mpirun", "--oversubscribe", "--bind-to", "none"] + (
            ["--allow-run-as-root"] if os.geteuid() == 0 else []
        )
        for i, core in enumerate(cores):
            command += [":"] * (i > 0) + ["-np", 1, "taskset", "-c", core, *program]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
        }
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            sys.exit(
                f"{' '.join(map(str, command))}: exit status "
                f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        lines = [
            json.loads(line) for line in (output / "metrics/metrics.jsonl").read_text().splitlines()
        ]
        return (
            [line["ms_per_step"] for line in lines if line["step"] > untimed],
            lines[-1],
            json.loads((output / "result.json").read_text()),
        )


def perplexity(arguments, flags, speeds):
    """Of the ranks for these speeds against those without balance: percent, and its interval."""

    def nll(*more):  # a latency table of the trained process is of one thread
        return numpy.array(
            study.evaluate_held_out(arguments, arguments.model, [*flags, "--threads=1", *more])[
                "sequence_nll"
            ]
        )

    if not speeds:
        return [0.0, 0.0, 0.0]
    return [
        100 * (numpy.exp(x) - 1)
        for x in study.interval(nll("--balance_speeds=" + ",".join(map(str, speeds))) - nll())
    ]


def main():
    parser = study.training_arguments(__doc__, seq_len=8192)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 0.585])
    parser.add_argument(
        "--slow",
        type=int,
        choices=[0, 1],
        default=0,
        help="the process that shares its core; of 3 KV groups process 0 holds two",
    )
    parser.add_argument("--steps", type=int, default=4, help="timed, of each run")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="how often the three runs follow each other; medians are of all",
    )
    parser.add_argument(
        "--train_flag",
        action="append",
        default=[],
        help="a further flag of drrl-train, e.g. --train_flag=--activation_checkpoint",
    )
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit(f"two processes need a core each, this program may use {cores}")

    rows, folder = [], tempfile.TemporaryDirectory()
    shared = study.flagfile(folder.name, arguments.flag)
    print(
        f"two processes on L = {arguments.seq_len}, process {arguments.slow} slowed down; ms a step"
    )
    print(
        f"{'budget':>7} {'undisturbed':>12} {'slowed':>9} {'balanced':>9} {'recovered':>10} "
        f"{'speeds':>12} {'perplexity':>11}  95 % interval",
        flush=True,
    )
    for budget in arguments.budgets:
        flags = [
            "--attention=lowrank",
            "--rank_policy=dp",
            f"--rank_budget={budget}",
            "--policy",
            arguments.policy,
            shared,
        ]
        times = {"undisturbed": [], "slowed": [], "balanced": []}
        for _ in range(arguments.rounds):
            run_flags = [*flags, *arguments.train_flag]
            times["undisturbed"] += train(arguments, run_flags, cores, WARM)[0]
            with busy(cores[arguments.slow]):
                times["slowed"] += train(arguments, run_flags, cores, WARM)[0]
                balanced, metrics, result = train(
                    arguments, [*run_flags, f"--balance_every={EVERY}"], cores, SETTLE
                )
            times["balanced"] += balanced
        ms = {name: statistics.median(of) for name, of in times.items()}
        recovered = (ms["slowed"] - ms["balanced"]) / (ms["slowed"] - ms["undisturbed"])
        speeds = result["balance_speeds"]
        rows.append(
            {
                "budget": budget,
                "ms": ms,
                "recovered": recovered,
                "speeds": speeds,
                "increase_percent": None,
                "times": times,
                **{
                    key: metrics[key]
                    for key in ("balance_slowest", "balance_time", "balance_damage")
                },
            }
        )
        print(
            f"{budget:7} {ms['undisturbed']:12.0f} {ms['slowed']:9.0f} {ms['balanced']:9.0f} "
            f"{100 * recovered:8.0f} % {','.join(map(str, speeds)) or 'plain':>12}",
            end="",
            flush=True,
        )
        study.save(arguments, rows=rows)  # hours of measurements, should what follows fail
        rows[-1]["increase_percent"] = percent = perplexity(arguments, flags, speeds)
        print(f" {percent[0]:+9.2f} %  {percent[1]:+.2f} .. {percent[2]:+.2f} %", flush=True)
        study.save(arguments, rows=rows)


if __name__ == "__main__":
    main()
