"""python generate.py checkpoint=runs/latest prompt="ROMEO:" """

import sys

from isoforward.config import GenerateConfig
from isoforward.entry import run
from isoforward.generate import generate

if __name__ == "__main__":
    sys.exit(run(generate, "generate", GenerateConfig))
