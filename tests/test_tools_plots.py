"""tools/plots.py, and the documents: pictures are those of their figures, every link leads somewhere."""
from __future__ import annotations

import re

import pytest
from conftest import ROOT

from tools import plots

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "data/README.md", ROOT / "records/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("name", plots.FIGURES)
def test_a_committed_picture_is_what_its_figures_say(name):
    assert (plots.FOLDER / f"{name}.svg").read_text() == plots.draw(name)


def test_a_mean_lies_where_its_value_says(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    (tmp_path / "x.csv").write_text("change,bpb,error\nworse,0.5,0.1\nsame,0.1,0.1\nbetter,-0.5,0.1\n")
    dots = re.findall(r'<circle cx="([\d.]+)" .*class="(\w+)"', plots.intervals("x", "", ""))
    assert [look for _, look in dots] == ["red", "grey", "blue"]
    worse, same, better = (float(x) for x, _ in dots)
    assert (worse - same) / (worse - better) == pytest.approx(0.4, abs=0.01)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_fits_one_sitting_and_every_page_can_be_found_from_it():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, page.name
