"""What contributors are told: pre-commit, `make lint`, .ci/run and the workflows run the same checks, files named are there, issue forms
ask for what a report needs.
"""

import re
import subprocess
from pathlib import Path

import pytest
import yaml  # pre-commit brings it

pytestmark = pytest.mark.promise("documentation")
ROOT = Path(__file__).resolve().parents[2]


def test_pre_commit_runs_what_make_lint_runs():
    checks = re.search(r"^lint: (.*?)  ##", (ROOT / "Makefile").read_text(), re.M)[1].split()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^ +entry: make -o \.venv/smattn\.stamp (\S+)$", hooks, re.M) == checks
    assert re.findall(r"repo: (.*)", hooks) == ["local"] and hooks.count("language: system") == len(checks)  # works offline


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_THERE = {
    "kernels/map_weights.py",  # the walk-through adds it
    "bench/skipping.py",  # a study that only the history has
    "bench/tile_skipping.py",
}


def test_files_that_the_pages_name_are_there():
    named = {name for page in PAGES for name in re.findall(r"`([\w./]+\.(?:py|cpp|h|cu|md|toml|csv|so))`", page.read_text())}
    folders = ("bench", "csrc", "docs", "examples", "kernels", "smattn", "tests")
    there = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    there += [f"/{path.name}" for path in ROOT.glob("*.*")]
    built = {"smattn/_cpu.so", "smattn/_cuda.so"}
    missing = {name for name in named - built if not any(path.endswith(f"/{name}") for path in there)}
    assert len(named) > 20 and missing == NOT_THERE


def test_commands_that_the_pages_name_are_there():
    text = "\n".join(page.read_text() for page in PAGES)
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    made = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, re.M))
    assert "bench" in made and made <= set(targets)
    modules = set(re.findall(r"python -m ((?:bench|smattn)[\w.]*)", text))
    files = {module: ROOT / module.replace("smattn.kernels", "kernels").replace(".", "/") for module in modules}
    assert "smattn" in files
    assert {name for name, at in files.items() if not (at.with_suffix(".py").exists() or (at / "__main__.py").exists())} == set()


def steps_of(workflow: str, job: str) -> list[dict[str, str]]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"][job]["steps"]


def test_the_workflows_run_what_anybody_can_run():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = yaml.safe_load(text)
    assert set(workflow[True]) == {"pull_request", "push", "schedule", "workflow_dispatch"}  # YAML 1.1 reads `on` as a boolean
    for job, event, command in (("fast", "pull_request", ".ci/run fast"), ("everything", "schedule", ".ci/run")):
        assert f"'{event}'" in workflow["jobs"][job]["if"]
        assert [step["run"] for step in steps_of("ci.yml", job) if "run" in step] == [command]


def test_only_a_tag_publishes_and_only_what_was_built_and_tried():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["needs"] == "build" and "ref_type == 'tag'" in jobs["publish"]["if"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "permissions" not in jobs["build"]
    commands = "\n".join(step.get("run", "") for step in steps_of("release.yml", "build"))
    assert commands.index("make wheel") < commands.index("-m smattn") and "cpu: available" in commands


def test_a_release_refuses_a_tag_that_is_not_the_version():
    (check,) = (step["run"] for step in steps_of("release.yml", "build") if "tag" in step.get("name", ""))
    version = re.search(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    codes = [subprocess.run(["bash", "-c", check], cwd=ROOT, env={"GITHUB_REF_NAME": tag}).returncode for tag in (f"v{version}", "v99.0")]
    assert codes == [0, 1]


def test_a_mistyped_mode_of_ci_run_runs_nothing():
    result = subprocess.run([ROOT / ".ci" / "run", "fats"], capture_output=True, text=True, timeout=20)
    assert result.returncode == 2 and "usage: .ci/run [fast | everything]" in result.stderr and result.stdout == ""


@pytest.mark.parametrize("form, asks", [("bug", ("python -m smattn", "strides", "backend=")), ("feature", ("formula",))])
def test_issue_forms_are_well_formed_and_ask_for_what_is_needed(form, asks):
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text()
    content = yaml.safe_load(text)
    assert {"name", "description", "body"} <= set(content) and all(what in text for what in asks)
    names = [field["id"] for field in content["body"]]
    assert len(set(names)) == len(names) and {field["type"] for field in content["body"]} <= {"textarea", "input", "dropdown"}
    assert all(field["attributes"]["label"] for field in content["body"])
