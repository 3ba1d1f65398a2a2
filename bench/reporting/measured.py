"""Write every published figure from result files: `python -m bench.reporting.measured [bench/results/FILE.jsonl ...]`

docs/measured.md has all of them between its markers, those of CPUs and those of GPUs, and README.md six rows (readme_figures.py) of the
machine that ran last; of several on one day, of the one that stands last on the page. The files given take the place of those that the page
shows of the same machine, and the files of other machines stay. Without a file the page is written again from those that it shows.
examples/wsss/README.md has the table of the newest token-maps file.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.gpu import targets
from bench.measuring.machine import ROOT, published
from bench.reporting.readme_figures import kernels_are_forced, with_readme_figures
from bench.reporting.rows import BOTH, CEILINGS, COPY, FORWARD, MATMUL, Row, read, result_file
from bench.reporting.tables import DISTURBED, Duel, between, disturbed, duels, markdown, mib, ms, times
from bench.studies import token_maps, variants

PAGE = ROOT / "docs" / "measured.md"
DATE = len("YYYY-MM-DD")
CPU, GPU = between("figures"), between("gpu figures")
NO_GPU = "No run on a GPU has been made yet; `make gpu` makes one.\n"
INTRODUCTION = """Medians in ms of the backend that smattn takes, beside the fastest of its peers in the same run: plain PyTorch eager and
compiled, SDPA with the materialised bias, compiled FlexAttention (on a CPU forward only). "Both" is forward and backward with every
gradient: of query, key, value, mask and alpha, which only of a bias is the constant 1. Memory is its peak beyond inputs, outputs and
gradients. Cold cache: the caches are emptied before each call.
"""


def files_shown(page: str, marked: re.Pattern[str] = CPU) -> list[str]:
    """The result files, relative to the repository's root, that the page's block was made from."""
    block = marked.search(page)
    return re.findall(r"rows: \[.*?\]\(\.\./(bench/results/\S+\.jsonl)\)", block[0]) if block else []


def machine(file: str) -> str:
    return read(ROOT / file)[0].device


def to_show(shown: list[str], given: list[str]) -> list[str]:
    """Of each machine the files given, or those shown where none are. The machines keep their order."""
    anew = {machine(file) for file in given}
    files = [file for file in shown if machine(file) not in anew] + given
    order = list(dict.fromkeys(machine(file) for file in [*shown, *given]))
    return sorted(files, key=lambda file: order.index(machine(file)))


def of_the_newest(runs: list[str]) -> list[str]:
    """The runs of the machine that ran last with the kernels that it takes by itself, by the dates that files' names begin with."""
    newest = max((file for file in reversed(runs) if not kernels_are_forced(file)), key=lambda file: Path(file).name[:DATE], default="")
    return [file for file in runs if machine(file) == machine(newest)]


def with_figures(page: str, files: list[str]) -> str:
    """The page with the figures of runs on CPUs, machine by machine."""
    parts = [INTRODUCTION]
    for name in dict.fromkeys(map(machine, files)):
        own = [file for file in files if machine(file) == name]
        runs = list(filter(is_a_run, own))
        parts += [f"### {name}\n", *(section(file, with_plot=file == runs[0]) for file in runs)]
        parts += [of_study(file) for study, of_study in STUDIES.items() for file in own if study in file]
    return CPU.sub(lambda _: "\n".join(parts if files else []), page)


def with_gpu_figures(page: str, files: list[str]) -> str:
    """The page with the figures of runs on GPUs."""
    sections = [next((of for study, of in STUDIES.items() if study in file), gpu_section)(file) for file in files]
    parts = [INTRODUCTION, *(f"### {machine(file)}\n\n{text}" for file, text in zip(files, sections, strict=True))]
    return GPU.sub(lambda _: "\n".join(parts) if files else NO_GPU, page)


def gpu_section(file: str) -> str:
    """One run on a GPU: its section, and what became of the targets."""
    what = " ".join((targets.__doc__ or "").splitlines()[2:])
    return f"{section(file, with_plot=True)}\n**Targets on an H200, and this run.** {what}\n\n{targets.table(read(ROOT / file))}\n"


def is_a_run(file: str) -> bool:
    """Whether bench.run wrote it, and no study."""
    return not any(study in file for study in STUDIES)


def is_on_a_gpu(file: str) -> bool:
    return any(row.workload == COPY for row in read(ROOT / file))


def section(file: str, with_plot: bool = False) -> str:
    """One run: its table, its plot, and where they come from."""
    rows, stem = read(ROOT / file), file.removesuffix(".jsonl")
    about, duel_of, busy = rows[0], duels(rows), {key.inputs for key in disturbed(rows)}
    by_inputs: dict[str, dict[str, Duel]] = {}
    for key, duel in duel_of.items():
        by_inputs.setdefault(key.inputs, {})[key.direction] = duel
    header = ["", "forward, ms", "best peer", "speedup", "both, ms", "best peer", "speedup", "extra MiB", "least peer"]
    body = [line(name + " †" * (name in busy), of.get(FORWARD), of.get(BOTH)) for name, of in by_inputs.items()]
    ours = ", ".join(dict.fromkeys(duel.ours.backend for duel in duel_of.values()))
    kernels = f" with {about.kernels.partition(':')[0]} kernels" if about.kernels else ""
    rates = ", ".join(f"{row.flops / row.median_ms / 1e6:.0f} {row.dtype}" for row in rows if row.workload == MATMUL and row.median_ms)
    plot = f"![Time of every contestant](../{stem}-time.png)\n\n" if with_plot else ""
    return f"""**{ours}**{kernels}, torch {about.versions["torch"]}; torch.mm in the same run: {rates} GFLOP/s.

{markdown(header, body)}

{note(rows)}{plot}{source(about, file)}
"""


def sweep_section(file: str) -> str:
    """Time and memory against the number of keys: the plot, and where its lines end."""
    rows = [row for row in read(ROOT / file) if row.workload not in CEILINGS]
    ends = []
    for Nq in dict.fromkeys(row.shape[2] for row in rows):
        duel = [duel for duel in duels(rows).values() if duel.ours.shape[2] == Nq][-1]
        fastest, smallest = duel.fastest, duel.smallest
        if fastest and smallest:
            ends.append(
                f"{Nq} queries and {duel.ours.shape[3]} keys: {ms(duel.ours.median_ms)} ms and {mib(duel.ours.extra_bytes)} MiB, "
                f"the best peers {ms(fastest.median_ms)} ms ({fastest.backend}) and {mib(smallest.extra_bytes)} MiB ({smallest.backend})."
            )
    return f"""**More keys**: forward and backward of {rows[0].shape[1]} heads of size {rows[0].shape[4]}. {" ".join(ends)}

![Time and memory against the number of keys](../{file.removesuffix(".jsonl")}.png)

{source(rows[0], file)}
"""


def variants_section(file: str) -> str:
    """The call in its variants: the table, and where it comes from."""
    rows = read(ROOT / file)
    return f"""**Variants**, {rows[0].dtype}: what else a call may be, beside plain PyTorch that does the same.

{variants.table(rows)}

{note(rows)}{source(rows[0], file)}
"""


STUDIES = {"-nk-sweep": sweep_section, "-variants": variants_section}  # by what the name of a study's file has in it


def note(rows: list[Row]) -> str:
    """What † means, where a row has it."""
    busy = f"† The machine was busy: torch.mm was over {DISTURBED} times slower around this cell than at its best.\n\n"
    return busy if disturbed(rows) else ""


def source(about: Row, file: str) -> str:
    report = Path(file).with_suffix(".md")
    return f"By `{about.command}` at commit {about.commit}; [report](../{report}); rows: [{Path(file).name}](../{file})."


def line(label: str, forward: Duel | None, both: Duel | None) -> list[str]:
    smallest = both.smallest if both else None
    memory = [mib(both.ours.extra_bytes) if both else "–", f"{mib(smallest.extra_bytes)} {smallest.backend}" if smallest else "–"]
    return [label, *times(forward), *times(both), *memory]


def main(given: list[str]) -> None:
    page, readme = PAGE.read_text(), ROOT / "README.md"
    if CPU.search(page) is None or GPU.search(page) is None:
        sys.exit(f"{PAGE.name} does not have the four markers <!-- figures: begin -->, ... <!-- gpu figures: end -->")
    on_cpus, on_gpus = ([file for file in given if is_on_a_gpu(file) is gpu] for gpu in (False, True))
    cpu_files, gpu_files = to_show(files_shown(page), on_cpus), to_show(files_shown(page, GPU), on_gpus)
    PAGE.write_text(with_gpu_figures(with_figures(page, cpu_files), gpu_files))
    runs = list(filter(is_a_run, gpu_files or cpu_files))
    readme.write_text(with_readme_figures(readme.read_text(), of_the_newest(runs)))
    examples = ROOT / "examples" / "wsss" / "README.md"
    maps = max(published("*-token-maps.jsonl"))
    examples.write_text(between("token_maps").sub(lambda _: token_maps.section(maps, "../../bench/results") + "\n", examples.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=result_file, metavar="FILE")
    try:
        given = [str(file.relative_to(ROOT)) for file in parser.parse_args().files]
    except ValueError as error:  # The page links to them.
        parser.error(f"{error}")
    main(given)
