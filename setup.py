# SPDX-License-Identifier: Apache-2.0
"""Builds the integer engine into wheels, where there is a C++ compiler; all else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_ROOT = Path(__file__).parent
_ENGINE = Path("megatron_bert") / "ibert" / "engine"


class _BuildWithEngine(build_py):
    """Python files, and the library beside its sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # then it is built at first use
            return
        sys.path.insert(0, str(_ROOT))  # for parallel.errors, which imports nothing
        spec = importlib.util.spec_from_file_location("native_library", _ROOT / _ENGINE / "native_library.py")
        assert spec is not None
        assert spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
        try:
            library.build_for_wheel(Path(self.build_lib) / _ENGINE / "native" / library.BUILT_WITH_WHEEL.name)
        except ValueError as error:  # a UserError
            print(f"the wheel has no integer engine, which will be built at first use: {error}")
            return
        self.distribution.engine_is_built = True


class _WheelOfMachine(bdist_wheel):
    """With a library a wheel is for one kind of machine, though for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        if not getattr(self.distribution, "engine_is_built", False):
            return tag
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": _BuildWithEngine, "bdist_wheel": _WheelOfMachine})
