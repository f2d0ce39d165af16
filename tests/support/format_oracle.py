"""Reads and writes the formats of models/ with the libraries that define them; called by the C++
tests.

safetensors OURS THEIRS   checks the file that the C++ test wrote, and writes one with the same
                          content
tokens PREFIX             writes a Megatron-LM token file from the format's description
configs DIR               writes config.json files and what Transformers makes of each
"""

import json
import os
import struct
import sys


def safetensors_files(ours, theirs):
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    values = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8 - 3
    expected = {
        "f32": values,
        "bf16": values.to(torch.bfloat16),
        "f16": values.t().contiguous().to(torch.float16),
        "i64": (values * 8).to(torch.int64),
        "u8": torch.arange(7, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }
    read = load_file(ours)
    assert read.keys() == expected.keys(), read.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
    with safe_open(ours, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, file.metadata()
    save_file(expected, theirs, metadata={"format": "pt"})


def tokens(prefix):
    sizes = list(range(100))
    with open(prefix + ".bin", "wb") as file:
        for size in sizes:
            file.write(struct.pack("<H", 600 * size) * size)
    pointers = [2 * sum(sizes[:i]) for i in range(len(sizes))]
    documents = list(range(0, 101, 2))
    with open(prefix + ".idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8))
        file.write(struct.pack("<QQ", len(sizes), len(documents)))
        file.write(struct.pack(f"<{len(sizes)}i", *sizes))
        file.write(struct.pack(f"<{len(sizes)}q", *pointers))
        file.write(struct.pack(f"<{len(documents)}q", *documents))


SIZES = dict(
    vocab_size=160, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6
)
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
CASES = {
    # the fields of the published files, with smaller matrices
    "smollm2": dict(
        model_type="llama",
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000,
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_interleaved=False,
        is_llama_config=True,
        tie_word_embeddings=True,
        initializer_range=0.041666666666666664,
        pretraining_tp=1,
        attention_bias=False,
        attention_dropout=0.0,
    ),
    "llama-defaults": dict(model_type="llama"),
    "llama2": dict(
        model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, rope_scaling=None
    ),
    "llama31": dict(
        model_type="llama",
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dict(rope_type="llama3", **LLAMA3),
    ),
    "llama32": dict(
        model_type="llama",
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        rope_scaling=dict(rope_type="llama3", **(LLAMA3 | dict(factor=32.0))),
    ),
    "llama3-outer-positions": dict(
        model_type="llama",
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        original_max_position_embeddings=4096,
        rope_scaling=dict(rope_type="llama3", **LLAMA3),
    ),
    "llama3-own-positions": dict(
        model_type="llama",
        head_dim=64,
        max_position_embeddings=16384,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=250000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ),
    "new-spelling": dict(
        model_type="llama", rope_parameters=dict(rope_type="default", rope_theta=123456.0)
    ),
    "new-spelling-outer-theta": dict(
        model_type="llama", rope_theta=5e5, rope_parameters=dict(rope_type="linear", factor=3.0)
    ),
    "both-thetas": dict(
        model_type="llama",
        rope_theta=5e5,
        rope_parameters=dict(rope_type="default", rope_theta=20000.0),
    ),
    "both-spellings": dict(
        model_type="llama",
        rope_scaling=dict(rope_type="linear", factor=2.0, rope_theta=30000.0),
        rope_parameters=dict(rope_type="default", rope_theta=20000.0),
    ),
    "both-spellings-one-theta": dict(
        model_type="llama",
        rope_scaling=dict(type="default", rope_type="linear", factor=2.0),
        rope_parameters=dict(rope_type="default", rope_theta=20000.0),
    ),
    "linear": dict(
        model_type="llama", rope_theta=26000, rope_scaling=dict(type="linear", factor=2.5)
    ),
    "llama-biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(
        model_type="mistral",
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=None,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
    ),
    "mistral-long-window": dict(
        model_type="mistral",
        num_key_value_heads=2,
        sliding_window=4096,
        max_position_embeddings=4096,
    ),
    "qwen2": dict(
        model_type="qwen2",
        num_key_value_heads=2,
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=21,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
}


def configs(directory):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, fields in CASES.items():
        folder = os.path.join(directory, name)
        os.makedirs(folder)
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(SIZES | fields, file)
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config)
        layer = model.model.layers[0]
        truth = {
            field: getattr(config, field)
            for field in (
                "vocab_size",
                "hidden_size",
                "num_key_value_heads",
                "max_position_embeddings",
                "rms_norm_eps",
                "initializer_range",
                "tie_word_embeddings",
            )
        }
        truth["head_dim"] = layer.self_attn.head_dim
        truth["rope_theta"] = config.rope_parameters["rope_theta"]
        truth["qkv_bias"] = layer.self_attn.q_proj.bias is not None
        truth["attention_output_bias"] = layer.self_attn.o_proj.bias is not None
        truth["mlp_bias"] = layer.mlp.up_proj.bias is not None
        truth["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        assert model.model.rotary_emb.attention_scaling == 1.0
        save_file(
            {"inv_freq": model.model.rotary_emb.inv_freq.to(torch.float32)},
            os.path.join(folder, "rope.safetensors"),
        )
        with open(os.path.join(folder, "truth.json"), "w") as file:
            json.dump(truth, file)


if __name__ == "__main__":
    {"safetensors": safetensors_files, "tokens": tokens, "configs": configs}[sys.argv[1]](
        *sys.argv[2:]
    )
