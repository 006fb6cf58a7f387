"""What all pages share: one base with its head and foot, names that must be there, nothing from elsewhere."""

import re

import jinja2
import pytest

from pipelines.report.environment import TEMPLATES, render_page

BASE = TEMPLATES / "report" / "base.html.jinja"
SHARED = ("base.html.jinja", "macros.html.jinja")
PAGES = sorted(path for path in TEMPLATES.rglob("*.html.jinja") if path.name not in SHARED)


def render(**more) -> str:
    return render_page("report/base.html.jinja", kind="sweep", fingerprint="0123abcd", config_yaml="a: <b>", **more)


def test_every_page_says_product_kind_fingerprint_date_packages_machines_and_configuration():
    page = render(machines=("two <big> machines",))
    head = re.search(r"<header.*?</header>", page, re.DOTALL)
    assert head
    for part in ("<b>OTPrune</b> sweep", "fingerprint 0123abcd"):
        assert part in head[0]
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", head[0])
    assert re.search(r"Python [\d.]+, otprune \S+, torch ", page)
    assert "two &lt;big&gt; machines" in page
    assert "<pre>a: &lt;b&gt;</pre>" in page


def test_every_page_extends_the_base_and_keeps_its_own_style_to_a_few_lines():
    assert len(PAGES) == 5
    for page in PAGES:
        text = page.read_text()
        assert text.startswith('{% extends "report/base.html.jinja" %}'), page
        assert "<style" not in text, page
        own = re.search(r"{% block style %}(.*?){% endblock %}", text, re.DOTALL)
        assert own is None or len(own[1].strip().splitlines()) <= 5, page


def test_the_pages_use_no_class_that_the_style_sheet_does_not_know():
    known = set(re.findall(r"\.([a-z]+)\b", BASE.read_text()))
    for page in [*PAGES, TEMPLATES / "report" / "macros.html.jinja"]:
        text = page.read_text()
        own = re.search(r"{% block style %}(.*?){% endblock %}", text, re.DOTALL)
        mine = known | set(re.findall(r"\.([a-z]+)\b", own[1] if own else ""))
        used = {name for names in re.findall(r'class="([a-z ]+)"', text) for name in names.split()}
        assert used <= mine, page


def test_the_style_has_a_dark_form_and_one_for_print_and_nothing_from_elsewhere():
    page = render()
    assert "@media screen and (prefers-color-scheme: dark)" in page
    assert "@media print" in page
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)


def test_a_name_that_a_page_does_not_get_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render_page("sweep/sweep.html.jinja", kind="sweep", fingerprint="", config_yaml="")
