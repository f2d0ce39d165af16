#!/usr/bin/env python3
"""What each part of the method is worth: `dp` at one budget, with gates if --policy has some, and
the same with one part left out or put in another way, on the same sequences.

    launch/studies/ablations.py --model DIR --data PREFIX --policy FILE [--calibration_data PREFIX]
            [--seq_len 4096] [--budget 0.585] [--time] [--json FILE] [--log FILE]

    fixed ranks          one rank everywhere, at whatever operations it takes
    random, greedy       another way to spend the budget, without gates
    no gates             low rank for all entries
    no updates           static bases: those of the calibration for every far pair
    decompositions       every pair's bases solved, none updated
    no residual factors  far log-sum-exps without what the projected scores lack
    unweighted Grams     keys and values count alike, whatever attention rests on them; the starting
                         bases are still of weighted Grams
    guard                ranks raised until the starting bases lose at most --guard_eps, at whatever
                         operations that takes; without it is how drrl runs
    rl                   the agent of --policy, if it has one (dp is "no RL")
    no sinks, near N     another geometry, with a calibration of its own on --calibration_data;
                         without that text they are left out. As fair as --policy was made alike:
                         give --calibration_tokens and --calibration_seq_len as it had them

Of the paper's ablations (arXiv 2512.15973) three have nothing to switch off here. No reward
shaping: the agent learns from every rank's measured damage, not from a shaped reward. No
convolution features: its state is made of Grams and starting bases, none of embeddings, which tell
nothing that Grams do not (agent.py). No perturbation features: what starting bases lose is all that
its state says about the text, but for the sizes of scores and values.

Prints and writes for each the increase of perplexity over exact attention and over `dp` itself,
95 % bootstrap intervals over sequences, operations, and with --time the time of attention over
exact attention's. Exit status: 0 measured, 1 a run failed.
"""

import pathlib
import sys

import numpy
import study


def variants(arguments, policy_of):
    """name -> (flags of drrl-eval, those that shape the calibration); policy_of(flags): the policy
    file of such a calibration, None if there can be none."""
    spend = [f"--rank_budget={arguments.budget}"]
    no_gates = ["--rank_policy=dp", *spend]
    gates = study.has_gates(arguments.policy)
    dp = [*no_gates, "--gates"] if gates else no_gates
    result = {
        "dp": dp,
        "fixed ranks": ["--rank_policy=fixed", f"--rank={arguments.rank}"],
        "random": ["--rank_policy=random", *spend],
        "greedy": ["--rank_policy=greedy", *spend],
        **({"no gates": no_gates} if gates else {}),
        "no updates": [*dp, "--basis_updates=0"],
        "decompositions": [*dp, "--basis_updates=-1"],
        "no residual factors": [*dp, "--ablate=residual"],
        "unweighted Grams": [*dp, "--ablate=mass"],
        "guard": [*dp, f"--guard_eps={arguments.guard_eps}"],
    }
    if study.has_agent(arguments.policy):
        result["rl"] = [*study.agent_flags(arguments.policy), *spend]
    result = {name: [*flags, "--policy", arguments.policy] for name, flags in result.items()}
    if arguments.calibration_data:
        for name, shape in {
            "no sinks": "--sink_tokens=0",
            **{f"near {block}": f"--near_block={block}" for block in arguments.near_blocks},
        }.items():
            result[name] = [*dp, shape, "--policy", policy_of(shape)]
    return result


def main():
    parser = study.arguments(__doc__)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--budget", type=float, default=0.585)
    parser.add_argument("--rank", type=int, default=32, help="of fixed ranks")
    parser.add_argument("--guard_eps", type=float, default=0.3)
    parser.add_argument("--near_blocks", type=int, nargs="*", default=[128, 512])
    parser.add_argument(
        "--calibration_data", help="prefix of .bin and .idx, to calibrate other geometries on"
    )
    parser.add_argument("--calibration_tokens", type=int, default=4096)
    parser.add_argument("--calibration_seq_len", type=int, default=2048)
    parser.add_argument(
        "--calibrations", type=pathlib.Path, help="folder for their files, which are used again"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="measure time, too: exact attention runs beside every variant",
    )
    arguments = parser.parse_args()
    runs = study.Study(arguments)

    with study.kept_or_temporary(arguments.calibrations) as folder:

        def policy_of(shape):
            file = folder / f"{shape.strip('-')}.safetensors"
            if not file.exists():
                study.run(
                    [
                        arguments.build / "bin/drrl-policy",
                        "calibrate",
                        "--model",
                        arguments.model,
                        "--data",
                        arguments.calibration_data,
                        f"--seq_len={arguments.calibration_seq_len}",
                        f"--calibration_tokens={arguments.calibration_tokens}",
                        f"--threads={arguments.threads}",
                        study.flagfile(folder, arguments.flag),
                        shape,
                        "--policy",
                        file,
                    ]
                )
            return file

        base = None
        for name, flags in variants(arguments, policy_of).items():
            row = runs.row(name, None, arguments.seq_len, *flags, time=arguments.time)
            base = row if name == "dp" else base
            if not base:
                sys.exit(runs.rows[0]["reason"])
            if row:
                row["over_dp_percent"] = [
                    100 * (numpy.exp(x) - 1)
                    for x in study.interval(
                        numpy.array(row["sequence_nll"]) - numpy.array(base["sequence_nll"])
                    )
                ]
            runs.save("ablations")

    print(f"{'variant':20} {'operations':>10} {'perplexity over dp':>20}  95 % interval")
    for row in runs.rows:
        if row["met"]:
            mean, low, high = row["over_dp_percent"]
            print(
                f"{row['policy']:20} {row['operations']:10.4f} {mean:+18.2f} %  {low:+.2f} .. "
                f"{high:+.2f} %"
            )


if __name__ == "__main__":
    main()
