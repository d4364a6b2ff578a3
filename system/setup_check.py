"""Imported first by every script: where the packages are not installed, one line says how to set up, instead of a trace.

It also shortens the start: a help text is printed without torch, and the garbage collector waits until all is imported.
"""

import gc
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from system import torch_stand_in


def stopped(*_: object) -> None:
    """Ctrl-C while packages are still imported, some of which would swallow it, is one line; options.exit_on_error takes over."""
    print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    os._exit(130)


OURS = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]   # not where a test or somebody's program imports us
if OURS:
    signal.signal(signal.SIGINT, stopped)
PACKAGES = ("torch", "numpy", "safetensors", "tqdm")

missing = [name for name in PACKAGES if find_spec(name) is None]
if missing:
    print(f"error: {', '.join(missing)} not installed in {sys.executable}; run `make demo` and then `source .venv/bin/activate`, "
          + "or `pip install -e .` in an environment of your own", file=sys.stderr)
    raise SystemExit(2)

if OURS:
    gc.disable()                                             # what is imported stays; options.exit_on_error enables it again
    if not sys.argv[1:] or "--help" in sys.argv[1:]:
        torch_stand_in.install()
