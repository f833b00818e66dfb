"""``python -m pocketlm`` is ``pocketlm``."""

import sys

from pocketlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
