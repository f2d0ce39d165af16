#!/usr/bin/env python3
"""Training speed of drrl-train against Transformers + PyTorch SDPA + fused AdamW: the same model,
tokens, order, precision, threads and machine, runs alternating so that a slow minute hits both. The
first step of every run (allocation, warm-up) is not counted.

    launch/bench/train.py --model DIR --data PREFIX [--seq_len 2048 8192] [--rounds 3] [--json FILE]

Prints a table of median tokens/s, their ratio (above 1: drrl is faster) and peak memory, and
whether the losses agree; writes JSON.
Exit status: 0 measured, 1 a run failed or the losses disagree.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "prepare"))
from drrl_prepare.files import write_atomically  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative, at every step


class RunFailed(Exception):
    pass


def measure(command, threads):
    """Runs to the end; returns peak resident memory in GiB. Output goes to our standard error if it
    fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise RunFailed(f"exit {process.returncode}: {' '.join(map(str, command))}")
    return usage.ru_maxrss / 2**20


def device_name(device):
    if device == "cpu":
        return device
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def transformers_run(options, seq_len, work):
    out = work / "transformers.jsonl"
    command = [
        sys.executable,
        ROOT / "tests/models/parity/hf_train_steps.py",
        "--model",
        options.model,
        "--data",
        options.data,
        "--seq_len",
        seq_len,
        "--steps",
        options.steps,
        "--lr",
        options.lr,
        "--dtype",
        options.dtype,
        "--device",
        options.device,
        "--json",
        out,
    ]
    if options.activation_checkpoint:
        command.append("--activation_checkpoint")
    memory = measure([str(c) for c in command], options.threads)
    lines = read_lines(out)
    return (
        [line["loss"] for line in lines],
        [seq_len / line["seconds"] for line in lines[1:]],
        memory,
    )


def drrl_run(options, seq_len, work, further=()):
    out, shared = Path(tempfile.mkdtemp(dir=work)), Path(work) / "shared.flags"
    shared.write_text(
        "".join(f"{flag}\n" for flag in options.drrl_flag)
    )  # in a file, since exact attention has no use for some
    command = [
        Path(options.build) / "bin/drrl-train",
        "--model",
        options.model,
        "--data",
        options.data,
        "--output",
        out,
        "--seq_len",
        seq_len,
        "--steps",
        options.steps,
        "--lr",
        options.lr,
        "--min_lr=0",
        "--warmup_tokens=0",
        "--attention=exact",
        "--valid_fraction=0",
        f"--dtype={options.dtype}",
        f"--device={options.device}",
        "--global_batch=1",
        "--micro_batch=1",
        "--seed=0",
        f"--activation_checkpoint={'true' if options.activation_checkpoint else 'false'}",
        f"--flagfile={shared}",
        *further,
    ]
    memory = measure([str(c) for c in command], options.threads)
    lines = read_lines(out / "metrics/metrics.jsonl")
    losses = [line["loss"] for line in lines]
    return losses, [line["tokens_per_second"] for line in lines[1:]], memory


def lowrank_run(options, seq_len, work):
    ranks = (
        ["--rank_policy=dp", f"--rank_budget={options.rank_budget}", "--policy", options.policy]
        if options.policy
        else ["--rank_policy=fixed", f"--rank={options.rank}"]
    )
    return drrl_run(options, seq_len, work, ["--attention=lowrank", *ranks, *options.lowrank_flag])


def lowrank_label(options):
    return f"budget {options.rank_budget}" if options.policy else f"rank {options.rank}"


def compare(options, seq_len, work):
    programs = {"transformers": transformers_run, "drrl": drrl_run}
    if options.policy or options.rank:
        programs["low rank"] = lowrank_run
    speeds, memory, losses = ({name: [] for name in programs} for _ in range(3))
    for turn in range(options.rounds):
        for name, program in programs.items():
            loss, speed, peak = program(options, seq_len, work)
            losses[name] = loss
            speeds[name].append(statistics.median(speed))
            memory[name].append(peak)
            print(
                f"L = {seq_len}, round {turn + 1}: {name} {speeds[name][-1]:.1f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    worst = max(
        abs(a - b) / abs(a) for a, b in zip(losses["transformers"], losses["drrl"], strict=True)
    )
    median = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "seq_len": seq_len,
        "tokens_per_second": median,
        "ratio": median["drrl"] / median["transformers"],
        "runs": speeds,
        "peak_memory_gib": {name: max(values) for name, values in memory.items()},
        "lowrank_ratio": median.get("low rank", 0) / median["transformers"],
        "losses": losses,
        "worst_relative_loss_difference": worst,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx")
    parser.add_argument(
        "--build",
        default=str(ROOT / "build" / os.environ.get("DRRL_PRESET", "cpu-release")),
        help="build folder",
    )
    parser.add_argument("--seq_len", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each program, alternating (default 3)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="steps of a run, the first of which is not counted (default 4)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--activation_checkpoint", action="store_true", help="in both")
    parser.add_argument(
        "--policy",
        help="a file of drrl-policy calibrate: drrl-train with --rank_policy=dp takes part too "
        "(its losses are its own)",
    )
    parser.add_argument("--rank_budget", type=float, default=0.585, help="with --policy")
    parser.add_argument(
        "--rank",
        type=int,
        help="instead of --policy: drrl-train with this rank everywhere takes part too",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--lowrank_flag",
        action="append",
        default=[],
        help="a further flag for drrl-train at low rank, e.g. --lowrank_flag=--gates",
    )
    parser.add_argument(
        "--drrl_flag",
        action="append",
        default=[],
        help="a further flag for drrl-train, e.g. --drrl_flag=--near_block=1024",
    )
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    if options.policy and options.rank:
        parser.error("--policy and --rank exclude each other")
    if options.lowrank_flag and not (options.policy or options.rank):
        parser.error("--lowrank_flag needs --policy or --rank")

    try:
        with tempfile.TemporaryDirectory(prefix="drrl-bench.") as work:
            results = [compare(options, seq_len, Path(work)) for seq_len in options.seq_len]
    except (RunFailed, OSError, ValueError, KeyError) as error:
        print(f"bench_train: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    agree = True
    print(
        f"training, tokens/s (median of {options.rounds} runs), {options.dtype}, {options.threads} "
        "threads, batch 1"
    )
    print(
        f"{'L':>6} {'transformers':>13} {'drrl':>9} {'ratio':>6} {'GiB t.':>7} {'GiB drrl':>8}  "
        "losses differ by at most"
    )
    for r in results:
        speed, memory = r["tokens_per_second"], r["peak_memory_gib"]
        agree &= r["worst_relative_loss_difference"] <= LOSS_TOLERANCE[options.dtype]
        print(
            f"{r['seq_len']:>6} {speed['transformers']:>13.1f} {speed['drrl']:>9.1f} "
            f"{r['ratio']:>6.2f} {memory['transformers']:>7.1f} {memory['drrl']:>8.1f}  "
            f"{r['worst_relative_loss_difference']:.1e}"
        )
        if "low rank" in speed:
            print(
                f"{'':>6} low rank, {lowrank_label(options)}: {speed['low rank']:.1f} tokens/s, "
                f"{r['lowrank_ratio']:.2f} of transformers, "
                f"{speed['low rank'] / speed['drrl']:.2f} of drrl's exact attention, "
                f"{memory['low rank']:.1f} GiB; last loss {r['losses']['low rank'][-1]:.4f} "
                f"against {r['losses']['drrl'][-1]:.4f}"
            )
    if options.json:
        write_atomically(
            options.json,
            json.dumps(
                {
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "device": device_name(options.device),
                    "rank": options.rank,
                    "rank_budget": options.rank_budget if options.policy else None,
                    "drrl_flags": options.drrl_flag,
                    "results": results,
                    "dtype": options.dtype,
                    "threads": options.threads,
                    "steps": options.steps,
                    "rounds": options.rounds,
                    "activation_checkpoint": options.activation_checkpoint,
                },
                indent=2,
            )
            + "\n",
        )
    if not agree:
        print(
            "bench_train: error: the two programs do not train alike, so their speeds do not "
            "compare",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
