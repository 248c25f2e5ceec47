"""``python -m gpseq`` is the command ``gpseq``."""

import sys

from gpseq.cli import main

if __name__ == "__main__":
    sys.exit(main())
