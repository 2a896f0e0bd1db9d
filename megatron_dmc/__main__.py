"""``python -m megatron_dmc``: the program without its installed script."""

import sys

from megatron_dmc.cli import main

if __name__ == "__main__":
    sys.exit(main())
