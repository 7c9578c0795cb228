"""`python -m tests.simulation`: plays seeds and tells which of them broke a promise."""

import ctypes
import os
import sys

FIXED = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
ADDR_NO_RANDOMIZE = 0x0040000

if os.environ.get("PYTHONHASHSEED") != "0":
    # The order of sets is a part of what a seed stands for: of texts it follows from their hashes, of objects from
    # where they lie in memory.
    if sys.platform == "linux":
        ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    command = [sys.executable, "-m", "tests.simulation", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **FIXED})

from tests.simulation import seam  # noqa: E402

seam.install()

from tests.simulation.command import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
