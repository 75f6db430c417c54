"""`python -m stackproof` is the same as `stack`."""

import os

from stackproof.distributed.parent import LAUNCHER, end_with_launcher

if __name__ == "__main__":
    if (launcher := os.environ.pop(LAUNCHER, None)) or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher(launcher and int(launcher))
    from stackproof.cli import main

    main()
