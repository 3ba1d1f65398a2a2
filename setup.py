"""The package map, and a build_ext that hands the work to CMake. Sources and flags live in CMakeLists.txt alone."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # an older one fails at pyproject.toml, without a word on its age
    sys.exit(f"building smattn needs setuptools 77 or newer, here is {setuptools.__version__}: pip install -U setuptools")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HOME = os.environ.get("SMATTN_HOME", "").rstrip("/")  # of the repository, https://...; a release sets it
# Tools that pip put beside this interpreter come first, whether or not the environment is activated.
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find(*names: str) -> str | None:
    return next(filter(None, (shutil.which(name, path=SEARCH_PATH) for name in names)), None)


def missing_tools() -> list[str]:
    """The two absences that an installation forgives: what cannot be built is then not there, and smattn.backends() says so."""
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    needed = {f"a C++ compiler ({', '.join(compilers)})": compilers, "CMake (cmake)": ["cmake"]}
    return [what for what, names in needed.items() if find(*names) is None]


class CMakeBuild(build_ext):
    def run(self) -> None:
        missing = missing_tools()
        if missing:
            self.warn(f"the C++ extension of smattn is NOT built, not found: {', '.join(missing)}. All else is installed.")
            self.extensions = []
        if self.inplace:  # an older build would not match the sources
            for name in ("smattn._cpu", "smattn._cuda"):
                Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        cmake, generator = str(find("cmake")), "Ninja" if find("ninja") else "Unix Makefiles"
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            sys.exit("building smattn needs torch: pip install torch, then smattn with --no-build-isolation")
        folder = ROOT / "build" / generator.replace(" ", "-").lower()  # kept, so that a later build compiles only what changed
        # The cache remembers an earlier build's compiler, and its ninja, which pip has deleted with the environment of that build.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["-S", str(ROOT), "-B", str(folder), "-G", generator, f"-DTORCH_ROOT={Path(torch.origin).parent}"]
        options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        environment = {**os.environ, "PATH": SEARCH_PATH}
        for arguments in (
            [*configure, "-DCMAKE_BUILD_TYPE=Release", *options],
            ["--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
            ["--install", str(folder), "--prefix", str(package)],
        ):
            if subprocess.run([cmake, *arguments], env=environment).returncode:
                sys.exit("the C++ extension of smattn does not build: CMake's last words above say why")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in the name: it holds no Python symbol


class OnlyWhatIsBuilt(build):
    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # or what an earlier build left there would be installed as well
        super().run()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def readme() -> str:
    """README.md for an index page, where a link within the repository would lead nowhere: each leads to HOME."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not HOME:
        return text
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\g<1>{HOME}/raw/HEAD/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\g<1>{HOME}/blob/HEAD/", text)


def urls() -> dict[str, str]:
    of_home = {"Source": HOME, "Documentation": f"{HOME}/blob/HEAD/docs/index.md", "Issues": f"{HOME}/issues"} if HOME else {}
    return {"Paper": "https://arxiv.org/abs/2206.00182", **of_home}


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    packages=[
        "smattn", "smattn.distributed", "smattn.integrations", "smattn.testing",
        "smattn.kernels", "smattn.kernels.primitives", "smattn.kernels.tools",
    ],  # fmt: skip
    package_dir={"smattn": "smattn", "smattn.kernels": "kernels"},
    package_data={"smattn": ["py.typed"], "smattn.kernels": ["tiles.csv"]},
    ext_modules=[Extension("smattn._cpu", sources=[])],
    cmdclass={"build": OnlyWhatIsBuilt, "build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
