"""Weights of one format in another: `isoforward import` and `isoforward gguf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from isoforward.base.errors import Refusal
from isoforward.base.terminal import print_what_can_be_encoded
from isoforward.formats.export import export
from isoforward.formats.gguf_tokenizer import why_not
from isoforward.formats.gguf_writing import write_gguf
from isoforward.formats.loading import load_export

COMMANDS = {
    "import": ("DIRECTORY_OR_GGUF", "Turns a Transformers directory or a GGUF file into an export."),
    "gguf": (
        "EXPORT",
        "Writes an export, or anything that import takes, as one GGUF file for llama.cpp. Weights keep their dtype, "
        "norms and biases are in fp32. The tokenizer goes along where llama.cpp reads text as it does.",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    print_what_can_be_encoded()
    parser = argparse.ArgumentParser(prog="isoforward", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (source, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.add_argument("source", type=Path, metavar=source)
        command.add_argument("out", type=Path, metavar="OUT")
    asked = parser.parse_args(arguments)
    reason = None
    try:
        model, tokenizer = load_export(asked.source)
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


if __name__ == "__main__":
    sys.exit(main())
