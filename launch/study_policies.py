#!/usr/bin/env python3
"""Rank policies against each other on the same text: perplexity over attention operations and time, with paired bootstrap intervals.

    launch/study_policies.py --model DIR --data PREFIX --policy FILE [--seq_len 4096] [--budgets 0.4 0.5 0.585 0.7] [--time] [--json FILE]

Every sequence is evaluated by drrl-eval under exact attention, `fixed` ranks, `energy`, and `random`, `greedy`, `dp`, `gates` (dp with --row_gates) and, if the file holds a
trained agent, `rl`, each at every budget; `random`, `greedy` and `dp` are given the operations that `rl` really took. --time: exact attention runs beside every policy, sequence by
sequence, and the time of its attention is the unit. Intervals: 95 %, over sequences, of the paired difference of mean loss.

Then every policy that looks at the text is compared with dp at equal operations and at equal time: dp's losses between two of its budgets are interpolated, sequence by
sequence. Prints tables; writes all figures as JSON. Exit status: 0 measured, 1 a run failed.
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
    parser.add_argument("--energies", type=float, nargs="*", default=[0.99], help="of `energy`")
    parser.add_argument("--baselines", nargs="*", default=["random", "greedy"], help="that spend the budgets beside dp")
    parser.add_argument("--time", action="store_true", help="measure time, too: exact attention runs beside every policy")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of drrl-eval at low rank, e.g. --flag=--near_block=128")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--build", type=pathlib.Path, default=study.BUILD)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    full = evaluate(arguments, ["--attention=full"])
    exact = numpy.array(full["sequence_nll"])
    rows = []
    print(f"exact attention: perplexity {full['perplexity']:.3f}, {len(exact)} sequences of {arguments.seq_len} tokens")
    print(f"{'policy':14} {'operations':>10} {'time':>6} {'perplexity':>11}  95 % interval")

    def run(policy, *flags):
        timed = ["--compare_full"] if arguments.time else []
        return evaluate(arguments, ["--attention=lowrank", f"--rank_policy={policy}", "--policy", arguments.policy, *flags, *timed, *arguments.flag])

    def save(comparisons):
        if arguments.json:
            arguments.json.write_text(json.dumps({"exact": full, "rows": rows, "comparisons": comparisons}, indent=1) + "\n")

    def report(name, value, result):
        mean, low, high = study.interval(numpy.array(result["sequence_nll"]) - exact)
        percent = [100 * (numpy.exp(x) - 1) for x in (mean, low, high)]
        time = result["attention_ms"] / result["full_attention_ms"] if arguments.time else None
        rows.append({"policy": name, "value": value, "operations": result["attention_flops_fraction"], "time": time, "increase_percent": percent,
                     "sequence_nll": result["sequence_nll"], "attention": result["attention"], "options": result["options"]})
        print(f"{name + ' ' + str(value):14} {result['attention_flops_fraction']:10.4f} {f'{time:6.3f}' if time else '':>6} {percent[0]:+10.2f} %  "
              f"{percent[1]:+.2f} .. {percent[2]:+.2f} %", flush=True)
        save([])

    for rank in arguments.ranks:
        report("fixed", rank, run("fixed", f"--rank={rank}"))
    for energy in arguments.energies:
        report("energy", energy, run("energy", f"--energy={energy}"))
    policy_file = pathlib.Path(arguments.policy).read_bytes()[:1 << 20]
    for budget in arguments.budgets:
        learned = run("rl", f"--rank_budget={budget}") if b"agent.head" in policy_file else None
        spend = f"--rank_budget={learned['attention_flops_fraction'] if learned else budget}"
        static = run("dp", spend)
        if static is None:
            print(f"budget {budget}: cannot be met at this length")
            continue
        for baseline in arguments.baselines:
            report(baseline, budget, run(baseline, spend))
        report("dp", budget, static)
        if b"gated_damage" in policy_file:
            report("gates", budget, run("dp", spend, "--row_gates"))
        if learned:
            report("rl", budget, learned)

    comparisons = []
    print("against dp at the same cost, interpolated between its budgets: damage saved, and difference of loss in 1e-3 nats per token")
    for unit in ("operations", "time") if arguments.time else ("operations",):
        static = sorted((row for row in rows if row["policy"] == "dp"), key=lambda row: row[unit])
        for row in rows:
            between = [(a, b) for a, b in zip(static, static[1:]) if a[unit] <= row[unit] <= b[unit]]
            if row["policy"] not in ("gates", "rl") or not between:
                continue
            a, b = between[0]
            share = (row[unit] - a[unit]) / (b[unit] - a[unit])
            dp = (1 - share) * numpy.array(a["sequence_nll"]) + share * numpy.array(b["sequence_nll"])
            mean, low, high = study.interval(numpy.array(row["sequence_nll"]) - dp)
            saved = -mean / (dp - exact).mean()
            comparisons.append({"policy": row["policy"], "value": row["value"], "unit": unit, "cost": row[unit], "saved": saved, "nats": [mean, low, high]})
            print(f"{row['policy'] + ' ' + str(row['value']):14} {unit:10} {row[unit]:.3f} {100 * saved:+6.1f} %  {1e3 * mean:+.3f} ({1e3 * low:+.3f} .. {1e3 * high:+.3f})")
    save(comparisons)


if __name__ == "__main__":
    main()
