"""Entry point of `python -m raftune`."""

import sys

from raftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
