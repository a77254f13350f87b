// What the pass in float32 leaves open, settled: float64 for the codes within its bounds, then twice float64.
#pragma once
#include "layout.h"
#include "scores.h"

#define MAX_CANDIDATES 64

// hi + lo is the score within error; error 0: exactly.
typedef struct {
    double hi, lo, error;
} Expansion;

static inline void add(Expansion *sum, double x) {
    // Error-free since every operation rounds by itself: nothing here is a product and a sum in one expression.
    double s = sum->hi + x, v = s - sum->hi;
    double rounding = (sum->hi - (s - v)) + (x - v);
    double t = sum->lo + rounding, w = t - sum->lo;
    sum->error += fabs((sum->lo - (t - w)) + (rounding - w));
    sum->hi = s;
    sum->lo = t;
}

static inline void add_product(Expansion *sum, double x, double y) {
    double product = x * y, rest = fma(x, y, -product);
    add(sum, product);
    // Products of widened float32 numbers are exact.
    if (rest != 0) add(sum, rest);
    // The rest of a product this small may itself have underflowed.
    if (fabs(product) < 0x1p-960 && x != 0 && y != 0) sum->error = INFINITY;
}

// The score in twice float64's precision (Ogita, Rump, Oishi 2005, with a running bound of what is still dropped).
static Expansion expanded_score(const Codebook *book, const double *z, int64_t slot) {
    Expansion sum = {book->bias ? -(double)book->bias[slot] : 0.0, 0.0, 0.0};
    const float *a = book->codes + slot * book->dim;
    for (int64_t d = 0; d < book->dim; d++) {
        add_product(&sum, -z[d], a[d]);
        if (!book->bias) add_product(&sum, 0.5 * a[d], a[d]);
    }
    // After cancellation the low part may be the larger one: the sum must not assume an order.
    double hi = sum.hi + sum.lo, v = hi - sum.hi;
    Expansion out = {hi, (sum.hi - (hi - v)) + (sum.lo - v), sum.error * (1.0 + 0x1p-40)};
    if (!isfinite(out.hi) || !isfinite(out.lo)) out.error = INFINITY;
    return out;
}

// The codes that could still win one row, each with a lower bound of its score.
typedef struct {
    int64_t count;
    int overflow;
    double upper;  // no winner's score is above this
    int64_t slot[MAX_CANDIDATES];
    double lower[MAX_CANDIDATES];
} Candidates;

static void drop_beaten(Candidates *c) {
    int64_t kept = 0;
    for (int64_t i = 0; i < c->count; i++)
        if (c->lower[i] <= c->upper) {
            c->slot[kept] = c->slot[i];
            c->lower[kept++] = c->lower[i];
        }
    c->count = kept;
}

INLINE void consider(const Codebook *book, const double *z, double norm, int64_t slot, int64_t dim, Candidates *c) {
    const float *a = book->codes + slot * dim;
    double dot[8] = {0};
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8)
        for (int k = 0; k < 8; k++) dot[k] += z[d + k] * (double)a[d + k];
    for (; d < dim; d++) dot[d % 8] += z[d] * (double)a[d];
    double score = book->offset[slot] -
                   (((dot[0] + dot[1]) + (dot[2] + dot[3])) + ((dot[4] + dot[5]) + (dot[6] + dot[7])));
    double error = norm * book->wide_slope[slot] + book->wide_base[slot];
    if (score - error > c->upper) return;
    if (score + error < c->upper) c->upper = score + error;
    if (c->count == MAX_CANDIDATES) drop_beaten(c);
    if (c->count == MAX_CANDIDATES) {
        c->overflow = 1;
        return;
    }
    c->slot[c->count] = slot;
    c->lower[c->count++] = score - error;
}

// The slot of the only code in a cell; -1 if there are several.
INLINE int64_t only_code(const Codebook *book, int64_t b, int lane, const int vectors) {
    int64_t first = b * book->block * vectors, count = panels_of(book, b) * vectors;
    int64_t slot = first * LANES + lane;
    return count == 1 || slot + LANES >= book->num_codes ? slot : -1;
}

INLINE void consider_cell(const Codebook *book, const double *z, double norm, int64_t b, int lane, int64_t dim,
                          const int vectors, Candidates *c) {
    int64_t first = b * book->block * vectors, count = panels_of(book, b) * vectors;
    for (int64_t v = first; v < first + count; v++) {
        int64_t slot = v * LANES + lane;
        if (slot < book->num_codes) consider(book, z, norm, slot, dim, c);
    }
}

// Searches block b again, for a row that may have lanes with more cells within the bounds than are known.
INLINE void consider_block(const Codebook *book, const float *z, const double *wide, const Length *length, float upper,
                           int64_t b, int64_t dim, const int vectors, Candidates *c) {
    vf m[1];
    block_minima(z, book->panel + b * book->block * (dim + 1) * vectors * LANES, panels_of(book, b), dim, 1, vectors, m);
    float error = length->norm * book->error_slope[b] + book->error_base[b];
    uint32_t near = bits_of(m[0] - error <= (vf)upper);
    for (; near && !c->overflow; near &= near - 1)
        consider_cell(book, wide, (double)length->norm / book->scale, b, __builtin_ctz(near), dim, vectors, c);
}

// Among candidates that float64 leaves open: the winner's slot, or -1.
static int64_t expand(const Codebook *book, const double *z, const Candidates *c) {
    Expansion score[MAX_CANDIDATES];
    int64_t best = 0;
    for (int64_t i = 0; i < c->count; i++) {
        score[i] = expanded_score(book, z, c->slot[i]);
        Expansion a = score[i], b = score[best];
        int is_lower_id = book->id[c->slot[i]] < book->id[c->slot[best]];
        if (a.hi < b.hi || (a.hi == b.hi && (a.lo < b.lo || (a.lo == b.lo && is_lower_id)))) best = i;
    }
    Expansion b = score[best];
    for (int64_t i = 0; i < c->count; i++) {
        Expansion a = score[i];
        double gap = (a.hi - b.hi) + (a.lo - b.lo);
        int is_beaten = gap > a.error + b.error + fabs(b.hi) * 0x1p-100;
        int is_equal = a.hi == b.hi && a.lo == b.lo && a.error == 0 && b.error == 0;
        if (!is_beaten && !is_equal) return -1;
    }
    return c->slot[best];
}

typedef struct {
    int64_t rechecked;   // rows with more than one cell within the float32 bounds
    int64_t expanded;    // rows that float64 left open
    int64_t unresolved;  // rows that must be searched by other means
    int64_t not_finite;  // rows with NaN or infinity
} Tally;

// The winner's index, or -1 if the row must be searched by other means.
INLINE int64_t decide(const Codebook *book, const double *wide, Candidates *c, Tally *tally) {
    drop_beaten(c);
    int64_t slot = -1;
    if (!c->overflow && c->count == 1) {
        slot = c->slot[0];
    } else if (!c->overflow && c->count) {
        tally->expanded++;
        slot = expand(book, wide, c);
    }
    if (slot >= 0) return book->id[slot];
    tally->unresolved++;
    return -1;
}
