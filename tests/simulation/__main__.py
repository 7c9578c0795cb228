"""`python -m tests.simulation`: plays seeds and tells which of them broke a promise."""

import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is a part of what a seed stands for
    os.execve(
        sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"}
    )

from tests.simulation import seam

seam.install()

from tests.simulation.command import main

sys.exit(main(sys.argv[1:]))
