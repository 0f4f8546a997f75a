"""The process that speaks HTTP holds no model, and loads no library for one."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import open_pisces.serve.run, open_pisces.cli.serve, open_pisces.files
print({"torch", "transformers", "diffusers"} & set(sys.modules))
"""


def test_the_http_process_loads_no_pytorch() -> None:
    assert subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True).stdout == "set()\n"
