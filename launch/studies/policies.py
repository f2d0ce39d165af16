#!/usr/bin/env python3
"""Rank policies against each other on the same text: perplexity over attention operations and time,
with paired bootstrap intervals.

    launch/studies/policies.py --model DIR --data PREFIX --policy FILE [--seq_len 2048 8192]
                             [--budgets 0.3 0.4 0.5 0.6 0.7 0.8] [--time] [--json FILE] [--log FILE]
                             [--markdown FILE]

Every sequence is evaluated by drrl-eval under exact attention, `fixed` ranks, `energy`, and
`random`, `greedy`, `dp`, `gates` (dp with --gates) and, if the file holds a trained agent, `rl`
(with --gates if it has learned with them), each at every budget and all from the same file; those
without gates are given the operations that `rl` really took. --time: exact attention runs beside
every policy, sequence by sequence, and the time of its attention is the unit. Intervals: 95 %, over
sequences, of the paired difference of mean loss. A budget that cannot be met at a length is a row
that says so.

Then `gates` is compared with `dp`, and `rl` with that of the two that has the same choices, at
equal operations and at equal time: losses of the other one between two of its budgets are
interpolated, sequence by sequence. Prints tables; writes all figures as JSON, and the comparison of
arXiv 2512.15973 (full rank, fixed, adaptive SVD, random, DR-RL, and what drrl adds) as Markdown.
Exit status: 0 measured, 1 a run failed.
"""

import pathlib

import numpy
import study
from drrl_prepare.files import write_atomically

# As the paper calls them.
TITLES = {
    "fixed": "fixed rank {}",
    "energy": "adaptive SVD (energy {})",
    "random": "random ranks, {}",
    "greedy": "greedy, {}",
    "dp": "dp, {}",
    "gates": "dp with gates, {}",
    "rl": "DR-RL (rl), {}",
}


def compare(rows, exact, unit, against):
    """What policies save of the damage of others at the same cost, at one length; against: name ->
    name of the other."""
    for row in rows:
        static = sorted(
            (other for other in rows if other["policy"] == against.get(row["policy"])),
            key=lambda other: other[unit],
        )
        between = [(a, b) for a, b in zip(static, static[1:]) if a[unit] <= row[unit] <= b[unit]]
        if not between:
            continue
        a, b = between[0]
        share = (row[unit] - a[unit]) / (b[unit] - a[unit])
        other = (1 - share) * numpy.array(a["sequence_nll"]) + share * numpy.array(
            b["sequence_nll"]
        )
        mean, low, high = study.interval(numpy.array(row["sequence_nll"]) - other)
        yield {
            "policy": row["policy"],
            "against": against[row["policy"]],
            "value": row["value"],
            "seq_len": row["seq_len"],
            "unit": unit,
            "cost": row[unit],
            "saved": -mean / (other - exact).mean(),
            "nats": [mean, low, high],
        }


def markdown(study_of, seq_lens):
    """Tables, one for each length."""
    lines = []
    for seq_len in seq_lens:
        exact = study_of.exact(seq_len)
        lines += [
            "",
            f"L = {seq_len}, {len(exact['sequence_nll'])} sequences",
            "",
            (
                "| policy | perplexity | increase (95 %) | operations | attention time | "
                "mean rank of scores / values | decompositions |"
            ),
            "|---|---|---|---|---|---|---|",
            (
                f"| full rank | {exact['perplexity']:.3f} | | 1 | "
                f"{'1' if any(row.get('time') for row in study_of.rows) else ''} | | 0 |"
            ),
        ]
        for row in study_of.rows:
            if row["seq_len"] != seq_len:
                continue
            title = TITLES[row["policy"]].format(row["value"])
            if not row["met"]:
                lines.append(f"| {title} | cannot be met | | | | | |")
                continue
            mean, low, high = row["increase_percent"]
            time = f"{row['time']:.2f}" if row["time"] else ""
            lines.append(
                f"| {title} | {row['perplexity']:.3f} | {mean:+.2f} % ({low:+.2f} .. {high:+.2f}) "
                f"| {row['operations']:.3f} | {time} | {row['mean_rank_qk']:.1f} / "
                f"{row['mean_rank_v']:.1f} | {row['decompositions']} |"
            )
    return "\n".join(lines[1:]) + "\n"


def main():
    parser = study.arguments(__doc__)
    parser.add_argument("--seq_len", type=int, nargs="+", default=[4096])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.5, 0.585, 0.7])
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 48], help="of `fixed`")
    parser.add_argument("--energies", type=float, nargs="*", default=[0.99], help="of `energy`")
    parser.add_argument(
        "--baselines",
        nargs="*",
        default=["random", "greedy"],
        help="that spend the budgets beside dp",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="measure time, too: exact attention runs beside every policy",
    )
    parser.add_argument("--markdown", type=pathlib.Path, help="file for the comparison as tables")
    arguments = parser.parse_args()
    runs = study.Study(arguments)
    agent = study.agent_flags(arguments.policy) if study.has_agent(arguments.policy) else None
    against = {"gates": "dp", "rl": "gates" if agent and "--gates" in agent else "dp"}

    comparisons = []
    for seq_len in arguments.seq_len:

        def report(name, value, *flags, seq_len=seq_len):
            row = runs.row(
                name, value, seq_len, "--policy", arguments.policy, *flags, time=arguments.time
            )
            runs.save("policies", comparisons=comparisons)
            return row

        for rank in arguments.ranks:
            report("fixed", rank, "--rank_policy=fixed", f"--rank={rank}")
        for energy in arguments.energies:
            report("energy", energy, "--rank_policy=energy", f"--energy={energy}")
        for budget in arguments.budgets:
            learned = report("rl", budget, *agent, f"--rank_budget={budget}") if agent else None
            spend = f"--rank_budget={learned['operations'] if learned else budget}"
            for baseline in (*arguments.baselines, "dp"):
                report(baseline, budget, f"--rank_policy={baseline}", spend)
            if study.has_gates(arguments.policy):
                report(
                    "gates",
                    budget,
                    "--rank_policy=dp",
                    "--gates",
                    f"--rank_budget={budget}" if against["rl"] == "gates" else spend,
                )

        print(
            "against another policy at the same cost, interpolated between its budgets: damage "
            "saved, and difference of loss in 1e-3 nats per token"
        )
        met = [row for row in runs.rows if row["met"] and row["seq_len"] == seq_len]
        for unit in ("operations", "time") if arguments.time else ("operations",):
            for c in compare(met, numpy.array(runs.exact(seq_len)["sequence_nll"]), unit, against):
                comparisons.append(c)
                mean, low, high = (1e3 * x for x in c["nats"])
                print(
                    f"{c['policy'] + ' ' + str(c['value']):14} against {c['against']:5} {unit:10} "
                    f"{c['cost']:.3f} {100 * c['saved']:+6.1f} %  {mean:+.3f} ({low:+.3f} .. "
                    f"{high:+.3f})"
                )
    runs.save("policies", comparisons=comparisons)
    if arguments.markdown:
        write_atomically(arguments.markdown, markdown(runs, arguments.seq_len))


if __name__ == "__main__":
    main()
