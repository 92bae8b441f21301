"""The documentation tells the truth: its examples run, its links lead somewhere."""

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
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The job's page is one story told in shell and Python together; its own test runs it as a whole.
TOLD_AS_A_STORY = {"infer.md"}
EXAMPLES = [
    (page.relative_to(ROOT), number, code)
    for page in PAGES
    if page.name not in TOLD_AS_A_STORY
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
    """Makes processes that have imported the package already: most examples take less time than that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "asyncdp._serving", "asyncdp.testing"])
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
    told = (tmp_path / "output").read_text()
    assert process.exitcode == 0, f"example {number} of {page}:\n{told}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of the project names one that exists."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
