"""Write the tables of the examples' READMEs from the committed CSV files: `python -m examples.readme_figures`"""

from __future__ import annotations

from pathlib import Path

from examples import learn_mask, mask2former_cost, pairformer
from examples.shared.rows import RESULTS, read
from examples.vos import cost, search
from examples.vos import study as vos_study
from examples.wsss import study as wsss_study

EXAMPLES = Path(__file__).resolve().parent


def put(readme: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    text = readme.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme}: expected one place marked {name}")
    readme.write_text(text[: text.index(begin) + len(begin)] + content + "\n" + text[text.index(end) :])


def tables() -> dict[str, str]:
    """Every table by its name, which is that of its CSV file and of its place in a README."""
    vos_rows = {name: read(RESULTS / f"{name}.csv", vos_study.Row) for name in ("vos_synthetic", "vos_figures", "vos_clip")}
    found = {name: read(RESULTS / f"{name}.csv", search.Found) for name in ("vos_search", "vos_tried")}
    return {
        "learn_mask": learn_mask.table(read(RESULTS / "learn_mask.csv", learn_mask.Row)),
        "pairformer": pairformer.table(read(RESULTS / "pairformer.csv", pairformer.Row)),
        "mask2former_cost": mask2former_cost.table(read(RESULTS / "mask2former_cost.csv", mask2former_cost.Cost)),
        **{name: vos_study.table(rows) for name, rows in vos_rows.items()},
        "vos_synthetic": f"{vos_study.table(vos_rows['vos_synthetic'])}\n\n{vos_study.differences(vos_rows['vos_synthetic'])}",
        "vos_cost": cost.table(read(RESULTS / "vos_cost.csv", cost.Cost)),
        "vos_search": search.table(search.unchanged(vos_rows["vos_synthetic"]) + found["vos_search"]),
        "vos_tried": search.table(found["vos_tried"], "frame0"),
        "wsss_synthetic": wsss_study.table(read(RESULTS / "wsss_synthetic.csv", wsss_study.Row)),
    }


def readme_of(name: str) -> Path:
    """The README that shows this table: that of the folder which the name begins with."""
    folder = EXAMPLES / name.partition("_")[0]
    return (folder if folder.is_dir() else EXAMPLES) / "README.md"


def main() -> None:
    for name, table in tables().items():
        put(readme_of(name), name, table)


if __name__ == "__main__":
    main()
