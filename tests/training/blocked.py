"""`maxlm` whose data blocks for ever at a data index:  python -m tests.training.blocked INDEX train CONFIG ..."""

from __future__ import annotations

import sys
import time

from maxlm.cli import main
from maxlm.data import loader


def block_at(index: int) -> None:
    read = loader._Batches.__getitem__

    def blocked_read(self, step):
        if int(step) == index:
            wait_for_a_disk_that_never_answers()
        return read(self, step)

    loader._Batches.__getitem__ = blocked_read


def wait_for_a_disk_that_never_answers() -> None:
    time.sleep(1000)


if __name__ == "__main__":
    block_at(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
