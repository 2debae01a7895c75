"""``python -m dmax_kernels.ring_walk.nap``; its processes could not import a function from here."""

import sys

from dmax_kernels.ring_walk.nap.command import main

if __name__ == "__main__":
    sys.exit(main())
