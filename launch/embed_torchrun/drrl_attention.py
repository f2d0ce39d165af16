"""drrl's low-rank attention as an attention implementation of Transformers, for decoders whose
layers are as Llama's (head_dim, o_proj)."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def register(library, name="drrl", **options):
    """Makes attn_implementation=name known to Transformers. library: path of libdrrl_torch_ops.so;
    options: head_dim, and rank or policy (a file of drrl-policy calibrate) with rank_budget, then
    near_block, sink_tokens, basis_updates, device; as those of drrl-train. One name a model.
    Returns the torch.classes.drrl.LowRankAttention that does the work, for its
    check_agreement(group), take_statistics() and describe()."""
    torch.ops.load_library(library)
    lowrank = torch.classes.drrl.LowRankAttention(**options)

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        dropout=0.0,
        sliding_window=None,
        softcap=None,
        **_,
    ):
        if attention_mask is not None:
            raise ValueError(
                f"{name}: causal attention over whole sequences only: no padding, packed documents "
                "or cached prefix"
            )
        if dropout or sliding_window or softcap or scaling not in (None, query.shape[-1] ** -0.5):
            raise ValueError(
                f"{name}: dropout {dropout}, sliding window {sliding_window}, softcap {softcap}, "
                f"scaling {scaling}: expected none of them, and 1 / sqrt(head_dim)"
            )
        # Under autocast rotated queries and keys are wider than values.
        out = lowrank.attend(
            module.layer_idx,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            module.o_proj.weight,
        )
        return out.transpose(1, 2), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(
        name, sdpa_mask
    )  # makes no mask where causal is all there is to say
    return lowrank
