"""Documents out of text, JSON and JSON lines, and their split into parts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from drrl_prepare.files import BadInput, say


def document_of(value: Any, where: str) -> str:
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


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error}") from error


def read_documents(path: Path | str) -> list[str]:
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


def parse_split(text: str) -> dict[str, float]:
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


def split_documents(documents: list, split: dict[str, float], seed: int) -> dict[str, list]:
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
