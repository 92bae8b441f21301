"""The documentation is true: its examples run, its links and the files it names exist."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import re
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# The job's page is one story of shell and Python together; tests/infer/test_docs.py runs it as a whole.
# Programs with Ray run in the one cluster of tests/ray/test_cluster.py.
RUN_ELSEWHERE = {ROOT / "docs" / "infer.md", ROOT / "docs" / "ray.md"}
EXAMPLES = [
    (page.relative_to(ROOT), number, code)
    for page in PAGES
    if page not in RUN_ELSEWHERE
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S), 1)
]


def run_example(code: str, folder: Path) -> None:
    """Be the program; called in a process of its own."""
    os.chdir(folder)
    warnings.simplefilter("error")
    with (folder / "output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        try:
            exec(compile(code, "example", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            raise


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Return what makes processes with torch imported: most examples take less time than that import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "asyncdp.testing"])
    return context


@pytest.mark.parametrize(
    ("page", "number", "code"), EXAMPLES, ids=[f"{page}-{number}" for page, number, _ in EXAMPLES]
)
def test_examples_run(
    page: Path,
    number: int,
    code: str,
    tmp_path: Path,
    processes: multiprocessing.context.ForkServerContext,
) -> None:
    """Every Python example is a whole program that runs without a warning."""
    process = processes.Process(target=run_example, args=(code, tmp_path))
    process.start()
    process.join(50)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, f"example {number} of {page}:\n{output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """Every link to a file of the project names one that exists."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_sections(page: Path) -> None:
    """Every link to a section names a heading that is there."""
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text())
    missing = [
        (file, name) for file, name in links if name not in headings(page.parent / file if file else page)
    ]
    assert not missing


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent.name != "results"],  # those name what a past commit had
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_named_files_exist(page: Path) -> None:
    """Every script and test that a page names is there."""
    named = set(re.findall(r"(?<![\w/.-])(?:\./)?((?:scripts|tests)/[\w/-]+(?:\.\w+)?)", page.read_text()))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


def headings(page: Path) -> set[str]:
    """Return the names under which a page's headings can be linked to."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
