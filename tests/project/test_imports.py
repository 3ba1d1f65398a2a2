"""A fresh process can import and run smattn without Triton and without the compiled extension."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import smattn
from smattn.library import CPU, why_not_loaded

pytestmark = pytest.mark.promise("installs")
RUN = """
import torch
q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
mask = torch.rand(1, 3, 5, requires_grad=True)
smattn.soft_masked_attention(q, k, v, mask, 2.0).sum().backward()
assert mask.grad.shape == mask.shape
"""


def fresh(code, **environment):
    """The output of `code` in a process of its own, without this suite's TRITON_INTERPRET."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    result = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_smattn_imports_neither_triton_nor_the_kernels():
    code = "import sys, smattn, smattn.testing; print([m for m in sys.modules if m.split('.')[0] == 'triton' or 'smattn.kernels' in m])"
    assert fresh(code) == "[]"


def test_a_call_on_the_cpu_imports_no_triton_either():
    code = f"import sys, warnings, smattn; warnings.simplefilter('ignore')\n{RUN}\nprint('triton' in sys.modules)"
    assert fresh(code) == "False"


def test_without_triton_everything_else_works_and_the_reason_is_said():
    code = "import sys; sys.modules['triton'] = None\nimport warnings, smattn; warnings.simplefilter('ignore')" + RUN
    said = fresh(code + "print(smattn.backends()['triton'])")
    assert "available=False" in said and "could not be imported" in said and "triton" in said


def test_without_the_extension_everything_else_works_and_the_reason_is_said():
    code = "import warnings, smattn, smattn.cpu, pathlib; warnings.simplefilter('ignore')\n"
    code += "smattn.cpu.LIBRARY = smattn.cpu.LIBRARY._replace(path=pathlib.Path('/nonexistent/_cpu.so'))" + RUN
    said = fresh(code + "print(smattn.backends()['cpu'])")
    assert "available=False" in said and "was not built" in said and "pip install" in said


def test_a_source_folder_that_is_not_built_says_what_it_is(tmp_path):
    """Python that is started in a clone finds that folder before what is installed, which may well be built."""
    (tmp_path / "setup.py").touch()
    said = why_not_loaded(CPU._replace(path=tmp_path / "smattn" / "_cpu.so"))[0]
    assert f"{tmp_path} is the source folder" in said and "start Python elsewhere" in said and said.endswith("--no-build-isolation -e .")


def test_a_folder_installed_in_place_is_to_be_installed_again(tmp_path, monkeypatch):
    """Python finds that folder wherever it is started, so to start it elsewhere would change nothing."""
    source, installed = tmp_path / "a clone", tmp_path / "smattn-0.1.0.dist-info"
    source.mkdir(), installed.mkdir()
    (source / "setup.py").touch()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: smattn\nVersion: 0.1.0\n")
    (installed / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}}))  # as pip writes it
    monkeypatch.syspath_prepend(tmp_path)
    said = why_not_loaded(CPU._replace(path=source / "smattn" / "_cpu.so"))[0]
    assert "elsewhere" not in said and f"in place from {source}" in said and said.endswith("--no-build-isolation -e .")


def test_without_either_the_reference_runs_and_warns():
    code = "import sys; sys.modules['triton'] = sys.modules['smattn.cpu'] = None\nimport warnings, smattn\n"
    code += "with warnings.catch_warnings(record=True) as caught:\n    warnings.simplefilter('always')"
    code += RUN.replace("\n", "\n    ") + "\nprint(*(w.message for w in caught))"
    said = fresh(code)
    assert said.count("smattn runs on the reference") == 1 and "cpu: it could not be imported" in said


def test_triton_on_a_cpu_says_how_to_interpret_it():
    said = fresh("import smattn; print(smattn.backends()['triton'])", CUDA_VISIBLE_DEVICES="")
    assert "available=False" in said and "TRITON_INTERPRET=1" in said


def test_the_public_names():
    assert sorted(smattn.__all__) == ["__version__", "attention_map", "backends", "nn", "soft_masked_attention"]
    assert all(hasattr(smattn, name) for name in smattn.__all__) and smattn.__version__ == version("smattn")


def test_nothing_else_is_public_but_modules_of_the_package():
    code = "import smattn; print(*(name for name, it in vars(smattn).items() if getattr(it, '__name__', '') != f'smattn.{name}'))"
    others = {name for name in fresh(code).split() if not name.startswith("_")}
    assert others == set(smattn.__all__) - {"__version__", "nn"}


@pytest.mark.parametrize("module", ["testing", "cpu", "cuda", "reference", "ops", "flops", "distributed", "integrations"])
def test_a_module_imports_alone(module):
    assert fresh(f"import smattn.{module}; print('fine')") == "fine"
