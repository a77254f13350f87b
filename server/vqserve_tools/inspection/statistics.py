"""Statistics of a codebook on latents, measured by what serves it, and kept in its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vqserve_server.codebooks import Codebook, save_codebook
from vqserve_server.codebooks.statistics import StatisticsTally
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools.latents.rows import LatentRows
from vqserve_tools.progress import progress_of

_ELEMENTS_AT_ONCE = 1 << 22
_MOST_ROWS_AT_ONCE = 1 << 16


def with_statistics(codebook: Codebook, rows: LatentRows, source: str, *, progress: bool = False) -> Codebook:
    """Encode all rows, as a server does, and return the codebook with how often each code was chosen, and the error.

    Args:
        codebook: codebook from a file; statistics that it has are replaced.
        rows: latents.
        source: what the latents are, for people.
        progress: whether to show progress on stderr.

    Raises:
        InvalidShape: the latents have another channel count, or no tokens.
        NonFiniteLatents: the latents hold NaN or infinity, or their projection overflows float32.
    """
    from vqserve_tools.inspection.fit import check_latents  # noqa: PLC0415

    check_latents(rows, codebook.quantizer)
    tokenizer = Tokenizer.of_codebook(codebook, name="codebook")
    tally = StatisticsTally(tokenizer.code_groups)
    info, done = tokenizer.info, 0
    widest = max(info.input_dim, info.code_dim, info.output_dim)
    with progress_of("measuring statistics", len(rows), "token", shown=progress) as bar:
        for chunk in rows.chunks(max(1, min(_MOST_ROWS_AT_ONCE, _ELEMENTS_AT_ONCE // widest))):
            with rows.placed(done):
                indices = tokenizer.encode_rows(chunk).reshape(len(chunk), -1)
            tally.add(indices, None if tokenizer.errors is None else tokenizer.errors.of(chunk, indices))
            done += len(chunk)
            bar.update(len(chunk))
    return replace(codebook, statistics=tally.statistics(source))


def save_codebook_again(codebook: Codebook, path: Path) -> None:
    """Write a codebook over the file that it was read from, with the statistics that it has now; the digest stays.

    Args:
        codebook: as it was read, but for its statistics.
        path: the file; if it is a link, the file that it leads to is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    save_codebook(codebook.quantizer, path.resolve(), provenance=codebook.provenance, statistics=codebook.statistics)
