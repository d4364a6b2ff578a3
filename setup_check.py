"""Imported first by every script: where the packages are not installed, one line says how to set up, instead of a trace."""

import sys
from importlib.util import find_spec

PACKAGES = ("torch", "numpy", "safetensors", "tqdm")

missing = [name for name in PACKAGES if find_spec(name) is None]
if missing:
    print(f"error: {', '.join(missing)} not installed in {sys.executable}; run `make demo` and then `source .venv/bin/activate`, "
          + "or `pip install -e .` in an environment of your own", file=sys.stderr)
    raise SystemExit(2)
