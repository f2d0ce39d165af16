#!/usr/bin/env python3
"""Rank policies against each other on the same text: perplexity over attention operations, with paired bootstrap intervals.

    launch/study_policies.py --model DIR --data PREFIX --policy FILE [--seq_len 4096] [--budgets 0.4 0.5 0.585 0.7] [--json FILE]

Every sequence is evaluated by drrl-eval under exact attention, `fixed` ranks, `random`, `greedy`, `dp` and, if the file holds a trained agent, `rl`, each at every budget; the
others are given the operations that `rl` really took, so that they compare at equal cost. Intervals: 95 %, over sequences, of the paired difference of
mean loss. Prints a table; writes all figures as JSON. Exit status: 0 measured, 1 a run failed.
"""

import argparse
import json
import os
import pathlib

import numpy

import study


def evaluate(arguments, flags):
    return study.evaluate(arguments.build, ["--model", arguments.model, "--data", arguments.data, f"--seq_len={arguments.seq_len}",
                                            f"--max_tokens={arguments.max_tokens}", f"--threads={arguments.threads}", *flags])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx: text that neither calibration nor traces have seen")
    parser.add_argument("--policy", required=True, help="file of drrl-policy calibrate, and train if `rl` shall take part")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--max_tokens", type=int, default=32768)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.5, 0.585, 0.7])
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 48], help="of `fixed`")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--build", type=pathlib.Path, default=study.BUILD)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    full = evaluate(arguments, ["--attention=full"])
    exact = numpy.array(full["sequence_nll"])
    rows = []
    print(f"exact attention: perplexity {full['perplexity']:.3f}, {len(exact)} sequences of {arguments.seq_len} tokens")
    print(f"{'policy':14} {'operations':>10} {'perplexity':>11}  95 % interval")

    def report(name, result):
        mean, low, high = study.interval(numpy.array(result["sequence_nll"]) - exact)
        percent = [100 * (numpy.exp(x) - 1) for x in (mean, low, high)]
        rows.append({"policy": name, "operations": result["attention_flops_fraction"], "increase_percent": percent, "sequence_nll": result["sequence_nll"],
                     "attention": result["attention"], "options": result["options"]})
        print(f"{name:14} {result['attention_flops_fraction']:10.4f} {percent[0]:+10.2f} %  {percent[1]:+.2f} .. {percent[2]:+.2f} %", flush=True)
        return result

    for rank in arguments.ranks:
        report(f"fixed {rank}", evaluate(arguments, ["--attention=lowrank", "--rank_policy=fixed", f"--rank={rank}", "--policy", arguments.policy]))
    has_agent = b"agent.head" in pathlib.Path(arguments.policy).read_bytes()[:1 << 20]
    for budget in arguments.budgets:
        def run(policy, at):
            return evaluate(arguments, ["--attention=lowrank", f"--rank_policy={policy}", f"--rank_budget={at}", "--policy", arguments.policy])

        learned = run("rl", budget) if has_agent else None
        spend = learned["attention_flops_fraction"] if learned else budget
        static = run("dp", spend)
        if static is None:
            print(f"budget {budget}: cannot be met at this length")
            continue
        for baseline in ("random", "greedy"):
            report(f"{baseline} {budget}", run(baseline, spend))
        report(f"dp {budget}", static)
        if learned:
            report(f"rl {budget}", learned)
            mean, low, high = study.interval(numpy.array(learned["sequence_nll"]) - numpy.array(static["sequence_nll"]))
            rows[-1]["against_dp_nats"] = [mean, low, high]
            print(f"{'':14} rl - dp: {1e3 * mean:+.3f}e-3 nats per token ({1e3 * low:+.3f} .. {1e3 * high:+.3f})", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"exact": full, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
