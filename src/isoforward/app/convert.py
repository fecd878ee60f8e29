"""Weights of one format in another: `isoforward import` and `isoforward gguf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from isoforward.base.errors import BadInput, Refusal
from isoforward.base.terminal import print_what_can_be_encoded
from isoforward.formats.export import export
from isoforward.formats.gguf_tokenizer import why_not
from isoforward.formats.gguf_writing import write_gguf
from isoforward.formats.loading import export_of, load_export

COMMANDS = {
    "import": (
        "DIRECTORY_OR_GGUF",
        "a Transformers directory, a safetensors file beside its config.json, or a GGUF file",
        "the directory",
        "Turns a Transformers directory or a GGUF file into an export, which every command takes as checkpoint=.",
    ),
    "gguf": (
        "EXPORT",
        "an export, a run's directory, or anything that import takes",
        "the file",
        "Writes an export as one GGUF file for llama.cpp. Weights keep their dtype, "
        "norms and biases are in fp32. The tokenizer goes along where llama.cpp reads text as it does.",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    print_what_can_be_encoded()
    parser = argparse.ArgumentParser(prog="isoforward", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (source, takes, gives, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.add_argument("source", type=Path, metavar=source, help=takes)
        command.add_argument("out", type=Path, metavar="OUT", help=f"{gives} to write; it must not be there yet")
    asked = parser.parse_args(arguments)
    reason = None
    try:
        refuse_taken(asked.out)
        model, tokenizer = load_export(export_of(asked.source))
        if asked.command == "import":
            export(model, asked.out, tokenizer=tokenizer, about={"imported_from": asked.source.name})
        else:
            reason = why_not(tokenizer)
            write_gguf(model, asked.out, tokenizer=None if reason else tokenizer)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    print(f"{asked.out}: {sum(p.numel() for p in model.parameters()):,} parameters in {model.dtype}")
    if reason:
        print(f"without its tokenizer, which llama.cpp does not have: {reason}. It takes token ids alone")
    return 0


def refuse_taken(out: Path) -> None:
    """Weights are not written over others without being asked to."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput(f"{out} is there already; choose another place, or remove it first")


if __name__ == "__main__":
    sys.exit(main())
