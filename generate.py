"""Continue a prompt, one forward pass after another: python generate.py checkpoint=runs/latest prompt="ROMEO:" """

import sys

from isoforward.app.command_line import run
from isoforward.base.config import GenerateConfig


def main(config: GenerateConfig) -> None:
    from isoforward.app.generate import (
        generate,  # a misspelt key is told, and an interrupt heard, before torch is loaded
    )

    generate(config)


if __name__ == "__main__":
    sys.exit(run(main, "generate", GenerateConfig))
