#!/usr/bin/env python3
"""Fine-tuning with low-rank attention against fine-tuning with exact attention: the same model,
tokens, order and steps; then the loss on held-out text.

    launch/studies/finetune.py --model DIR --data PREFIX --valid_data PREFIX --policy FILE
                             [--steps 200] [--seq_len 2048] [--budgets 0.585] [--gates]
                             [--device cuda --eval_device cpu] [--json FILE]

One run of drrl-train with exact attention and one with `dp` for each budget. Each model that was
trained at low rank is evaluated as it was trained, and with exact attention beside it, and compared
with the exactly trained one: difference of perplexity with a 95 % bootstrap interval over
sequences, operations, and time of the forward attention over that of exact attention on
--eval_device (drrl-eval --compare_exact). On a CPU also the time that attention took in training,
forward and backward, over that of the exact run. Exit status: 0 measured, 1 a run failed.
"""

import json
import pathlib
import sys
import tempfile

import numpy
import study


def train(arguments, output, flags):
    """drrl-train into `output`; the losses of its steps, and the seconds of all and those that
    attention took on world rank 0. The model lies in output/hf."""
    study.run(
        [
            arguments.build / "bin/drrl-train",
            "--model",
            arguments.model,
            "--data",
            arguments.data,
            f"--seq_len={arguments.seq_len}",
            f"--steps={arguments.steps}",
            f"--global_batch={arguments.global_batch}",
            f"--lr={arguments.lr}",
            f"--min_lr={arguments.lr / 10}",
            f"--seed={arguments.seed}",
            f"--device={arguments.device}",
            f"--dtype={arguments.dtype}",
            "--weight_decay=0.01",
            "--valid_fraction=0",
            f"--threads={arguments.threads}",
            "--output",
            output,
            "--json",
            f"{output}.json",
            *flags,
        ]
    )
    lines = [
        json.loads(line)
        for path in sorted((output / "metrics").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    summary = json.loads(pathlib.Path(f"{output}.json").read_text())
    return [line["loss"] for line in lines if "loss" in line], {
        name: summary.get(name) for name in ("step_seconds", "attention_seconds")
    }


def main():
    parser = study.training_arguments(__doc__, seq_len=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--global_batch", type=int, default=1, help="sequences in a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.585])
    parser.add_argument("--gates", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="to train on")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="to train in; evaluations are in fp32",
    )
    parser.add_argument(
        "--eval_device", choices=["cpu", "cuda"], help="to evaluate on (default: --device)"
    )
    arguments = parser.parse_args()

    def evaluate(model, flags):
        return study.evaluate_held_out(
            arguments, model, [f"--device={arguments.eval_device or arguments.device}", *flags]
        )

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        losses, spent = train(arguments, folder / "exact", ["--attention=exact"])
        before, exact = (
            evaluate(arguments.model, ["--attention=exact"]),
            evaluate(folder / "exact/hf", ["--attention=exact"]),
        )
        print(
            f"exact attention: perplexity {before['perplexity']:.3f} -> {exact['perplexity']:.3f}, "
            f"{len(exact['sequence_nll'])} sequences of {arguments.seq_len} tokens, "
            f"{arguments.steps} steps, training loss {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
        print(
            f"{'budget':>7} {'evaluated':>10} {'operations':>10} {'time':>6} {'perplexity':>11}  "
            "95 % interval"
        )
        for budget in arguments.budgets:
            flags = [
                "--attention=lowrank",
                "--rank_policy=dp",
                f"--rank_budget={budget}",
                "--policy",
                arguments.policy,
                study.flagfile(folder, arguments.flag),
            ]
            flags += ["--gates"] if arguments.gates else []
            own_losses, own_spent = train(arguments, folder / str(budget), flags)
            result = evaluate(folder / str(budget) / "hf", [*flags, "--compare_exact"])
            time = result["attention_ms"] / result["exact_attention_ms"]
            for name, losses_of, operations in (
                ("low rank", result["sequence_nll"], result["attention_flops_fraction"]),
                ("exact", result["exact_sequence_nll"], 1.0),
            ):
                mean, low, high = study.interval(
                    numpy.array(losses_of) - numpy.array(exact["sequence_nll"])
                )
                percent = [100 * (numpy.exp(x) - 1) for x in (mean, low, high)]
                rows.append(
                    {
                        "budget": budget,
                        "evaluated": name,
                        "operations": operations,
                        "time": time if name == "low rank" else 1.0,
                        "increase_percent": percent,
                        "sequence_nll": losses_of,
                        "training_losses": own_losses,
                        "training": own_spent,
                    }
                )
                print(
                    f"{budget:7} {name:>10} {operations:10.4f} {rows[-1]['time']:6.2f} "
                    f"{percent[0]:+10.2f} %  {percent[1]:+.2f} .. {percent[2]:+.2f} %",
                    flush=True,
                )
            ratios = {
                name.removesuffix("_seconds"): own_spent[name] / spent[name]
                for name in spent
                if spent[name]
            }
            print(
                f"{budget:7}   training: "
                + ", ".join(
                    f"{name} {ratio:.3f} of exact attention's time"
                    for name, ratio in ratios.items()
                ),
                flush=True,
            )
    study.save(
        arguments, before=before, exact=exact, training_losses=losses, training=spent, rows=rows
    )


if __name__ == "__main__":
    try:
        main()
    except study.Refused as refused:
        sys.exit(f"{sys.argv[0]}: {refused}")
