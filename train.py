"""Train a GPT, export it, compare both its lives, write the report: python train.py [overrides]"""

import sys

from isoforward.app.command_line import run
from isoforward.base.config import TrainConfig


def main(config: TrainConfig) -> None:
    from isoforward.app.train import train  # a misspelt key is told before Lightning is loaded

    train(config)


if __name__ == "__main__":
    sys.exit(run(main, "train", TrainConfig))
