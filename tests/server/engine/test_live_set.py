"""Names, versions, and what is rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vqserve_server.engine import LiveSet
from vqserve_server.errors import CodebookNotFound, DigestMismatch


def test_the_latest_version_has_the_bare_name(fake: Callable[..., Any]) -> None:
    books = {name: fake(16 + n, name=name) for n, name in enumerate(["b@9", "b@10", "b@2", "a", "c@7"])}
    live = LiveSet(books.values())
    assert [info.name for info in live.infos()] == ["a", "b", "b@2", "b@9", "b@10", "c", "c@7"]
    assert live.resolve("b") is live.resolve("b@10") is books["b@10"]
    assert live.resolve("b@9") is books["b@9"]
    assert live.resolve("c") is books["c@7"]
    digests = {info.name: info.digest for info in live.infos()}
    assert digests["b"] == digests["b@10"] == books["b@10"].info.digest
    assert live.resolve("b", books["b@10"].info.digest) is books["b@10"]
    with pytest.raises(DigestMismatch):
        live.resolve("b", books["b@9"].info.digest)


@pytest.mark.parametrize("name", ["b@8", "b@", "b@09", "b@9 ", "b@-1", "b@../9", "../b", "b/9", "@", "a@1", "B"])
def test_names_that_are_not_served(fake: Callable[..., Any], name: str) -> None:
    live = LiveSet([fake(name="b@9"), fake(name="b@10"), fake(name="a")])
    with pytest.raises(CodebookNotFound, match=r"^no codebook .* is served, only: a, b, b@9, b@10"):
        live.resolve(name)


def test_no_name_is_the_only_codebook_whatever_its_versions(fake: Callable[..., Any]) -> None:
    latest = fake(name="b@10")
    assert LiveSet([fake(name="b@9"), latest]).resolve("") is latest
    with pytest.raises(CodebookNotFound, match="2 codebooks are served, choose one with codebook=: a, b, b@10"):
        LiveSet([latest, fake(name="a")]).resolve("")
    with pytest.raises(CodebookNotFound, match="no codebook is served"):
        LiveSet([]).resolve("")
