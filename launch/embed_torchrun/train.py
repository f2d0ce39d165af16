#!/usr/bin/env python3
"""A plain data-parallel trainer, a stock Transformers Llama under torchrun, with drrl's attention
in it.

    torchrun --nproc_per_node 2 launch/embed_torchrun/train.py
            --library build/cpu-release/lib/libdrrl_torch_ops.so --model DIR --tokens FILE.npy
            --rank 32

--tokens is numpy.save of token ids [sequences, L + 1], trained on in this order. Over NCCL where
there are GPUs, else over Gloo. The first process prints one JSON object a step: step, loss (mean,
nats), grad_norm (before clipping), flops (of exact attention's)."""

import argparse
import json
import os

import drrl_attention
import numpy
import torch
import torch.distributed
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM


def train(options, device):
    replicas = torch.distributed.group.WORLD
    rank, size = replicas.rank(), replicas.size()

    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    lowrank = drrl_attention.register(
        options.library,
        head_dim=config.head_dim,
        rank=options.rank,
        policy=options.policy,
        rank_budget=options.rank_budget,
        near_block=options.near_block,
        device=device,
    )
    lowrank.check_agreement(replicas.group_name)
    model = (
        AutoModelForCausalLM.from_pretrained(
            options.model, attn_implementation="drrl", dtype=torch.float32, local_files_only=True
        )
        .to(device)
        .train()
    )
    if options.activation_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    tokens = numpy.load(options.tokens, mmap_mode="r")
    share = options.global_batch // size
    if share * size != options.global_batch or len(tokens) < options.steps * options.global_batch:
        raise ValueError(
            f"{options.steps} steps of {options.global_batch} sequences on {size} processes and "
            f"{len(tokens)} sequences"
        )

    for step in range(options.steps):
        first = step * options.global_batch + rank * share
        batch = torch.from_numpy(tokens[first : first + share].astype(numpy.int64)).to(device)
        optimizer.zero_grad()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        lowrank.check_agreement(replicas.group_name)  # the same ranks on all processes
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        mean = loss.detach() / size
        torch.distributed.all_reduce(mean)
        spent = lowrank.take_statistics()
        if rank == 0:
            print(
                json.dumps(
                    {
                        "step": step + 1,
                        "loss": mean.item(),
                        "grad_norm": norm.item(),
                        "flops": spent["flops"] / spent["exact_flops"],
                    }
                ),
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--global_batch", type=int, default=2, help="sequences of one update, shared out evenly"
    )
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--activation_checkpoint", action="store_true")
    parser.add_argument(
        "--rank", type=int, default=0, help="of far tokens, everywhere; 0: --policy decides"
    )
    parser.add_argument("--policy", default="", help="file of drrl-policy calibrate")
    parser.add_argument("--rank_budget", type=float, default=0.585)
    parser.add_argument("--near_block", type=int, default=256)
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", device_id=device if cuda else None
    )
    train(
        options, device
    )  # a function of its own: the group must outlive the model, which holds it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
