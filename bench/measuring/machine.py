"""Where a run happens: the device, the commit, and where results go."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
# What holds torch and its libraries to the instruction set of CPU kernels that are forced, as a processor would that has no wider ones.
HELD_TO = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def on_a_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def device(text: str) -> str:
    """The type of an option --device. Of several GPUs CUDA_VISIBLE_DEVICES says which: clocks and meters are of the first."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch finds no GPU here")
    return text


def name_of(dtype: torch.dtype) -> str:
    """ "float32", say."""
    return str(dtype).removeprefix("torch.")


def describe_device(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads and torch's instruction set.

    Family and model tell generations apart that a virtual machine calls by one name, as "AMD EPYC".
    """
    if on_a_gpu(device):
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        about = dict(re.findall(r"^(model name|cpu family|model)[ \t]*:[ \t]*(.*\S)", lines.read(), re.MULTILINE))
    name = about.get("model name", platform.machine())
    if about.keys() >= {"cpu family", "model"}:
        name += f" (family {about['cpu family']}, model {about['model']})"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


def describe_commit() -> str:
    """The commit, with + where what is measured differs from it; "unknown" outside a repository."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "smattn", "kernels", "csrc", "bench/*.py")
        return _git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def committed(path: Path) -> bool:
    """Whether git keeps this file. A published figure may come from it."""
    try:
        return bool(_git("ls-files", "--", str(path), folder=path.parent))
    except (OSError, subprocess.CalledProcessError):  # There is no git, no repository or no such folder.
        return False


def published(pattern: str) -> list[Path]:
    """The files of bench/results with such a name that git keeps; outside a clone all, for an sdist has no others."""
    try:
        return [ROOT / name for name in _git("ls-files", f"bench/results/{pattern}").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return sorted(RESULTS.glob(pattern))


def _git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
