"""The console's files: complete, of the server alone, and without code that the policy would refuse."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin

from vqserve_server import page
from vqserve_server.page import HEADERS, page_files

FOLDER = Path(page.__file__).parent


def test_every_file_has_a_url_and_a_type():
    files = page_files()
    names = {path.name for path in FOLDER.iterdir() if path.suffix not in {".py", ""}}
    assert files.keys() == {"/"} | {f"/page/{name}" for name in names if name != "index.html"}
    assert {file.content_type for file in files.values()} == {
        "text/html; charset=utf-8",
        "text/css; charset=utf-8",
        "text/javascript; charset=utf-8",
        "image/svg+xml",
    }
    assert all(file.body for file in files.values())


def test_what_a_file_refers_to_is_there():
    files = page_files()
    answered = {*files, "/metrics", "/codebooks.json"}
    for path, file in files.items():
        text = file.body.decode()
        found = re.findall(r'(?:src|href)="([^"#]+)"|from "([^"]+)"', text)
        assert [link for pair in found for link in pair if link and urljoin(path, link) not in answered] == []


def test_nothing_is_from_elsewhere():
    for path, file in page_files().items():
        text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert re.findall(r"https?:|@import|url\(", text) == [], path


def test_no_code_or_style_is_within_the_html():
    html = page_files()["/"].body.decode()
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", html) == []


def test_no_script_writes_html_or_runs_text():
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    for path, file in page_files().items():
        assert re.findall(forbidden, file.body.decode()) == [], path


def test_the_policy_allows_the_page_s_own_files_only():
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert {value for name, value in policy.items() if name.endswith("-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
