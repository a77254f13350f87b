// What Python hands over (mirrored by library.py), and the vectors that code for one instruction set computes with.
//
// The build defines LEVEL (the symbols' suffix), LANES (floats in a vector), and ROWS and VECS (rows and vectors of codes
// in a register tile).
//
// Scores are to be least: half |a|^2 - z.a for L2, -(z.a + b) for greatest dot products. Codes are reordered by the
// caller; `slot` is a code's place in that order, `id[slot]` its index in the codebook.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((ext_vector_type(LANES)));
typedef int32_t vi __attribute__((ext_vector_type(LANES)));
typedef _Bool vb __attribute__((ext_vector_type(LANES)));

// A prepared codebook: panels of `vectors` vectors of codes, in blocks of up to `block` panels.
typedef struct {
    int64_t num_codes, dim;
    int64_t vectors;           // in a panel: VECS without boxes, BOX_VECS with them
    int64_t panels;            // in all
    int64_t block;             // panels in a block: a cell is one lane of a block
    const float *panel;        // (panels, dim + 1, vectors * LANES): scaled offset, then components; padding is +inf
    const float *error_slope;  // (blocks, and up to a multiple of LANES): float32 score error <= slope * |z| + base
    const float *error_base;   // the same
    int64_t box_groups;        // groups of LANES boxes, each box around a block; 0: no boxes
    const float *boxes;        // (box_groups, dim, 2, LANES) least and greatest components; padding is (+inf, -inf)
    int64_t outer_groups;
    const float *outer;        // (outer_groups, dim, 2, LANES) the same around each group of boxes
    float scale;               // power of two by which rows and codes are multiplied
    float longest_row;         // greatest |scaled z| for which no partial sum of float32 overflows
    const float *codes;        // (num_codes, dim) in slot order, as stored
    const double *offset;      // (num_codes) half |a|^2 or -b, rounded to float64
    const float *bias;         // (num_codes) b in slot order, or null for L2
    const double *wide_slope;  // (num_codes) float64 score error <= slope * |z| + base
    const double *wide_base;   // (num_codes)
    const int64_t *id;         // (num_codes)
} Codebook;

#define BOX_VECS 4
#define MAX_VECS 4

// One instruction each, where none is a NaN.
INLINE vf min(vf a, vf b) { return a < b ? a : b; }

INLINE vf max(vf a, vf b) { return a > b ? a : b; }

INLINE vf load(const float *at) { return *(const vf *)at; }

INLINE float least(vf x) {
    // Halves against halves: a chain over all lanes would take as long as several vectors of codes.
#if LANES == 16
    x = min(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = min(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = min(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = min(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif LANES == 8
    x = min(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = min(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    x = min(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    x = min(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
    x = min(x, __builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
    return x[0];
}

// One bit per lane of a comparison.
INLINE uint32_t bits_of(vi comparison) {
    vb lanes = __builtin_convertvector(comparison, vb);
    uint32_t bits = 0;
    memcpy(&bits, &lanes, sizeof lanes);
    return bits & ((1u << LANES) - 1);
}

INLINE int64_t blocks_of(const Codebook *book) { return (book->panels + book->block - 1) / book->block; }

INLINE int64_t panels_of(const Codebook *book, int64_t b) {
    int64_t left = book->panels - b * book->block;
    return left < book->block ? left : book->block;
}
