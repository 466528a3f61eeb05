"""``python -m pipelines.compress RECIPE --out FOLDER``: what ``accelerate launch`` and ``torchrun`` start."""

from __future__ import annotations

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.argv[:] = ["planish", "compress", *sys.argv[1:]]
    main()
