"""Puts the native CPU kernels into what is built; everything else about the package is in pyproject.toml.

A wheel carries one library for each instruction-set level of the machine that builds it. An editable install compiles
for this machine into the package's folder. Where no compiler works the package is built without: it then compiles on
first use, or computes with torch alone.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "mini_vllm" / "ops" / "cpu"


def load_build_module() -> ModuleType:
    """mini_vllm/ops/cpu/build.py by its path: importing the package would need its dependencies."""
    spec = importlib.util.spec_from_file_location("mini_vllm_kernel_build", KERNELS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """The usual, then the libraries beside the Python files."""

    def run(self) -> None:
        super().run()
        build = load_build_module()
        folder = KERNELS / "lib" if self.editable_mode else Path(self.build_lib) / "mini_vllm" / "ops" / "cpu" / "lib"
        for isa in [build.level_of_machine()] if self.editable_mode else build.levels_of_machine():
            try:
                build.build_library(isa, folder)
            except (build.BuildError, OSError) as error:
                print(f"no native kernels for {isa}: {error}", file=sys.stderr)


class WheelOfAnyPython(bdist_wheel):
    """The libraries are called through ctypes, so a wheel fits every Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Its wheels fit one platform, since there are compiled libraries in them."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfAnyPython}, distclass=PlatformDistribution)
