"""The documentation site: built without a warning, with links to the repository where its address is known."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agra.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md"))
pytest.importorskip("mkdocs")


def build(root, site, **environment):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment or None)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that the site is built from."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "mkdocs.yml", root)
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    return root


def test_builds_strictly(checkout, tmp_path):
    done = build(checkout, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/reference/index.html").read_text()
    for name in ("agra.api.train", "agra.types.Observation", "agra.methods.method.MethodConfig.needs"):
        assert f'id="{name}"' in page
    assert "tests/test_second_method.py" in (tmp_path / "site/tutorials/method/index.html").read_text()


def test_a_broken_link_fails(checkout, tmp_path):
    page = checkout / "docs/install.md"
    text = page.read_text()
    page.write_text(text + "\n[nowhere](nowhere.md)\n")
    try:
        done = build(checkout, tmp_path / "site")
    finally:
        page.write_text(text)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr


def test_links_lead_to_the_repository_where_it_is_known():
    sys.path.insert(0, str(ROOT / "docs/site"))
    import hooks

    class Page:
        class file:
            src_uri = "tutorials/method.md"

    class Config:
        repo_url = ""

    text = "See [a test](../../tests/test_api.py) and [data](../data.md)."
    assert hooks.on_page_markdown(text, page=Page, config=Config, files=None) == "See a test and [data](../data.md)."
    Config.repo_url = "https://example.org/agra/"
    linked = hooks.on_page_markdown(text, page=Page, config=Config, files=None)
    assert "[a test](https://example.org/agra/blob/main/tests/test_api.py)" in linked


def test_every_file_that_a_page_links_to_exists():
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_command_of_the_tutorials_exists():
    lines = [
        line
        for page in ROOT.glob("docs/tutorials/*.md")
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if re.match(r"(\S*python -m agra\.cli|torchrun .* -m agra\.cli|agra) \w", line)
    ]
    assert len(lines) >= 15
    for line in lines:
        words = shlex.split(line.split("#")[0])
        place = words.index("agra.cli") if "agra.cli" in words else words.index("agra")
        assert words[place + 1] in COMMANDS, line
