"""The build backend: this repository is used where it lies, so there is an editable install and nothing else.

`pip install -e .` brings the dependencies (setuptools does it); a wheel, an sdist or a plain `pip install .` would hold no code.
"""

from setuptools.build_meta import build_editable, get_requires_for_build_editable, prepare_metadata_for_build_editable

__all__ = ["build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
           "get_requires_for_build_wheel", "prepare_metadata_for_build_editable"]


def refuse(*_: object, **__: object) -> None:
    raise SystemExit("multistream is used as a checkout: clone the repository and run  pip install -e .  in it")


build_wheel = build_sdist = get_requires_for_build_wheel = get_requires_for_build_sdist = refuse
