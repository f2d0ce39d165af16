#!/usr/bin/env python3
"""What incremental updates of bases save against decompositions: perplexity over the number of
decompositions, and over the time of Grams and bases.

    launch/studies/updates.py --model DIR --data PREFIX --policy FILE [--seq_len 4096]
            [--budgets 0.4 0.585] [--updates 0 1 2 4 -1] [--json FILE] [--log FILE]

For each number of rounds (drrl-eval --basis_updates; 0: starting bases as they are, -1: every far
pair decomposed) `dp`, and `gates` (dp with --gates) if the file has some, run at each budget, where
bases start from the calibration and the budget counts what updates or decompositions take; and
`fixed`, which starts from each sequence's first block, so that a few decompositions are made.
Intervals as in policies.py. Exit status: 0 measured, 1 a run failed.
"""

import study


def main():
    parser = study.arguments(__doc__)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.585])
    parser.add_argument("--rank", type=int, default=32, help="of `fixed`")
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 1, 2, 4, -1])
    arguments = parser.parse_args()
    runs = study.Study(arguments)

    policies = {"dp": [], **({"gates": ["--gates"]} if study.has_gates(arguments.policy) else {})}
    series = {
        f"{name} {budget}": [
            "--rank_policy=dp",
            *flags,
            f"--rank_budget={budget}",
            "--policy",
            arguments.policy,
        ]
        for name, flags in policies.items()
        for budget in arguments.budgets
    }
    series[f"fixed {arguments.rank}, from the first block"] = [
        "--rank_policy=fixed",
        f"--rank={arguments.rank}",
    ]
    for name, flags in series.items():
        for updates in arguments.updates:
            runs.row(
                name, updates, arguments.seq_len, *flags, f"--basis_updates={updates}", time=True
            )
            runs.save("updates")

    print(
        f"{'policy, rounds of updates':40} {'decompositions':>14} {'per 1000 tokens':>15} "
        f"{'Grams and bases ms':>18} {'of the attention':>16} {'perplexity':>11}"
    )
    for row in runs.rows:
        if row["met"]:
            print(
                f"{row['policy'] + ', ' + str(row['value']):40} {row['decompositions']:14} "
                f"{1e3 * row['decompositions'] / row['tokens']:15.2f} {row['basis_ms']:18.0f} "
                f"{row['basis_ms'] / row['attention_ms']:16.3f} "
                f"{row['increase_percent'][0]:+9.2f} %"
            )


if __name__ == "__main__":
    main()
