"""Token files in Megatron's format: made of text, inspected, decoded."""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drrl_prepare.documents import parse_json, parse_split, read_documents, split_documents
from drrl_prepare.files import (
    TEXT_VERSION,
    BadInput,
    already_made,
    say,
    sha256,
    sizes,
    write_atomically,
)

INDEX_MAGIC = b"MMIDIDX\x00\x00"
TYPE_CODES = {"uint16": 8, "int32": 4}
NARROW_VOCABULARY = 65500  # Megatron's limit for uint16


def load_tokenizer(model: Path | str) -> Any:
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


def vocabulary_of(path: Path) -> dict[str, Any]:
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


def vocabulary_note(model: Path | str) -> dict[str, Any]:
    """What drrl's programs compare with the tokenizer of their model before they take the ids for
    its words."""
    path = Path(model) / "tokenizer.json"
    return {"tokenizer": str(path), **vocabulary_of(path)}


def read_fields(path: Path) -> dict[str, Any]:
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


def end_of_document(model: Path | str, tokenizer: Any, eod: str | None) -> tuple[str, int]:
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


def write_token_file(prefix: Path | str, documents: Iterable, dtype: str, note: dict) -> None:
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


def command_text(options: argparse.Namespace) -> None:
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


def read_token_file(prefix: Path | str) -> tuple[Any, Any]:
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


def command_inspect(options: argparse.Namespace) -> None:
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


def command_decode(options: argparse.Namespace) -> None:
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
