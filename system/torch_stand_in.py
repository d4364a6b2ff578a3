"""`--help` in a fraction of a second: modules and classes that stand in for torch while a script only prints what it can do.

A help text is made of dataclasses, which lie beside the code that reads them, and that code imports torch. So the script is
run as ever, with `import torch` answered by names without content, as documentation builders do: a name may be a base class,
an annotation, a decorator, a default, and be passed on. Whoever asks it for a value, a truth or a number (a config that
computes with torch) does need torch: the process starts again as it was called, with torch itself. So what is printed is
the same, and only sooner.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any

AGAIN = "MULTISTREAM_WITH_TORCH"
ABSENT = "triton"                    # optional: import fails, as where it is not installed


def start_again(*_: Any) -> Any:
    """Run the command anew, with torch itself."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {AGAIN: "1"})


def member(owner: Any, name: str) -> Any:
    """An attribute of a stand-in, made when it is first asked for. No device is looked at."""
    if name.startswith("__"):
        raise AttributeError(name)
    made = (lambda: False) if name in ("is_available", "is_built") else StandIn(name, (), {})
    setattr(owner, name, made)
    return made


class StandIn(type):
    """The metaclass of every name of the stand-in."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        decorated = len(args) == 1 and not named and isinstance(args[0], (types.FunctionType, type)) and not isinstance(args[0], StandIn)
        return args[0] if decorated else StandIn(cls.__name__, (), {})

    __getattr__ = member
    __bool__ = __len__ = __iter__ = __int__ = __float__ = __index__ = __str__ = __repr__ = __format__ = start_again
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __neg__ = start_again
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __getitem__ = __contains__ = __enter__ = __exit__ = start_again


class Module(types.ModuleType):
    __getattr__ = member


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import torch` and `import torch.x.y`."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] == ABSENT:
            raise ModuleNotFoundError(f"{name} is not needed for a help text", name=name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torch" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run: what a module holds is made when it is asked for."""


def install() -> None:
    """From here on torch is a stand-in, unless this process was started again for its sake."""
    if AGAIN not in os.environ and "torch" not in sys.modules:
        sys.meta_path.insert(0, Finder())
