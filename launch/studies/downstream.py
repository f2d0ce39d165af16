#!/usr/bin/env python3
"""What low-rank attention does to answers: accuracy under rank policies against exact attention, on
the same examples.

    launch/studies/downstream.py --model DIR --policy FILE --sets FILE.jsonl... [--limit N]
            [--jobs N] [--out DIR] [--json FILE] [-- --device=cuda ...]

Sets are files for drrl-eval --examples (launch/prepare/downstream_sets.py), policies `dp` at
--budget with and without gates, and `fixed`, or some of them. For each: right answers, the
difference in points with its 95 % interval (paired bootstrap over examples, each with all of its
questions), the same for the answer's loss in nats, and a verdict. "equivalent": two one-sided tests
exclude a difference of --margin points or more, at level 0.05 (the 90 % score interval, widened by
as much as questions of an example are alike, lies within +- margin); else "worse" or "better" if
the 95 % interval excludes 0; else "undecided": too few questions to tell. What follows -- goes to
drrl-eval. --out keeps what became of each example, SET.POLICY.jsonl; --log lets an interrupted
study go on. On a CPU with many cores --jobs, a core each, are faster than one process with all of
them. Exit status: 0 measured, 1 a run failed.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import pathlib
import sys
import tempfile

import numpy
import study
from drrl_prepare.files import write_atomically

PART = 25  # examples that one run of drrl-eval answers at most, if they are logged


def policies(arguments):
    """name -> flags of drrl-eval"""
    lowrank = ["--attention=lowrank", "--policy", arguments.policy]
    dp = [*lowrank, "--rank_policy=dp", f"--rank_budget={arguments.budget}"]
    result = {"exact": ["--attention=exact"]}
    if "dp" in arguments.policies:
        result[f"dp {arguments.budget}"] = dp
    if "gates" in arguments.policies:
        result[f"dp {arguments.budget} gates"] = [*dp, "--gates"]
    if "fixed" in arguments.policies:
        result.update(
            {
                f"fixed {rank}": [*lowrank, "--rank_policy=fixed", f"--rank={rank}"]
                for rank in arguments.ranks
            }
        )
    return result


def answer(arguments, log, examples, flags, out):
    """What ran, and what became of each of the examples, lines of a file, under one policy; the
    latter is kept in the file `out`. Errors: study.Refused."""
    flags = [str(flag) for flag in (*flags, *(["--threads=1"] if arguments.jobs > 1 else []))]

    def part(asked):
        def run():
            with tempfile.TemporaryDirectory() as folder:
                files = [pathlib.Path(folder) / name for name in ("asked.jsonl", "told.jsonl")]
                files[0].write_text(asked)
                report = study.evaluate(
                    arguments.build,
                    [
                        "--model",
                        arguments.model,
                        "--examples",
                        files[0],
                        "--examples_out",
                        files[1],
                        *flags,
                    ],
                    arguments.flags,
                )
                return {
                    "run": {
                        key: report[key]
                        for key in ("attention", "dtype", "device", "threads", "versions")
                    },
                    "told": files[1].read_text(),
                }

        return log.result(
            (
                str(arguments.model),
                hashlib.sha256(asked.encode()).hexdigest(),
                *flags,
                *arguments.flags,
            ),
            run,
        )

    # Several parts a job, as some examples take longer than others; small ones for a log, which is
    # of whole parts.
    size = -(-len(examples) // (4 * arguments.jobs if arguments.jobs > 1 else 1))
    size = min(PART, size) if arguments.log else size
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        parts = [
            pool.submit(part, "".join(examples[first : first + size]))
            for first in range(0, len(examples), size)
        ]
        try:
            done = [future.result() for future in parts]
        finally:
            pool.shutdown(cancel_futures=True)
    told = "".join(part["told"] for part in done)
    write_atomically(out, told)
    return done[0]["run"], [json.loads(line) for line in told.split("\n") if line]


def compare(exact, lines, margin):
    """Paired figures of two runs on the same questions; accuracies as shares."""
    if [(line["id"], line["at"]) for line in exact] != [(line["id"], line["at"]) for line in lines]:
        raise ValueError("the two runs answered different questions")
    right, exact_right, nll, exact_nll = (
        numpy.array([float(line[key]) for line in run])
        for key in ("right", "nll")
        for run in (lines, exact)
    )
    examples, difference = [line["id"] for line in lines], right - exact_right
    test = study.tost(difference, margin, groups=examples)
    _, low, high = points = study.interval(difference, groups=examples)
    verdict = (
        "equivalent"
        if test["equivalent"]
        else "worse"
        if high < 0
        else "better"
        if low > 0
        else "undecided"
    )
    return {
        "examples": len(set(examples)),
        "questions": len(lines),
        "accuracy": float(right.mean()),
        "exact_accuracy": float(exact_right.mean()),
        "difference": points,
        "lost": int((difference < 0).sum()),
        "won": int((difference > 0).sum()),
        "margin": margin,
        "design_effect": test["design_effect"],
        "tost_p": test["p"],
        "interval_90": test["interval"],
        "verdict": verdict,
        "nll_difference": study.interval(nll - exact_nll, groups=examples),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--policy", required=True, help="file of drrl-policy calibrate")
    parser.add_argument(
        "--sets", required=True, nargs="+", type=pathlib.Path, help="examples, a JSON object a line"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="only the first so many examples of each set; 0: all"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="drrl-eval so many times at once, of a thread each (default 1, of all threads)",
    )
    parser.add_argument(
        "--policies", nargs="+", choices=("dp", "gates", "fixed"), default=["dp", "gates", "fixed"]
    )
    parser.add_argument("--budget", type=float, default=0.585, help="of `dp` (default 0.585)")
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[32], help="of `fixed` (default 32)"
    )
    parser.add_argument(
        "--margin", type=float, default=1.0, help="of equivalence [points] (default 1)"
    )
    parser.add_argument("--build", type=pathlib.Path, default=study.BUILD)
    parser.add_argument("--out", type=pathlib.Path, help="folder for what became of each example")
    study.log_argument(parser)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("flags", nargs="*", help="after --: more flags of drrl-eval")
    arguments = parser.parse_args()
    if len({path.stem for path in arguments.sets}) < len(arguments.sets):
        parser.error("files of --sets must have different names")

    rows, log = [], study.Log(arguments.log, arguments.build, arguments.policy)
    with study.kept_or_temporary(arguments.out) as out:
        print(
            f"{'set':24} {'policy':14} {'operations':>10} {'accuracy':>9} {'exact':>7} "
            f"{'difference in points, 95 %':>28} {'90 % of TOST':>16}  "
            f"{'nats of the answer, 95 %':>28}  verdict at +-{arguments.margin:g}"
        )
        for examples in arguments.sets:
            with open(examples) as file:
                chosen = list(
                    itertools.islice(
                        (line for line in file if line.strip()), arguments.limit or None
                    )
                )
            if not chosen:
                sys.exit(f"{examples}: no examples")
            exact = None
            for name, flags in policies(arguments).items():
                try:
                    ran, lines = answer(
                        arguments,
                        log,
                        chosen,
                        flags,
                        out / f"{examples.stem}.{name.replace(' ', '-')}.jsonl",
                    )
                except study.Refused as refused:
                    print(f"{examples.stem:24} {name:14} {refused}", flush=True)
                    rows.append(
                        {"set": examples.stem, "policy": name, "met": False, "reason": str(refused)}
                    )
                    continue
                exact = exact or lines
                nll, operations = (
                    numpy.mean([line[key] for line in lines])
                    for key in ("nll", "attention_flops_fraction")
                )
                row = {
                    "set": examples.stem,
                    "policy": name,
                    "met": True,
                    **compare(exact, lines, arguments.margin / 100),
                    "nll": nll,
                    "attention_flops_fraction": operations,
                    "attention_ms": sum(line["attention_ms"] for line in lines),
                    "run": ran,
                }
                rows.append(row)
                if lines is exact:
                    print(
                        f"{examples.stem:24} {name:14} {1:10.4f} {100 * row['accuracy']:9.1f} "
                        f"{'':7} {len(lines)} questions, {nll:.3f} nats an answer, attention "
                        f"{row['attention_ms']:.0f} ms",
                        flush=True,
                    )
                    continue
                points, tost, nats = (
                    [100 * x for x in row["difference"]],
                    [100 * x for x in row["interval_90"]],
                    row["nll_difference"],
                )
                print(
                    f"{examples.stem:24} {name:14} {operations:10.4f} {100 * row['accuracy']:9.1f} "
                    f"{100 * row['exact_accuracy']:7.1f} {points[0]:+9.2f} ({points[1]:+.2f} .. "
                    f"{points[2]:+.2f}) {tost[0]:+7.2f} .. {tost[1]:+.2f}  {nats[0]:+9.4f} "
                    f"({nats[1]:+.4f} .. {nats[2]:+.4f})  {row['verdict']}",
                    flush=True,
                )
    study.save(arguments, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
