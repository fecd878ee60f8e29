"""Continue a prompt, one forward pass after another.

    python generate.py prompt="ROMEO:"                                   from the newest training run
    python generate.py checkpoint=runs/latest prompt="ROMEO:" temperature=0
    python generate.py prompt="ROMEO:" explain=true max_new_tokens=10    every pass, with what it computed
    python generate.py prompt="ROMEO:" explain=html max_new_tokens=20    the same as a page, with the model in it
    python generate.py prompts_file=prompts.txt                          a prompt a line, served as one batch
    python generate.py checkpoint=DIR chat=true prompt="Who was Yorick?" in the model's own chat template
    python generate.py prompt="ROMEO:" logprobs=true                     a JSON line a token, with its log-probability
    python generate.py checkpoint=BIG draft=SMALL draft_tokens=4         a smaller model proposes, BIG decides
    python generate.py prompt="ROMEO:" exact=true logprobs=true          the bits of training's forward, at a price

checkpoint is an export, a run directory or a training checkpoint. Text goes to stdout, figures to stderr.
temperature=0 takes the likeliest token. top_k and top_p narrow the choice; repetition_penalty=1.2 makes tokens that
were used already less likely; stop ends the text where it appears. add_special_tokens=false leaves out what the
tokenizer itself adds to a prompt; with parse_special=true a prompt can spell special tokens. cache=false runs the whole
text through the forward again for every token. precision=int8 rounds the weights to 8 bits, which changes the forward.
compile=true decodes through a compiled step; the first time, compiling takes up to a minute.
"""

import sys

from isoforward.app.command_line import run
from isoforward.base.config import GenerateConfig


def main(config: GenerateConfig) -> None:
    from isoforward.app.generate import generate  # a misspelt key is reported before torch is loaded

    generate(config)


if __name__ == "__main__":
    sys.exit(run(main, GenerateConfig))
