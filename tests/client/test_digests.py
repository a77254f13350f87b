"""A digest is an address: it finds the codebook that has it, whatever its name and version."""

from __future__ import annotations

import numpy as np
import pytest

from vqserve_client import CodebookNotFound, DigestMismatch, InvalidOption, VqserveError
from vqserve_client.cli import main

A, B, C = "a" * 64, "b" * 64, "a" * 12 + "c" * 52


@pytest.fixture
def server(serve_tiny, codes):
    """One that serves `cat`, whose latest version is 2, and `dog`; the digests A and C begin alike."""

    def book(name, digest, seed, version=None):
        one = codes(name, seed=seed)
        one.info = type(one.info)(**{**vars(one.info), "digest": digest, "version": version})
        return one

    return serve_tiny(
        book("cat", B, 2, version=2), book("cat@1", A, 1, version=1), book("cat@2", B, 2, version=2), book("dog", C, 3)
    )


@pytest.mark.parametrize(
    ("digest", "name"), [(A, "cat@1"), (B, "cat@2"), (B[:8], "cat@2"), (C, "dog"), (A[:13], "cat@1"), (C[:20], "dog")]
)
def test_a_digest_alone_finds_the_codebook(server, connect, latents, digest, name):
    array = latents(5, 4)
    expected = server.codes[name].encode(array)
    assert (connect(server.target, digest=digest).encode(array) == expected).all()
    client = connect(server.target)
    assert (client.encode(array, digest=digest) == expected).all()
    (indices,) = client.encode_many([array], digest=digest)
    assert (indices == expected).all()
    assert {request.codebook for request in server.requests} == {name}
    assert {request.expected_digest for request in server.requests} == {server.codes[name].info.digest}


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (
            {"digest": "a" * 12},
            InvalidOption,
            f"digest {'a' * 12!r} is the beginning of several digests, use more digits: cat@1 {A}, dog {C}",
        ),
        (
            {"digest": "d" * 8},
            CodebookNotFound,
            f"no codebook with digest 'dddddddd' is served, only: cat {B}, cat@1 {A}, cat@2 {B}, dog {C}",
        ),
        (
            {"codebook": "cat", "digest": A},
            DigestMismatch,
            f"codebook 'cat' has digest {B}, not {A!r}, which is that of codebook 'cat@1'",
        ),
        ({"codebook": "cat", "digest": "d" * 64}, DigestMismatch, f"codebook 'cat' has digest {B}, not {'d' * 64!r}"),
        (
            {"codebook": "cow", "digest": C},
            CodebookNotFound,
            "no codebook 'cow' is served, only: cat, cat@1, cat@2, dog",
        ),
    ],
)
def test_errors_say_who_has_what(server, connect, latents, options, kind, text):
    with pytest.raises(VqserveError) as caught:
        connect(server.target).encode(latents(5, 4), **options)
    assert type(caught.value) is kind
    assert caught.value.message == text
    assert caught.value.target == server.target
    # Names a codebook to try wherever one has the digest.
    holder = {A: "cat@1", C: "dog"}.get(options["digest"])
    assert caught.value.suggestion == ({} if holder is None else {"codebook": holder})
    assert f'codebook="{holder}"' in str(caught.value) or holder is None


def test_a_prefix_beside_a_name_is_checked(server, connect, latents):
    client = connect(server.target, codebook="cat", digest=B[:9])
    assert client.encode(latents(5, 4)).shape == (5,)
    with pytest.raises(DigestMismatch, match="not 'aaaaaaaaa'"):
        client.encode(latents(5, 4), digest="a" * 9)


def test_the_latest_version_moves_on_and_the_digest_stays(server, connect, latents):
    """As when version 3 is loaded: what has the digest is found again by its version."""
    client = connect(server.target, digest=B)
    expected = client.encode(latents(5, 4))
    server.replace("cat", digest="e" * 64, version=3)
    assert (client.encode(latents(5, 4)) == expected).all()


def test_a_codebook_that_gets_another_name_is_found_again(server, connect, latents):
    client = connect(server.target, digest=C)
    expected = client.encode(latents(5, 4))
    moved = server.codes.pop("dog")
    moved.info = type(moved.info)(**{**vars(moved.info), "name": "hound"})
    server.codes["hound"] = moved
    assert (client.encode(latents(5, 4)) == expected).all()


def test_the_command_line(server, latents, tmp_path, capsys):
    source, out = str(tmp_path / "in.npy"), tmp_path / "out.npy"
    np.save(source, latents(5, 4))
    command = ["encode", source, "-o", str(out), "--target", server.target]
    assert main([*command, "--digest", C[:16]]) == 0
    assert f"codebook dog, digest {C}" in capsys.readouterr().err
    assert (np.load(out) == server.codes["dog"].encode(np.load(source))).all()
    assert main([*command, "--force", "--digest", A, "--codebook", "dog"]) == 1
    assert "pass --codebook cat@1" in capsys.readouterr().err
    assert main([*command, "--force", "--digest", "a" * 8]) == 1
    assert "--digest 'aaaaaaaa' is the beginning of several digests" in capsys.readouterr().err
