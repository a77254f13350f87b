"""Every option that a message of the importer suggests is followed: it works, or it leads to the next question."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vqserve_tools import cli
from vqserve_tools.importing.commands import add_import_parser

CODES = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
MASK = np.array([4, 2, 1])

_PARSER = argparse.ArgumentParser()
add_import_parser(_subparsers := _PARSER.add_subparsers())
_FLAGS = _subparsers.choices["import"]._option_string_actions
# Where a run of options ends in a sentence.
_END = re.compile(r"[,;:](?=\s|$)|\s\(|\)|\s(?:or|and|for|is|has|are|to|in|imports|makes|changes|shows|lists|alone)\s")


def suggested(text: str) -> list[list[str]]:
    """Return the runs of complete options in a message: the words of each."""
    found = []
    for piece in _END.split(text):
        start = re.search(r"(?:^|\s)--[a-z]", piece)
        if start is None:
            continue
        words = shlex.split(piece[start.start() :])
        try:
            list(_by_flag(words))
        except ValueError:
            # An option without its value is only mentioned.
            continue
        if words not in found and words[0] != "--dry-run":
            found.append(words)
    return found


def _by_flag(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    at = 0
    while at < len(words):
        flag, end = words[at], at + 1
        action = _FLAGS[flag]
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        values = list(words[at + 1 : end])
        least, most = {None: (1, 1), 0: (0, 0), "+": (1, len(values))}.get(action.nargs, (action.nargs, action.nargs))
        if not least <= len(values) <= most:
            raise ValueError(flag)
        yield flag, values
        at = end


def removed(text: str) -> list[str]:
    """Return the flags that a message asks to leave out."""
    match = re.search(r"leave out ((?:--[a-z-]+(?: and )?)+)", text)
    return match[1].split(" and ") if match else []


def followed(flags: list[tuple[str, list[str]]], words: list[str]) -> list[tuple[str, list[str]]]:
    """Return the options of a command after a suggestion: an option of one value is replaced."""
    added = list(_by_flag(words))
    names = {flag for flag, _ in added}
    replaced = {flag for flag in names if flag != "--accept-left"}
    if names & {"--key", "--prefix"}:
        replaced |= {"--key", "--prefix"}
    return [pair for pair in flags if pair[0] not in replaced] + added


def state(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {name.replace("__", "."): array for name, array in arrays.items()}


def codebook(at: str, codes: np.ndarray = CODES) -> dict[str, np.ndarray]:
    return {f"{at}embed": codes, f"{at}embed_avg": codes, f"{at}cluster_size": np.ones(len(codes), np.float32)}


def encodec(at: str, count: int = 3) -> dict[str, np.ndarray]:
    return {n: a for i in range(count) for n, a in codebook(f"{at}layers.{i}._codebook.", CODES + i).items()}


def linear(at: str, outputs: int = 4, inputs: int = 4) -> dict[str, np.ndarray]:
    return {f"{at}.weight": np.ones((outputs, inputs), np.float32), f"{at}.bias": np.ones(outputs, np.float32)}


def both(at: str, outer: int, inner: int) -> dict[str, np.ndarray]:
    return linear(f"{at}project_in", inner, outer) | linear(f"{at}project_out", outer, inner)


NESTED = {f"rq.vq_layers.{i}.embedding.weight": CODES + i for i in range(3)}
SCENARIOS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "unnamed": ({"": CODES}, ""),
    "unnamed_with_a_key": ({"": CODES}, "--key a"),
    "unnamed_stack": ({"": np.stack([CODES, CODES])}, "--metric l2"),
    "unnamed_fsq": ({"": CODES}, "--kind fsq --levels 8,5"),
    "unnamed_columns": ({"": CODES.T.copy()}, "--metric l2"),
    "any_names": ({"a": CODES, "b": CODES + 1}, ""),
    "odd_names": ({"my codes": CODES, "it's": CODES + 1}, ""),
    "likely_names": ({"net.vq.weight": CODES, "net._ema_w": CODES, "lm.weight": CODES}, ""),
    "taming": (state(quantize__embedding__weight=CODES, quant_conv__weight=CODES), ""),
    "taming_elsewhere": (state(vq__embedding__weight=CODES, vq__used=np.arange(3)), ""),
    "weight_norm": ({"q.embedding.weight_g": np.ones((1, 4), "f4"), "q.embedding.weight_v": CODES}, ""),
    "stages": (NESTED, ""),
    "one_stage": (NESTED, "--key rq.vq_layers.1.embedding.weight --metric l2"),
    "no_such_key": (NESTED, "--key nowhere"),
    "no_such_prefix": (NESTED, "--prefix nowhere"),
    "stack": ({"q.codebooks": np.stack([CODES, CODES + 1])}, ""),
    "stack_by_key": ({"q.codebooks": np.stack([CODES, CODES + 1])}, "--key q.codebooks --metric l2"),
    "two_models": ({f"{at}.{n}": a for at in ("model", "ema") for n, a in encodec("vq.").items()}, ""),
    "two_metrics": ({f"{at}.quantize.embedding.weight": CODES for at in ("a", "b")}, ""),
    "columns": ({"q.embed": CODES.T.copy(), "q.cluster_size": np.ones(10, "f4")}, "--key q.embed --metric l2"),
    "rows": ({"q.embed": CODES, "q.cluster_size": np.ones(10, "f4")}, "--key q.embed --metric l2 --transpose"),
    "columns_of_a_family": (
        {"vq.layers.0._codebook.embed": CODES.T.copy(), "vq.layers.0._codebook.cluster_size": np.ones(10, "f4")},
        "",
    ),
    "square": ({"q.embed": CODES[:4]}, "--key q.embed --metric l2"),
    "lucidrains": ({"_codebook.embed": CODES[None], **both("", 6, 4)}, ""),
    "lucidrains_by_dot": ({"_codebook.embed": CODES[None]}, "--metric dot"),
    "lucidrains_normalized": ({"_codebook.embed": CODES[None]}, "--metric cosine --decode normalized"),
    "unknown_key": (encodec("vq.") | {"vq.layers.0.norm.weight": CODES}, ""),
    "many_unknown_keys": (encodec("vq.") | {f"vq.layers.0.mlp.{i}.weight": CODES for i in range(20)}, ""),
    "outer_projection": (encodec("quantizer.vq.") | both("quantizer.", 6, 4), ""),
    "many_left": (encodec("quantizer.vq.") | {f"quantizer.up.{i}.w": CODES for i in range(20)}, ""),
    "one_quantizer_of_a_list": (encodec("quantizer.0.") | encodec("quantizer.1."), ""),
    "encodec_by_cosine": (encodec("vq."), "--metric cosine"),
    "encodec_decode": (encodec("vq."), "--decode raw"),
    "encodec_levels": (encodec("vq."), "--levels 8,8"),
    "encodec_kind": (encodec("vq."), "--kind vq"),
    "encodec_groups": (encodec("vq."), "--groups"),
    "encodec_accepts_nothing": (encodec("vq."), "--accept-left vq.norm.*"),
    "llamagen": (state(quantize__embedding__weight=CODES, quantize__codebook_used=np.ones(5)), ""),
    "llamagen_raw": (state(quantize__embedding__weight=CODES, quantize__codebook_used=np.ones(5)), "--decode raw"),
    "average_of_a_model": (
        {"quantize.embedding.weight": CODES, "model_ema.quantizeembeddingweight": CODES, "model_ema.encoderw": CODES},
        "--metric l2",
    ),
    "one_group": ({"q.embed": CODES}, "--key q.embed --metric l2 --groups"),
    "running_sum": ({"vq._embedding.weight": CODES, "vq._ema_w": CODES}, "--key vq._ema_w --metric l2"),
    "no_codes": ({"encoder.w": np.ones(3, np.float32)}, ""),
    "fsq": (both("quantizer.", 6, 3), "--kind fsq"),
    "fsq_twice": (both("a.", 6, 3) | both("b.", 6, 3), "--kind fsq --levels 8,5,5"),
    "fsq_in_parts": (both("rvqs.0.", 6, 3) | both("rvqs.1.", 6, 3), "--kind fsq --levels 8,5,5"),
    "fsq_metric": (both("quantizer.", 6, 3), "--kind fsq --levels 8,5,5 --metric l2"),
    "fsq_of_codes": (encodec("vq."), "--kind fsq --levels 8,5,5"),
    "lfq": ({"encoder.w": CODES}, "--kind lfq"),
    "lfq_mask": ({"lfq.mask": MASK}, "--kind lfq"),
}


def run(capsys, source: Path, flags: list[tuple[str, list[str]]]) -> tuple[int, str, str]:
    words = [word for flag, values in flags for word in (flag, *values)]
    try:
        status = cli.main(["import", str(source), "--dry-run", *words])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_suggestion_works(tmp_path, capsys, name):
    arrays, words = SCENARIOS[name]
    source = tmp_path / ("m.npy" if "" in arrays else "m.pt")
    if "" in arrays:
        np.save(source, arrays[""])
    else:
        torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, source)
    todo, seen, works = [(list(_by_flag(words.split())), "")], set(), 0
    while todo:
        flags, before = todo.pop()
        command = str(flags)
        if command in seen:
            continue
        seen.add(command)
        assert len(seen) < 300, "the suggestions do not come to an end"
        status, out, err = run(capsys, source, flags)
        if status == 0:
            works += 1
            notes = [line for line in out.splitlines() if line.startswith("note  ")]
            todo += [(followed(flags, more), out) for note in notes for more in suggested(note)]
            continue
        assert status == 1, f"wrong usage after {before!r}: {err}"
        assert err != before, f"the same question again: {err}"
        text = err.removeprefix(f"vqserved: error: {source.name}: ")
        dropped = removed(text)
        nexts = [followed(flags, more) for more in suggested(text) if more[0] not in dropped]
        if dropped:
            nexts.append([pair for pair in flags if pair[0] not in dropped])
        nexts = [pairs for pairs in nexts if pairs != flags]
        assert nexts, f"no way on after {before!r}: {err}"
        todo += [(pairs, err) for pairs in nexts]
    assert works


def test_suggestions_are_found_in_a_sentence():
    text = "pass --metric l2 or --metric cosine; --levels is needed, for example --levels 8,5 (or --key 'a b' --groups)"
    assert suggested(text) == [
        ["--metric", "l2"],
        ["--metric", "cosine"],
        ["--levels", "8,5"],
        ["--key", "a b", "--groups"],
    ]
