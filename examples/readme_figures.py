"""Write the tables of the examples' READMEs from the committed CSV files.

    python examples/readme_figures.py
"""

from __future__ import annotations

from pathlib import Path

import learn_mask
import mask2former_cost
import wsss.study
from vos import cost, search, study

HERE = Path(__file__).resolve().parent


def put(readme: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    text = readme.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme}: expected one place marked {name}")
    readme.write_text(text[: text.index(begin) + len(begin)] + content + "\n" + text[text.index(end) :])


def main() -> None:
    results = HERE / "results"
    put(HERE / "README.md", "learn_mask", learn_mask.table(learn_mask.read(results / "learn_mask.csv")))
    put(HERE / "README.md", "mask2former_cost", mask2former_cost.table(mask2former_cost.read(results / "mask2former_cost.csv")))
    for name, module in (("vos_synthetic", study), ("vos_figures", study), ("vos_clip", study), ("vos_cost", cost)):
        put(HERE / "vos" / "README.md", name, module.table(module.read(results / f"{name}.csv")))
    put(HERE / "vos" / "README.md", "vos_search", search_table(results))
    put(HERE / "vos" / "README.md", "vos_tried", search.table(study.read(results / "vos_tried.csv", search.Found), "frame0"))
    put(HERE / "wsss" / "README.md", "wsss_synthetic", wsss.study.table(wsss.study.read(results / "wsss_synthetic.csv")))


def search_table(results: Path) -> str:
    return search.table(search.unchanged(study.read(results / "vos_synthetic.csv")) + study.read(results / "vos_search.csv", search.Found))


if __name__ == "__main__":
    main()
