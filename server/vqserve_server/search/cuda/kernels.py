"""The CUDA kernels, in Triton: imported only where they are compiled or interpreted, because it needs Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "num_codes", "dim"])
def nearest(  # noqa: PLR0917
    rows,
    norms,
    codes,
    offset,
    slope,
    base,
    winners,
    is_open,
    count,
    num_codes,
    dim,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_CODES: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
):
    """Find, for BLOCK_ROWS rows, the code of greatest upper bound; mark rows where another code could win."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < count
    norm = tl.load(norms + row, mask=is_row, other=0.0)
    first = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(0, num_codes, BLOCK_CODES):
        code = start + tl.arange(0, BLOCK_CODES)
        is_code = code < num_codes
        score = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.float32)
        for begin in range(0, dim, BLOCK_DIM):
            k = begin + tl.arange(0, BLOCK_DIM)
            z = tl.load(rows + row[:, None] * dim + k[None, :], mask=is_row[:, None] & (k < dim)[None, :], other=0.0)
            a = tl.load(codes + code[None, :] * dim + k[:, None], mask=is_code[None, :] & (k < dim)[:, None], other=0.0)
            # TensorFloat-32 would exceed the error bound.
            score += tl.dot(z, a, input_precision="ieee")
        error = norm[:, None] * tl.load(slope + code, mask=is_code, other=0.0)[None, :]
        error += tl.load(base + code, mask=is_code, other=0.0)[None, :]
        upper = score + tl.load(offset + code, mask=is_code, other=float("-inf"))[None, :] + error
        # A bound that overflowed is NaN; infinity instead leaves the row undecided.
        upper = tl.where(upper == upper, upper, float("inf"))  # noqa: PLR0124
        best = tl.max(upper, axis=1)
        place = tl.argmax(upper, axis=1)
        runner_up = tl.max(tl.where(tl.arange(0, BLOCK_CODES)[None, :] == place[:, None], float("-inf"), upper), axis=1)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(first, best))
        winner = tl.where(best > first, start + place, winner)
        first = tl.maximum(first, best)
    error = norm * tl.load(slope + winner, mask=is_row, other=0.0) + tl.load(base + winner, mask=is_row, other=0.0)
    # first - 2 * error is the winner's lower bound; the slack of the bounds covers its rounding.
    settled = second < first - 2 * error
    tl.store(winners + row, winner.to(tl.int64), mask=is_row)
    tl.store(is_open + row, (~settled).to(tl.int8), mask=is_row)
