"""`python -m fqsweep ...` is the same as `fqsweep ...`."""

from __future__ import annotations

import sys

from fqsweep.main import main

if __name__ == "__main__":
    sys.exit(main())
