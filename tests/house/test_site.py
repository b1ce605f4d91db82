"""The documentation as a site: strictly built, so that no link leads nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reptrt
from tests.support.pages import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    folders = ["-c", "docs/site", "-d", str(out / "doctrees"), "docs", str(out / "html")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *folders], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_on_the_site(site: Path) -> None:
    for page in REPOSITORY.glob("docs/*.md"):
        assert (site / page.name).with_suffix(".html").exists(), page.name


def test_links_between_pages_lead_to_an_anchor_that_exists(site: Path) -> None:
    pages = {page.relative_to(site).as_posix(): page.read_text() for page in site.rglob("*.html")}
    for name, text in pages.items():
        for path, anchor in re.findall(r'href="([^":#]*\.html)?#([^"]+)"', text):
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            assert target in pages, f"{name} links to {target}"
            assert f'id="{anchor}"' in pages[target], f"{name} links to {target}#{anchor}"


def test_the_reference_has_every_name_of_the_package_with_its_options(site: Path) -> None:
    reference = (site / "site/api.html").read_text()
    for name in set(reptrt.__all__) - {"__version__", "PLAIN_INT8"}:
        assert f'id="reptrt.{name}"' in reference, name
    assert "max_overhead" in reference


def test_links_of_the_repository_lead_to_pages_of_the_site(site: Path) -> None:
    assert "README.md" not in (site / "index.html").read_text()
    assert 'href="contributing.html"' in (site / "site/index.html").read_text()
