"""Train a GPT, freeze it, serve it, and see what each phase of training and of inference costs.

    python train.py                                          the tiny GPT on Shakespeare, some minutes
    python train.py recipe=fast                              characters, a good loss in a minute or two
    python train.py model=small trainer.max_steps=2000       a larger one
    python train.py data=text data.path='books/*.txt'        your own text
    python train.py trainer.resume=auto                      go on where the newest run stopped
    python train.py -m optim.lr=1e-3,3e-3                    a sweep

optim.lr falls from warm-up on to its share optim.min_lr at the last step: 0.1 is a tenth of it.
Everything goes to one directory, runs/<date>_<time>_train; runs/latest is the newest that finished.
"""

import sys

from isoforward.app.command_line import run
from isoforward.base.config import TrainConfig


def main(config: TrainConfig) -> None:
    from isoforward.app.train import train  # a misspelt key is reported before Lightning is loaded

    train(config)


if __name__ == "__main__":
    sys.exit(run(main, TrainConfig))
