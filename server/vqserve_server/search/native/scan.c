// The CPU's exact search: one pass in float32 that keeps error bounds, then float64 and twice float64 for the few codes
// that the bounds leave open. docs/exact-search.md derives the bounds and explains the order of work.
//
// Compiled once per instruction set; the build defines LEVEL (the symbols' suffix), LANES (floats in a vector), ROWS and
// VECS (rows and vectors of codes in a register tile).
//
// Scores are to be least: half |a|^2 - z.a for L2, -(z.a + b) for greatest dot products. Codes are reordered by the
// caller; `slot` is a code's place in that order, `id[slot]` its index in the codebook.
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, LEVEL)
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
#define MIN(a, b) __builtin_elementwise_min(a, b)
#define MAX(a, b) __builtin_elementwise_max(a, b)
#define WIDTH (VECS * LANES)  // codes in a panel
#define TILE_GROUPS 8         // groups of ROWS rows that share a block of panels while it is in cache
#define MAX_DIM 1024
#define MAX_CANDIDATES 64
#define MAX_BOXES 4096

// A prepared codebook. Mirrored by library.py.
typedef struct {
    int64_t num_codes, dim;
    int64_t steps;             // panels
    int64_t block;             // panels in a block: a cell is one lane of a block
    const float *panels;       // (steps, dim + 1, WIDTH): scaled offset, then scaled components; padding is +inf
    const float *error_slope;  // (blocks): float32 score error <= slope * |z| + base
    const float *error_base;   // (blocks)
    const float *boxes;        // (blocks, dim, 2) bounds of the scaled codes, or null: no pruning
    float scale;               // power of two by which rows and codes are multiplied
    float longest_row;         // greatest |scaled z| for which no partial sum of float32 overflows
    const float *codes;        // (num_codes, dim) in slot order, as stored
    const double *offset;      // (num_codes) half |a|^2 or -b, rounded to float64
    const float *bias;         // (num_codes) b in slot order, or null for L2
    const double *wide_slope;  // (num_codes) float64 score error <= slope * |z| + base
    const double *wide_base;   // (num_codes)
    const int64_t *id;         // (num_codes)
} Codebook;

// What one call leaves to its caller. Mirrored by library.py.
typedef struct {
    int64_t capacity;      // of pairs
    int64_t pairs;         // written
    int64_t *pair_row;     // a row that is still open ...
    int64_t *pair_code;    // ... and a code that could win it
    int64_t *rescan_row;   // (n) rows that must be searched by other means
    int64_t rescans;
    int64_t rechecked;     // rows with more than one cell within the float32 bound
    int64_t expanded;      // rows that float64 left open
} Open;

static inline vf splat(float x) { return (vf){0} + x; }

static inline float least(vf x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] < m ? x[i] : m;
    return m;
}

// Least score of each lane over consecutive panels, for ROWS rows.
INLINE void block_minima(const float *restrict z, const float *restrict panel,
                                                               int64_t panels, int64_t dim, vf m[ROWS]) {
    for (int r = 0; r < ROWS; r++) m[r] = splat(INFINITY);
    for (int64_t s = 0; s < panels; s++) {
        // Keeps the broadcasts of z in the loop, as operands: there are more than registers.
        __asm__("" : "+r"(z));
        vf score[ROWS][VECS];
        for (int v = 0; v < VECS; v++) {
            vf offset = *(const vf *)(panel + v * LANES);
            for (int r = 0; r < ROWS; r++) score[r][v] = offset;
        }
        panel += WIDTH;
        for (int64_t d = 0; d < dim; d++, panel += WIDTH) {
            vf a[VECS];
            for (int v = 0; v < VECS; v++) a[v] = *(const vf *)(panel + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                vf x = splat(z[d * ROWS + r]);
                for (int v = 0; v < VECS; v++) score[r][v] -= x * a[v];
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) m[r] = MIN(m[r], score[r][v]);
    }
}

// What is known of ROWS rows: per lane the two least lower bounds of cells, the block of the first, and the least
// upper bound.
typedef struct {
    vf lower[ROWS], second[ROWS], upper[ROWS];
    vi cell[ROWS];
    float norm[ROWS];     // >= |scaled z|; infinite: too long for float32; NaN: not a row
    double square[ROWS];  // >= |scaled z|^2
} Group;

INLINE void visit(const Codebook *book, const float *z, Group *group, int64_t b,
                                                        int64_t dim) {
    int64_t first = b * book->block;
    int64_t panels = book->steps - first < book->block ? book->steps - first : book->block;
    vf m[ROWS];
    block_minima(z, book->panels + first * (dim + 1) * WIDTH, panels, dim, m);
    for (int r = 0; r < ROWS; r++) {
        vf error = splat(group->norm[r] * book->error_slope[b] + book->error_base[b]);
        vf lower = m[r] - error;
        group->upper[r] = MIN(group->upper[r], m[r] + error);
        vi better = lower < group->lower[r];
        group->second[r] = MIN(group->second[r], MAX(lower, group->lower[r]));
        group->cell[r] = (better & (int32_t)b) | (~better & group->cell[r]);
        group->lower[r] = MIN(group->lower[r], lower);
    }
}

// Squared distances of ROWS rows to the box of a block, in float32.
INLINE void box_distance(const Codebook *book, const float *z, int64_t b, int64_t dim, float distance[ROWS]) {
    const float *box = book->boxes + b * dim * 2;
    for (int r = 0; r < ROWS; r++) distance[r] = 0;
    for (int64_t d = 0; d < dim; d++) {
        float low = box[2 * d], high = box[2 * d + 1];
        for (int r = 0; r < ROWS; r++) {
            float x = z[d * ROWS + r];
            float away = low - x > x - high ? low - x : x - high;
            away = away > 0 ? away : 0;
            distance[r] += away * away;
        }
    }
}

// Whether no code of a block can win any of the rows.
INLINE int out_of_reach(const Codebook *book, const float *z, const float reach[ROWS], int64_t b, int64_t dim) {
    float distance[ROWS];
    box_distance(book, z, b, dim, distance);
    int all = 1;
    for (int r = 0; r < ROWS; r++) all &= distance[r] > reach[r];
    return all;
}

// hi + lo is the score within error; error 0: exactly.
typedef struct {
    double hi, lo, error;
} Expansion;

static inline void add(Expansion *sum, double x) {
    // Error-free only if every operation rounds by itself.
    _Pragma("clang fp contract(off)")
    double s = sum->hi + x, v = s - sum->hi;
    double rounding = (sum->hi - (s - v)) + (x - v);
    double t = sum->lo + rounding, w = t - sum->lo;
    sum->error += fabs((sum->lo - (t - w)) + (rounding - w));
    sum->hi = s;
    sum->lo = t;
}

// The score in twice float64's precision (Ogita, Rump, Oishi 2005, with a running error bound): the products of widened
// float32 numbers are exact in float64, so only the sum rounds.
static Expansion expanded_score(const Codebook *book, const double *z, int64_t slot) {
    _Pragma("clang fp contract(off)")
    Expansion sum = {book->bias ? -(double)book->bias[slot] : 0.0, 0.0, 0.0};
    const float *a = book->codes + slot * book->dim;
    for (int64_t d = 0; d < book->dim; d++) {
        double x = a[d];
        add(&sum, -z[d] * x);
        if (!book->bias) add(&sum, 0.5 * x * x);
    }
    // After cancellation the low part may be the larger one: the sum must not assume an order.
    double hi = sum.hi + sum.lo, v = hi - sum.hi;
    Expansion out = {hi, (sum.hi - (hi - v)) + (sum.lo - v), sum.error * (1.0 + 0x1p-40)};
    if (!isfinite(out.hi)) out.error = INFINITY;
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

static inline void consider(const Codebook *book, const double *z, double norm, int64_t slot, Candidates *c) {
    const float *a = book->codes + slot * book->dim;
    double dot[8] = {0};
    int64_t d = 0;
    for (; d + 8 <= book->dim; d += 8)
        for (int k = 0; k < 8; k++) dot[k] += z[d + k] * (double)a[d + k];
    for (; d < book->dim; d++) dot[0] += z[d] * (double)a[d];
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

static void consider_cell(const Codebook *book, const double *z, double norm, int64_t block, int lane, Candidates *c) {
    int64_t first = block * book->block;
    int64_t end = first + book->block < book->steps ? first + book->block : book->steps;
    for (int64_t v = first * VECS; v < end * VECS; v++) {
        int64_t slot = v * LANES + lane;
        if (slot < book->num_codes) consider(book, z, norm, slot, c);
    }
}

// Among candidates that float64 leaves open: the winner, or -1 with the undecided ones first in `c`.
static int64_t expand(const Codebook *book, const double *z, Candidates *c) {
    Expansion score[MAX_CANDIDATES];
    int64_t best = 0;
    for (int64_t i = 0; i < c->count; i++) {
        score[i] = expanded_score(book, z, c->slot[i]);
        Expansion a = score[i], b = score[best];
        if (a.hi < b.hi || (a.hi == b.hi && (a.lo < b.lo || (a.lo == b.lo && book->id[c->slot[i]] < book->id[c->slot[best]]))))
            best = i;
    }
    Expansion b = score[best];
    int64_t winner = c->slot[best], kept = 0;
    int decided = isfinite(b.error);
    for (int64_t i = 0; i < c->count; i++) {
        Expansion a = score[i];
        double gap = (a.hi - b.hi) + (a.lo - b.lo);
        if (gap > a.error + b.error + fabs(b.hi) * 0x1p-100) continue;
        int same = a.hi == b.hi && a.lo == b.lo && a.error == 0 && b.error == 0;
        decided &= same;
        c->slot[kept++] = c->slot[i];
    }
    c->count = kept;
    return decided ? winner : -1;
}

// The rows of one call. Mirrored by library.py.
typedef struct {
    int64_t count;
    const float *narrow;   // (count, dim) float32, or null
    const double *wide;    // (count, dim) float64, if `narrow` is null
    int64_t *order;        // (count) scratch: rows in the order in which they are visited
    int32_t *home;         // (count) scratch: nearest box of each row
    int64_t *winner;       // (count) out
} Rows;

static inline double component(const Rows *rows, int64_t row, int64_t d, int64_t dim) {
    return rows->narrow ? (double)rows->narrow[row * dim + d] : rows->wide[row * dim + d];
}

// Packs up to ROWS rows as (dim, ROWS) scaled float32 and resets what is known of them. A row that is not finite, one
// that is not there and one that is too long are packed as zeros; their norms tell.
static void pack(const Codebook *book, const Rows *rows, int64_t first, int64_t dim, float *z, Group *group) {
    for (int r = 0; r < ROWS; r++) {
        group->lower[r] = group->second[r] = group->upper[r] = splat(INFINITY);
        group->cell[r] = (vi){0};
        int64_t row = first + r < rows->count ? rows->order[first + r] : -1;
        double square = 0;
        int finite = row >= 0;
        for (int64_t d = 0; row >= 0 && d < dim; d++) {
            // Scaled before it is rounded: a subnormal float32 has few bits.
            double x = component(rows, row, d, dim) * book->scale;
            finite &= isfinite(x) != 0;
            z[d * ROWS + r] = (float)x;
            square += x * x;
        }
        // One part in 2^20 covers the roundings of the norm and of its square, the rest what underflows.
        double norm = sqrt(square) * (1 + 0x1p-20) + 0x1p-120;
        if (!finite) norm = NAN;
        else if (!(norm <= book->longest_row)) norm = INFINITY;
        if (!isfinite(norm))
            for (int64_t d = 0; d < dim; d++) z[d * ROWS + r] = 0;
        group->norm[r] = (float)norm;
        group->square[r] = finite ? square * (1 + 0x1p-20) + 0x1p-240 : NAN;
    }
}

// Squared distance that a box must have to be out of reach of a row: |z - a|^2 = 2 score + |z|^2, with room for the
// roundings of both sides.
static void set_reach(const Group *group, int64_t dim, float reach[ROWS]) {
    for (int r = 0; r < ROWS; r++) {
        double upper = least(group->upper[r]), square = group->square[r];
        double farthest = 2 * upper + square + 0x1p-20 * (2 * fabs(upper) + square);
        reach[r] = (float)(farthest * (1 + (dim + 16) * 0x1p-22)) + 0x1p-120f;
        if (!isfinite(group->norm[r])) reach[r] = -1;
    }
}

// Which blocks may hold a winner of some row, nearest first.
INLINE void visit_near_blocks(const Codebook *book, const Rows *rows, int64_t first,
                                                                    const float *z, Group *group, int64_t dim) {
    int64_t last = first + ROWS < rows->count ? first + ROWS - 1 : rows->count - 1;
    int64_t blocks = (book->steps + book->block - 1) / book->block;
    int32_t homes[2] = {rows->home[rows->order[first]], rows->home[rows->order[last]]};
    float reach[ROWS];
    visit(book, z, group, homes[0], dim);
    if (homes[1] != homes[0]) visit(book, z, group, homes[1], dim);
    set_reach(group, dim, reach);
    for (int64_t b = 0; b < blocks; b++) {
        if (b == homes[0] || b == homes[1] || out_of_reach(book, z, reach, b, dim)) continue;
        visit(book, z, group, b, dim);
        set_reach(group, dim, reach);
    }
}

// A second pass for rows of which some lane has two cells within the bound while only one is known.
INLINE void consider_blocks(const Codebook *book, const float *z, const double *wide,
                                                                  const Group *group, const int again[ROWS],
                                                                  Candidates c[ROWS], int64_t dim) {
    int64_t blocks = (book->steps + book->block - 1) / book->block;
    float reach[ROWS], upper[ROWS];
    if (book->boxes) set_reach(group, dim, reach);
    for (int r = 0; r < ROWS; r++) upper[r] = least(group->upper[r]);
    for (int64_t b = 0; b < blocks; b++) {
        if (book->boxes && out_of_reach(book, z, reach, b, dim)) continue;
        int64_t first = b * book->block;
        int64_t panels = book->steps - first < book->block ? book->steps - first : book->block;
        vf m[ROWS];
        block_minima(z, book->panels + first * (dim + 1) * WIDTH, panels, dim, m);
        for (int r = 0; r < ROWS; r++) {
            if (!again[r] || c[r].overflow) continue;
            float error = group->norm[r] * book->error_slope[b] + book->error_base[b];
            for (int lane = 0; lane < LANES; lane++)
                if (m[r][lane] - error <= upper[r])
                    consider_cell(book, wide + r * dim, (double)group->norm[r] / book->scale, b, lane, &c[r]);
        }
    }
}

static void finish_row(const Codebook *book, const double *z, int exact_products, int64_t row, Candidates *c,
                       int64_t *winner, Open *open) {
    drop_beaten(c);
    if (!c->overflow && c->count == 1) {
        *winner = book->id[c->slot[0]];
        return;
    }
    if (!c->overflow && c->count && exact_products) {
        open->expanded++;
        int64_t slot = expand(book, z, c);
        if (slot >= 0) {
            *winner = book->id[slot];
            return;
        }
    }
    if (c->overflow || c->count == 0 || open->pairs + c->count > open->capacity) {
        open->rescan_row[open->rescans++] = row;
        return;
    }
    for (int64_t i = 0; i < c->count; i++) {
        open->pair_row[open->pairs] = row;
        open->pair_code[open->pairs++] = book->id[c->slot[i]];
    }
}

INLINE void finish(const Codebook *book, const Rows *rows, int64_t first,
                                                         const float *z, const Group *group, double *wide, Open *open,
                                                         int64_t dim) {
    Candidates c[ROWS];
    int again[ROWS], any_again = 0;
    for (int r = 0; r < ROWS && first + r < rows->count; r++)
        for (int64_t d = 0; d < dim; d++) wide[r * dim + d] = component(rows, rows->order[first + r], d, dim);
    for (int r = 0; r < ROWS; r++) {
        float upper = least(group->upper[r]);
        double norm = (double)group->norm[r] / book->scale;
        c[r].count = 0;
        c[r].upper = INFINITY;
        c[r].overflow = !isfinite(upper) || !isfinite(norm);
        again[r] = 0;
        if (c[r].overflow) continue;
        int cells = 0;
        for (int lane = 0; lane < LANES; lane++) {
            cells += group->lower[r][lane] <= upper;
            again[r] |= group->second[r][lane] <= upper;
        }
        open->rechecked += cells > 1 || again[r];
        any_again |= again[r];
        for (int lane = 0; lane < LANES && !again[r]; lane++)
            if (group->lower[r][lane] <= upper)
                consider_cell(book, wide + r * dim, norm, group->cell[r][lane], lane, &c[r]);
    }
    if (any_again) consider_blocks(book, z, wide, group, again, c, dim);
    for (int r = 0; r < ROWS && first + r < rows->count; r++) {
        int64_t row = rows->order[first + r];
        if (isnan(group->norm[r]))
            rows->winner[row] = 0;
        else
            finish_row(book, wide + r * dim, rows->narrow != 0, row, &c[r], &rows->winner[row], open);
    }
}

// Orders rows by their nearest box, so that the rows of a group look at the same few blocks.
INLINE void sort_rows(const Codebook *book, const Rows *rows, float *z, Group *group,
                                                            int64_t dim) {
    int64_t blocks = (book->steps + book->block - 1) / book->block;
    int64_t start[MAX_BOXES + 1] = {0};
    for (int64_t first = 0; first < rows->count; first += ROWS) {
        pack(book, rows, first, dim, z, group);
        float nearest[ROWS];
        int32_t home[ROWS] = {0};
        for (int r = 0; r < ROWS; r++) nearest[r] = INFINITY;
        for (int64_t b = 0; b < blocks; b++) {
            float distance[ROWS];
            box_distance(book, z, b, dim, distance);
            for (int r = 0; r < ROWS; r++) {
                home[r] = distance[r] < nearest[r] ? (int32_t)b : home[r];
                nearest[r] = distance[r] < nearest[r] ? distance[r] : nearest[r];
            }
        }
        for (int r = 0; r < ROWS && first + r < rows->count; r++) {
            rows->home[first + r] = home[r];
            start[home[r] + 1]++;
        }
    }
    for (int64_t b = 0; b < blocks; b++) start[b + 1] += start[b];
    for (int64_t row = 0; row < rows->count; row++) rows->order[start[rows->home[row]]++] = row;
}

INLINE void scan(const Codebook *book, const Rows *rows, Open *open, float *z,
                                                       double *wide, int64_t dim) {
    Group group[TILE_GROUPS];
    for (int64_t row = 0; row < rows->count; row++) rows->order[row] = row;
    if (book->boxes) {
        sort_rows(book, rows, z, group, dim);
        for (int64_t first = 0; first < rows->count; first += ROWS) {
            pack(book, rows, first, dim, z, group);
            visit_near_blocks(book, rows, first, z, group, dim);
            finish(book, rows, first, z, group, wide, open, dim);
        }
        return;
    }
    int64_t blocks = (book->steps + book->block - 1) / book->block;
    for (int64_t tile = 0; tile < rows->count; tile += TILE_GROUPS * ROWS) {
        int groups = 0;
        for (; groups < TILE_GROUPS && tile + groups * ROWS < rows->count; groups++)
            pack(book, rows, tile + groups * ROWS, dim, z + groups * ROWS * dim, &group[groups]);
        for (int64_t b = 0; b < blocks; b++)
            for (int g = 0; g < groups; g++) visit(book, z + g * ROWS * dim, &group[g], b, dim);
        for (int g = 0; g < groups; g++)
            finish(book, rows, tile + g * ROWS, z + g * ROWS * dim, &group[g], wide, open, dim);
    }
}

// Codes in a panel: how the caller must lay out `panels`.
EXPORT int64_t NAME(vq_panel_width)(void) { return WIDTH; }

// Finds the winners of `rows`; what it can't decide it leaves in `open`. Returns 0, or -1 without memory.
EXPORT int64_t NAME(vq_scan)(const Codebook *book, const Rows *rows, Open *open) {
    float *z = malloc(sizeof(float) * TILE_GROUPS * ROWS * book->dim);
    double *wide = malloc(sizeof(double) * ROWS * book->dim);
    if (!z || !wide) {
        free(z);
        free(wide);
        return -1;
    }
    // Some libraries switch subnormal numbers off for the threads that load them.
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    switch (book->dim) {
        // Small widths get code of their own, in which the loop over components is unrolled.
        case 1: scan(book, rows, open, z, wide, 1); break;
        case 2: scan(book, rows, open, z, wide, 2); break;
        case 3: scan(book, rows, open, z, wide, 3); break;
        case 4: scan(book, rows, open, z, wide, 4); break;
        case 6: scan(book, rows, open, z, wide, 6); break;
        case 8: scan(book, rows, open, z, wide, 8); break;
        default: scan(book, rows, open, z, wide, book->dim);
    }
    fesetenv(&environment);
    free(z);
    free(wide);
    return 0;
}
