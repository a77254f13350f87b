// The CPU's exact search: one pass in float32 that keeps error bounds, then float64 and twice float64 for the few codes
// that the bounds leave open. docs/exact-search.md derives the bounds and explains the order of work.
//
// Compiled once per instruction set (layout.h).
#include "boxes.h"
#include "gather.h"
#include "layout.h"
#include "pool.h"
#include "scores.h"
#include "settle.h"

#include <fenv.h>
#include <stdatomic.h>
#include <stdlib.h>

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, LEVEL)
#define EXPORT __attribute__((visibility("default")))

#define ALIGNMENT 64
// Groups of ROWS rows that share a block of panels while it is in cache.
#define TILE_GROUPS 8
#define TILE_ROWS (TILE_GROUPS * ROWS)
// Rows of a task where each row looks at a few blocks only.
#define BOXED_TASK_ROWS 256
// Multiplications that take a thread some 40 us, longer than it takes to wake up.
#define WORK_PER_THREAD (1 << 21)

// What one thread needs beside the rows.
typedef struct {
    Cells cells[TILE_ROWS];
    Length length[TILE_ROWS];
    float *z;               // (TILE_ROWS * dim) scaled rows, a group as (dim, rows)
    float *alone;           // (dim) one of them
    double *wide;           // (dim) a row as it came
    float *outer_distance;  // (outer_groups * LANES)
    void *gathered;         // (task_rows * dim) rows of a task, float32 or float64
    int64_t *winner;        // (task_rows)
} Scratch;

// The rows of a task, and what is found for them.
typedef struct {
    const Codebook *book;
    const float *narrow;  // (count, dim) float32, or null
    const double *wide;   // (count, dim) float64, if `narrow` is null
    int64_t count;
    int64_t *winner;  // (count)
} Rows;

typedef struct {
    const Codebook *book;
    const Part *parts;  // of the batch
    int64_t num_parts;
    int is_wide;  // whether the latents are float64
    int64_t count;
    const int64_t *names;
    int64_t task_rows;
    int64_t shares;  // tasks share the codes, not the rows, if there are more than one
    char *memory;
    size_t scratch_size;
    _Atomic int64_t rechecked, expanded, unresolved, not_finite;
} Search;

static size_t round_up(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t gathered_size(const Search *s) {
    return round_up((s->is_wide ? sizeof(double) : sizeof(float)) * s->task_rows * s->book->dim);
}

static size_t scratch_size(const Search *s) {
    const Codebook *book = s->book;
    return round_up(sizeof(Scratch)) + round_up(sizeof(float) * TILE_ROWS * book->dim) +
           round_up(sizeof(float) * book->dim) + round_up(sizeof(double) * book->dim) +
           round_up(sizeof(float) * book->outer_groups * LANES) + gathered_size(s) +
           round_up(sizeof(int64_t) * s->task_rows);
}

static Scratch *scratch_of(const Search *s, int64_t worker) {
    return (Scratch *)(s->memory + worker * s->scratch_size);
}

static void lay_out(const Search *s, int64_t worker) {
    Scratch *scratch = scratch_of(s, worker);
    char *at = (char *)scratch;
    scratch->z = (float *)(at += round_up(sizeof(Scratch)));
    scratch->alone = (float *)(at += round_up(sizeof(float) * TILE_ROWS * s->book->dim));
    scratch->wide = (double *)(at += round_up(sizeof(float) * s->book->dim));
    scratch->outer_distance = (float *)(at += round_up(sizeof(double) * s->book->dim));
    scratch->gathered = at += round_up(sizeof(float) * s->book->outer_groups * LANES);
    scratch->winner = (int64_t *)(at + gathered_size(s));
}

// The rows of a task: as they lie where that is possible, otherwise a copy.
static Rows rows_of(const Search *s, int64_t first, int64_t count, Scratch *scratch) {
    int64_t dim = s->book->dim;
    const void *rows = as_they_lie(s->parts, s->num_parts, first, count, dim);
    if (!rows) {
        gather(s->parts, s->num_parts, first, count, dim, scratch->gathered);
        rows = scratch->gathered;
    }
    return (Rows){s->book, s->is_wide ? 0 : rows, s->is_wide ? rows : 0, count, scratch->winner};
}

static void finish(Search *s, int64_t first, const Rows *rows, const Tally *tally) {
    scatter(s->parts, s->num_parts, first, rows->count, rows->winner, s->names);
    if (tally->rechecked) atomic_fetch_add(&s->rechecked, tally->rechecked);
    if (tally->expanded) atomic_fetch_add(&s->expanded, tally->expanded);
    if (tally->unresolved) atomic_fetch_add(&s->unresolved, tally->unresolved);
    if (tally->not_finite) atomic_fetch_add(&s->not_finite, tally->not_finite);
}

INLINE Length pack_row(const Rows *s, int64_t row, int64_t dim, float *z, int stride) {
    const float *narrow = s->narrow ? s->narrow + row * dim : 0;
    return pack(s->book, narrow, narrow ? 0 : s->wide + row * dim, dim, z, stride);
}

// The winner of a row, from what the pass in float32 knows of it; z is the scaled row, `stride` floats apart.
INLINE int64_t settle(const Rows *s, int64_t row, const float *z, int stride, const Length *length, const Cells *cells,
                      int64_t dim, const int vectors, Scratch *scratch, Tally *tally) {
    const Codebook *book = s->book;
    if (isnan(length->norm)) {
        tally->not_finite++;
        return 0;
    }
    float upper = least(cells->upper);
    if (!isfinite(length->norm) || !isfinite(upper)) {
        tally->unresolved++;
        return -1;
    }
    uint32_t near = bits_of(cells->lower <= (vf)upper);
    int is_known = !bits_of(cells->second <= (vf)upper);
    if (is_known && near && !(near & (near - 1))) {
        int lane = __builtin_ctz(near);
        int64_t slot = only_code(book, cells->block[lane], lane, vectors);
        if (slot >= 0) return book->id[slot];
    }
    Candidates c;
    c.count = c.overflow = 0;
    c.upper = INFINITY;
    double *wide = scratch->wide;
    for (int64_t d = 0; d < dim; d++) wide[d] = s->narrow ? (double)s->narrow[row * dim + d] : s->wide[row * dim + d];
    if (is_known) {
        tally->rechecked += (near & (near - 1)) != 0;
        for (; near; near &= near - 1) {
            int lane = __builtin_ctz(near);
            consider_cell(book, wide, (double)length->norm / book->scale, cells->block[lane], lane, dim, vectors, &c);
        }
        return decide(book, wide, &c, tally);
    }
    tally->rechecked++;
    if (book->box_groups) {
        consider_near_blocks(book, z, wide, length, upper, dim, &c);
        return decide(book, wide, &c, tally);
    }
    for (int64_t d = 0; d < dim; d++) scratch->alone[d] = z[d * stride];
    for (int64_t b = 0; b < blocks_of(book); b++)
        consider_block(book, scratch->alone, wide, length, upper, b, dim, vectors, &c);
    return decide(book, wide, &c, tally);
}

INLINE void search_boxed(const Rows *s, int64_t dim, Scratch *scratch, Tally *tally) {
    for (int64_t row = 0; row < s->count; row++) {
        Length length = pack_row(s, row, dim, scratch->z, 1);
        Cells cells;
        forget(&cells);
        if (isfinite(length.norm))
            visit_near_blocks(s->book, scratch->z, &length, dim, scratch->outer_distance, &cells);
        s->winner[row] = settle(s, row, scratch->z, 1, &length, &cells, dim, BOX_VECS, scratch, tally);
    }
}

// Rows of the group at `place` of `count` rows: a small rest has a small register tile.
INLINE int group_rows(int64_t count, int64_t place) {
    int64_t left = count - place;
    return left >= ROWS ? ROWS : left > 2 ? (left > 4 ? ROWS : 4) : (int)left;
}

// Packs the rows in groups.
static void pack_tile(const Rows *s, Scratch *scratch) {
    int64_t dim = s->book->dim, count = s->count;
    for (int64_t place = 0; place < count;) {
        int rows = group_rows(count, place);
        for (int r = 0; r < rows; r++, place++) {
            float *z = scratch->z + (place - r) * dim + r;
            forget(&scratch->cells[place]);
            if (place < count) {
                scratch->length[place] = pack_row(s, place, dim, z, rows);
                continue;
            }
            scratch->length[place] = (Length){NAN, NAN};
            for (int64_t d = 0; d < dim; d++) z[d * rows] = 0;
        }
    }
}

// Looks at blocks [from, to) for a packed tile.
static void visit_tile(const Codebook *book, const Scratch *tile, int64_t count, int64_t from, int64_t to, Cells *cells) {
    int64_t dim = book->dim;
    for (int64_t b = from; b < to; b++)
        for (int64_t place = 0; place < count;) {
            const float *z = tile->z + place * dim;
            const Length *length = tile->length + place;
            int rows = group_rows(count, place);
            switch (rows) {
                case 1: visit(book, z, length, b, dim, 1, VECS, cells + place); break;
                case 2: visit(book, z, length, b, dim, 2, VECS, cells + place); break;
#if ROWS > 4
                case 4: visit(book, z, length, b, dim, 4, VECS, cells + place); break;
#endif
                default: visit(book, z, length, b, dim, ROWS, VECS, cells + place);
            }
            place += rows;
        }
}

static void settle_tile(const Rows *s, Scratch *tile, Tally *tally) {
    int64_t dim = s->book->dim;
    for (int64_t place = 0; place < s->count;) {
        int rows = group_rows(s->count, place);
        for (int r = 0; r < rows && place < s->count; r++, place++)
            s->winner[place] = settle(s, place, tile->z + (place - r) * dim + r, rows, &tile->length[place],
                                      &tile->cells[place], dim, VECS, tile, tally);
    }
}

static void search_tile(const Rows *s, Scratch *tile, Tally *tally) {
    pack_tile(s, tile);
    visit_tile(s->book, tile, s->count, 0, blocks_of(s->book), tile->cells);
    settle_tile(s, tile, tally);
}

static void visit_share(void *context, int64_t share, int worker) {
    (void)worker;
    Search *s = context;
    int64_t blocks = blocks_of(s->book);
    Cells *cells = scratch_of(s, share)->cells;
    for (int64_t place = 0; place < TILE_ROWS; place++) forget(&cells[place]);
    visit_tile(s->book, scratch_of(s, 0), s->count, blocks * share / s->shares, blocks * (share + 1) / s->shares, cells);
}

// A few rows: a share of the codes on each thread.
static void search_shares(Search *s) {
    Scratch *tile = scratch_of(s, 0);
    Rows rows = rows_of(s, 0, s->count, tile);
    pack_tile(&rows, tile);
    vq_share(visit_share, s, s->shares, (int)s->shares);
    for (int64_t share = 1; share < s->shares; share++)
        for (int64_t place = 0; place < s->count; place++)
            merge(&tile->cells[place], &scratch_of(s, share)->cells[place]);
    Tally tally = {0};
    settle_tile(&rows, tile, &tally);
    finish(s, 0, &rows, &tally);
}

static void search_some_rows(void *context, int64_t task, int worker) {
    Search *s = context;
    int64_t first = task * s->task_rows, end = first + s->task_rows;
    if (end > s->count) end = s->count;
    Scratch *scratch = scratch_of(s, worker);
    Rows rows = rows_of(s, first, end - first, scratch);
    Tally tally = {0};
    switch (s->book->box_groups ? s->book->dim : 0) {
        // Widths with boxes get code of their own, in which the loop over components is unrolled.
        case 0: search_tile(&rows, scratch, &tally); break;
        case 1: search_boxed(&rows, 1, scratch, &tally); break;
        case 2: search_boxed(&rows, 2, scratch, &tally); break;
        case 3: search_boxed(&rows, 3, scratch, &tally); break;
        case 4: search_boxed(&rows, 4, scratch, &tally); break;
        case 6: search_boxed(&rows, 6, scratch, &tally); break;
        case 8: search_boxed(&rows, 8, scratch, &tally); break;
        case 12: search_boxed(&rows, 12, scratch, &tally); break;
        default: search_boxed(&rows, s->book->dim, scratch, &tally);
    }
    finish(s, first, &rows, &tally);
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Vectors in a panel, which the caller must lay out so: with boxes, and without.
EXPORT int64_t NAME(vq_panel_vectors)(int32_t is_boxed) { return is_boxed ? BOX_VECS : VECS; }

EXPORT int64_t NAME(vq_lanes)(void) { return LANES; }

// Finds the winners of a batch and writes their indices: `names`, if not null, has the index for each winner. The parts
// have `count` rows in all; their latents are all float64, with `is_wide`, or none is.
//
// A row that is undecided gets -1, as its index type has it, one that is not finite an arbitrary index. Adds to `counts`
// how many rows were looked at twice, how many of these float64 left open, how many are undecided, and not finite.
// Returns -1 without memory, else 0.
EXPORT int64_t NAME(vq_encode)(const Codebook *book, const Part *parts, int64_t num_parts, int64_t count, int32_t is_wide,
                               const int64_t *names, int32_t threads, int64_t counts[4]) {
    int is_boxed = book->box_groups > 0;
    // With boxes a row looks at some of the codes: how many, measured on random ones, is guess enough.
    int64_t looked_at = is_boxed ? smaller(book->num_codes, 128 * book->dim * book->dim) : book->num_codes;
    threads = (int32_t)smaller(threads, count * looked_at * (book->dim + 1) / WORK_PER_THREAD);
    if (threads < 1) threads = 1;
    Search s = {.book = book, .parts = parts, .num_parts = num_parts, .is_wide = is_wide, .count = count,
                .names = names, .shares = 1};
    if (is_boxed) {
        s.task_rows = smaller(BOXED_TASK_ROWS, ratio_up(count, threads));
    } else {
        // Tasks of equal size, as many as there are threads or a multiple.
        int64_t rounds = ratio_up(count, (int64_t)threads * TILE_ROWS);
        s.task_rows = ratio_up(ratio_up(count, threads * rounds + !rounds), ROWS) * ROWS;
        if (count <= TILE_ROWS && ratio_up(count, ROWS) < threads) {
            s.shares = smaller(threads, blocks_of(book));
            s.task_rows = count;
        }
    }
    s.scratch_size = scratch_size(&s);
    char *memory = malloc(threads * s.scratch_size + ALIGNMENT);
    if (!memory) return -1;
    s.memory = memory + (-(uintptr_t)memory & (ALIGNMENT - 1));
    for (int64_t worker = 0; worker < threads; worker++) lay_out(&s, worker);
    // Some libraries switch subnormal numbers off for the threads that load them. Helpers begin with the caller's.
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    if (s.shares > 1) search_shares(&s);
    else if (count) vq_share(search_some_rows, &s, ratio_up(count, s.task_rows), threads);
    fesetenv(&environment);
    free(memory);
    counts[0] += s.rechecked;
    counts[1] += s.expanded;
    counts[2] += s.unresolved;
    counts[3] += s.not_finite;
    return 0;
}

// Finds the winners of (count, dim) rows, float32 or float64: winner[i], or -1 where it can't decide. Adds how many rows
// were looked at twice, and how many of these float64 left open, to `counts`. Returns how many are undecided, or -1
// without memory.
EXPORT int64_t NAME(vq_search)(const Codebook *book, const void *rows, int32_t is_wide, int64_t count, int32_t threads,
                               int64_t *winner, int64_t counts[2]) {
    Part part = {.type = is_wide ? FLOAT64 : FLOAT32, .tokens = count, .image = count * book->dim, .token = book->dim,
                 .channel = 1, .index_type = INT64, .latents = (char *)rows, .indices = (char *)winner, .rows = count};
    int64_t found[4] = {0};
    if (NAME(vq_encode)(book, &part, 1, count, is_wide, 0, threads, found)) return -1;
    counts[0] += found[0];
    counts[1] += found[1];
    return found[2];
}
