"""Starts the process that holds the model: ``python -m open_pisces.serve.worker FD SETTINGS``, run by `Supervisor`."""

from __future__ import annotations

import json
import logging
import sys

if __name__ == "__main__":
    # Before diffusers imports it: on a CPU it says that a faster kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from open_pisces.serve.work import work

    sys.exit(work(int(sys.argv[1]), json.loads(sys.argv[2])))
