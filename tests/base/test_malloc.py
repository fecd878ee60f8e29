import subprocess
import sys

import pytest

TWICE = """
import resource, sys
from isoforward.base.malloc import keep_freed_pages
if sys.argv[1] == "kept":
    keep_freed_pages()
bytearray(1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", TWICE, how], capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_large_block_that_was_freed_is_had_again_without_asking_for_its_pages() -> None:
    assert faults("kept") < faults("given back") / 10
