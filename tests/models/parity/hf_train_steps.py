#!/usr/bin/env python3
"""Training steps with Transformers + SDPA + torch.optim.AdamW on the tokens, in the order and with
the schedule of drrl-train: what drrl-train's losses must follow. One JSON object a step: step, loss
(mean, nats), grad_norm (before clipping), lr, seconds."""

import argparse
import json
import math
import sys
import time

import torch
from reference import Windows, load_model, loss_sum, read_tokens


def cosine_rate(tokens, lr, min_lr, warmup, total):
    if tokens < warmup:
        return lr * tokens / warmup
    progress = min(1.0, (tokens - warmup) / max(1, total - warmup))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument(
        "--global_batch",
        type=int,
        default=1,
        help="sequences of one update, each a pass of its own",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--min_lr", type=float, default=0.0)
    parser.add_argument("--warmup_tokens", type=int, default=0)
    parser.add_argument(
        "--total_tokens", type=int, default=0, help="end of the cosine; 0: that of the steps"
    )
    parser.add_argument(
        "--weight_decay", type=float, default=0.1, help="of matrices; norms and biases have none"
    )
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16: fp32 weights under autocast",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--activation_checkpoint", action="store_true")
    parser.add_argument("--out", help="save the trained model to this folder")
    parser.add_argument("--json", help="file for the steps, one a line; they are printed too")
    options = parser.parse_args()

    model = load_model(options.model).to(options.device).train()
    if options.activation_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim >= 2],
                "weight_decay": options.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )
    windows = Windows(read_tokens(options.data), options.seq_len, options.seed)
    step_tokens = options.global_batch * options.seq_len
    total = options.total_tokens or options.steps * step_tokens
    lines = []
    for step in range(options.steps):
        start = time.perf_counter()
        rate = cosine_rate(
            (step + 1) * step_tokens, options.lr, options.min_lr, options.warmup_tokens, total
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = 0.0
        for sample in range(options.global_batch):
            tokens, labels = (
                x.to(options.device) for x in windows.sample(step * options.global_batch + sample)
            )
            with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bf16"):
                part = loss_sum(model, tokens, labels) / step_tokens
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
        optimizer.step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        lines.append(
            {
                "step": step + 1,
                "loss": loss,
                "grad_norm": float(norm),
                "lr": rate,
                "seconds": time.perf_counter() - start,
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    if options.out:
        model.save_pretrained(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
