// The pass in float32: for each row and lane, the least scores of blocks of codes with their error bounds. The winner's
// value is cheaper to find than its index, so no index is kept below a block.
#pragma once
#include "layout.h"

// A row's length, which its error bounds grow with.
typedef struct {
    float norm;     // >= |scaled z|; infinite: too long for float32; NaN: not a row
    double square;  // >= |scaled z|^2
} Length;

// What is known of a row: per lane the two least lower bounds of cells, the block of the first, and the least upper
// bound.
typedef struct {
    vf lower, second, upper;
    vi block;
} Cells;

INLINE void forget(Cells *cells) {
    cells->lower = cells->second = cells->upper = INFINITY;
    cells->block = (vi){0};
}

INLINE void note(Cells *cells, vf lower, vf upper, vi block) {
    vi better = lower < cells->lower;
    cells->upper = min(cells->upper, upper);
    cells->second = min(cells->second, max(lower, cells->lower));
    cells->block = (better & block) | (~better & cells->block);
    cells->lower = min(cells->lower, lower);
}

// Adds what another pass, over other blocks, knows of the same row.
INLINE void merge(Cells *cells, const Cells *other) {
    note(cells, other->lower, other->upper, other->block);
    cells->second = min(cells->second, other->second);
}

// Scales a row to float32, `stride` floats apart, and measures it. A row that is not finite, or is too long, is
// packed as zeros; its norm shows which rows these are.
INLINE Length pack(const Codebook *book, const float *narrow, const double *wide, int64_t dim, float *z, int stride) {
    double square = 0;
    int finite = 1;
    for (int64_t d = 0; d < dim; d++) {
        double x = narrow ? (double)narrow[d] : wide[d];
        finite &= isfinite(x) != 0;
        // Scaled before it is rounded: a subnormal float32 has few bits. What overflows here is a row that is too long.
        x *= book->scale;
        z[d * stride] = (float)x;
        square += x * x;
    }
    // One part in 2^20 covers the roundings of the norm and of its square, the rest what underflows.
    double norm = sqrt(square) * (1 + 0x1p-20) + 0x1p-120;
    if (!finite) norm = NAN;
    else if (!(norm <= book->longest_row)) norm = INFINITY;
    if (!isfinite(norm))
        for (int64_t d = 0; d < dim; d++) z[d * stride] = 0;
    return (Length){(float)norm, finite ? square * (1 + 0x1p-20) + 0x1p-240 : NAN};
}

// Least score of each lane over consecutive panels; z is (dim, rows).
INLINE void block_minima(const float *restrict z, const float *restrict panel, int64_t panels, int64_t dim,
                         const int rows, const int vectors, vf *m) {
    for (int r = 0; r < rows; r++) m[r] = INFINITY;
    for (int64_t s = 0; s < panels; s++) {
        // Keeps the broadcasts of z in the loop, as operands: there are more than registers.
        __asm__("" : "+r"(z));
        vf score[ROWS][MAX_VECS];
        for (int v = 0; v < vectors; v++) {
            vf offset = load(panel + v * LANES);
            for (int r = 0; r < rows; r++) score[r][v] = offset;
        }
        panel += vectors * LANES;
        for (int64_t d = 0; d < dim; d++, panel += vectors * LANES) {
            vf a[MAX_VECS];
            for (int v = 0; v < vectors; v++) a[v] = load(panel + v * LANES);
            for (int r = 0; r < rows; r++) {
                vf x = z[d * rows + r];
                for (int v = 0; v < vectors; v++) score[r][v] -= x * a[v];
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) m[r] = min(m[r], score[r][v]);
    }
}

// Looks at block b for rows that lie as (dim, rows).
INLINE void visit(const Codebook *book, const float *z, const Length *length, int64_t b, int64_t dim, const int rows,
                  const int vectors, Cells *cells) {
    vf m[ROWS];
    block_minima(z, book->panel + b * book->block * (dim + 1) * vectors * LANES, panels_of(book, b), dim, rows, vectors, m);
    for (int r = 0; r < rows; r++) {
        vf error = length[r].norm * book->error_slope[b] + book->error_base[b];
        note(&cells[r], m[r] - error, m[r] + error, (vi){0} + (int32_t)b);
    }
}
