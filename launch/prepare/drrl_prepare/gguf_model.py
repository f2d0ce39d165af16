"""Config, weights and tokenizer of a Hugging Face directory out of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from drrl_prepare.files import BadInput

Field = Callable[..., Any]  # the value of a GGUF field by its name, or a default

LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
TOKEN_NORMAL, TOKEN_CONTROL, TOKEN_USER_DEFINED = 1, 3, 4  # llama.cpp's LLAMA_TOKEN_TYPE_*

# How the text is cut before byte-pair encoding: tokenizer.ggml.pre names it, the GGUF does not hold
# it. "smollm": one token a digit, then GPT-2's regular expression on bytes.
PRETOKENIZERS = {"smollm": {"individual_digits": True}, "gpt-2": {"individual_digits": False}}


def hugging_face_name(gguf_name: str) -> str | None:
    if gguf_name in MODEL_TENSORS:
        return MODEL_TENSORS[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", gguf_name)
    if match and match[2] in LAYER_TENSORS:
        return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}"
    raise BadInput(f"tensor '{gguf_name}' of the GGUF has no place in a Llama model")


def undo_rope_permutation(weight: Any, heads: int) -> Any:
    """llama.cpp interleaves the two halves of each rotated head ("norm" RoPE); Hugging Face keeps
    them apart.

    weight [heads * d, hidden], rows of a head in order 0, d/2, 1, d/2 + 1, ... -> 0, 1, ..., d - 1
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def gguf_config(field: Field) -> dict[str, Any]:
    """config.json of the Llama model that a GGUF's fields describe."""
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    head_dim = field("llama.rope.dimension_count", hidden // heads)
    if head_dim != hidden // heads:
        raise BadInput(f"rope dimension {head_dim} is not the head dimension {hidden // heads}")
    if field("llama.rope.scaling.type", "none") != "none":
        raise BadInput(f"rope scaling '{field('llama.rope.scaling.type')}' is not converted")
    # A GGUF keeps fp32; 1e-5 comes back as 9.999999747e-06. The shortest decimal with that fp32
    # value is what was meant.
    import numpy

    eps = float(str(numpy.float32(field("llama.attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": eps,
        "rope_theta": float(field("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "use_cache": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id", None),
        "torch_dtype": "float32",
    }


def gguf_weights(reader: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face name -> fp32 array, dequantized, q and k rows in Hugging Face order."""
    import gguf
    import numpy

    weights = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(
            numpy.float32, copy=False
        )
        value = value.reshape(
            [int(n) for n in reversed(tensor.shape)]
        )  # GGUF lists the fastest dimension first
        if name.endswith("q_proj.weight"):
            value = undo_rope_permutation(value, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            value = undo_rope_permutation(value, config["num_key_value_heads"])
        if not numpy.isfinite(value).all():
            raise BadInput(f"tensor '{tensor.name}' of the GGUF holds values that are not finite")
        weights[name] = numpy.ascontiguousarray(value)
    expected = 2 + len(LAYER_TENSORS) * config["num_hidden_layers"] + ("lm_head.weight" in weights)
    if len(weights) != expected:
        raise BadInput(
            f"the GGUF holds {len(weights)} tensors, a model of {config['num_hidden_layers']} "
            f"layers needs {expected}"
        )
    return weights


def gguf_tokenizer(field: Field) -> tuple[Any, dict[str, Any]]:
    """tokenizer.json (a tokenizers.Tokenizer) and tokenizer_config.json (a dict) of a GGUF with a
    byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    if field("tokenizer.ggml.model") != "gpt2":
        raise BadInput(f"tokenizer '{field('tokenizer.ggml.model')}' is not a byte-level BPE")
    pre = field("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRETOKENIZERS:
        raise BadInput(f"pre-tokenizer '{pre}' is not one of {', '.join(sorted(PRETOKENIZERS))}")
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=field("tokenizer.ggml.add_space_prefix", False), use_regex=True
    )
    steps = (
        [pre_tokenizers.Digits(individual_digits=True)]
        if PRETOKENIZERS[pre]["individual_digits"]
        else []
    )

    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types)
            if kind == TOKEN_CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types)
            if kind == TOKEN_USER_DEFINED
        ]
    )
    if tokenizer.get_vocab_size() != len(tokens):
        raise BadInput(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the GGUF {len(tokens)}"
        )

    def token(kind: str) -> str | None:
        number = field(f"tokenizer.ggml.{kind}_token_id", None)
        return None if number is None else tokens[number]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template", None),
        "added_tokens_decoder": {
            str(i): {
                "content": t,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": kind == TOKEN_CONTROL,
            }
            for i, (t, kind) in enumerate(zip(tokens, types))
            if kind in (TOKEN_CONTROL, TOKEN_USER_DEFINED)
        },
    }
    return tokenizer, {k: v for k, v in config.items() if v is not None}
