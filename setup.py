"""The optional part of the build: native/ becomes runtime/_kernels*.so where a compiler allows.

Everything else is in pyproject.toml. Without the library the wheel is pure Python; with it the wheel
is for this platform, but for any Python 3: the library does not use Python's interface.
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

COMPILER = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")[0]
BUILDS = (
    sys.platform == "linux"
    and platform.machine() in ("x86_64", "AMD64")  # the kernels are written in AVX-512
    and shutil.which(COMPILER) is not None
)

KERNELS = Extension(
    "vlm_edge.runtime._kernels",
    sources=[str(path) for path in sorted(Path("native").glob("*.cpp"))],
    depends=[str(path) for path in sorted(Path("native").glob("*.h"))],
    language="c++",
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-fvisibility=hidden",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-Wl,-s"],
    py_limited_api=True,  # names it _kernels.abi3.so: one file for every Python
    optional=True,  # a compiler that fails is a warning
)


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(ext_modules=[KERNELS] if BUILDS else [], cmdclass={"bdist_wheel": AnyPython})
