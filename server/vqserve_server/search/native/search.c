// The CPU's exact search: one pass in float32 that keeps error bounds, then float64 and twice float64 for the few codes
// that the bounds leave open. docs/exact-search.md derives the bounds and explains the order of work.
//
// Compiled once per instruction set (layout.h).
#include "boxes.h"
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
} Scratch;

typedef struct {
    const Codebook *book;
    const float *narrow;  // (count, dim) float32, or null
    const double *wide;   // (count, dim) float64, if `narrow` is null
    int64_t count;
    int64_t *winner;
    int64_t task_rows;
    int64_t parts;  // tasks share the codes, not the rows, if there are more than one
    char *memory;
    size_t scratch_size;
    _Atomic int64_t rechecked, expanded, unresolved;
} Search;

static size_t round_up(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t scratch_size(const Codebook *book) {
    return round_up(sizeof(Scratch)) + round_up(sizeof(float) * TILE_ROWS * book->dim) +
           round_up(sizeof(float) * book->dim) + round_up(sizeof(double) * book->dim) +
           round_up(sizeof(float) * book->outer_groups * LANES);
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
    scratch->outer_distance = (float *)(at + round_up(sizeof(double) * s->book->dim));
}

INLINE Length pack_row(const Search *s, int64_t row, int64_t dim, float *z, int stride) {
    const float *narrow = s->narrow ? s->narrow + row * dim : 0;
    return pack(s->book, narrow, narrow ? 0 : s->wide + row * dim, dim, z, stride);
}

// The winner of a row, from what the pass in float32 knows of it; z is the scaled row, `stride` floats apart.
INLINE int64_t settle(const Search *s, int64_t row, const float *z, int stride, const Length *length, const Cells *cells,
                      int64_t dim, const int vectors, Scratch *scratch, Tally *tally) {
    const Codebook *book = s->book;
    if (isnan(length->norm)) return 0;
    Candidates c = {.upper = INFINITY};
    float upper = least(cells->upper);
    if (!isfinite(length->norm) || !isfinite(upper)) {
        tally->unresolved++;
        return -1;
    }
    double *wide = scratch->wide;
    for (int64_t d = 0; d < dim; d++) wide[d] = s->narrow ? (double)s->narrow[row * dim + d] : s->wide[row * dim + d];
    uint32_t near = bits_of(cells->lower <= (vf)upper);
    if (!bits_of(cells->second <= (vf)upper)) {
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

static void add_tally(Search *s, const Tally *tally) {
    atomic_fetch_add(&s->rechecked, tally->rechecked);
    atomic_fetch_add(&s->expanded, tally->expanded);
    atomic_fetch_add(&s->unresolved, tally->unresolved);
}

INLINE void search_boxed(Search *s, int64_t first, int64_t end, int64_t dim, Scratch *scratch) {
    Tally tally = {0};
    for (int64_t row = first; row < end; row++) {
        Length length = pack_row(s, row, dim, scratch->z, 1);
        Cells cells;
        forget(&cells);
        if (isfinite(length.norm))
            visit_near_blocks(s->book, scratch->z, &length, dim, scratch->outer_distance, &cells);
        s->winner[row] = settle(s, row, scratch->z, 1, &length, &cells, dim, BOX_VECS, scratch, &tally);
    }
    add_tally(s, &tally);
}

// Rows of the group at `place` of `count` rows: a small rest has a small register tile.
INLINE int group_rows(int64_t count, int64_t place) {
    int64_t left = count - place;
    return left >= ROWS ? ROWS : left > 2 ? (left > 4 ? ROWS : 4) : (int)left;
}

// Packs `count` rows from `first` on, in groups.
static void pack_tile(const Search *s, int64_t first, int64_t count, Scratch *scratch) {
    int64_t dim = s->book->dim;
    for (int64_t place = 0; place < count;) {
        int rows = group_rows(count, place);
        for (int r = 0; r < rows; r++, place++) {
            float *z = scratch->z + (place - r) * dim + r;
            forget(&scratch->cells[place]);
            if (place < count) {
                scratch->length[place] = pack_row(s, first + place, dim, z, rows);
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

static void settle_tile(Search *s, int64_t first, int64_t count, Scratch *tile) {
    Tally tally = {0};
    int64_t dim = s->book->dim;
    for (int64_t place = 0; place < count;) {
        int rows = group_rows(count, place);
        for (int r = 0; r < rows && place + r < count; r++)
            s->winner[first + place + r] = settle(s, first + place + r, tile->z + place * dim + r, rows,
                                                  &tile->length[place + r], &tile->cells[place + r], dim, VECS, tile, &tally);
        place += rows;
    }
    add_tally(s, &tally);
}

static void search_tile(Search *s, int64_t first, int64_t end, Scratch *tile) {
    pack_tile(s, first, end - first, tile);
    visit_tile(s->book, tile, end - first, 0, blocks_of(s->book), tile->cells);
    settle_tile(s, first, end - first, tile);
}

static void visit_part(void *context, int64_t part, int worker) {
    (void)worker;
    Search *s = context;
    int64_t blocks = blocks_of(s->book);
    Cells *cells = scratch_of(s, part)->cells;
    for (int64_t place = 0; place < TILE_ROWS; place++) forget(&cells[place]);
    visit_tile(s->book, scratch_of(s, 0), s->count, blocks * part / s->parts, blocks * (part + 1) / s->parts, cells);
}

// A few rows: a part of the codes on each thread.
static void search_parts(Search *s) {
    Scratch *tile = scratch_of(s, 0);
    pack_tile(s, 0, s->count, tile);
    vq_share(visit_part, s, s->parts, (int)s->parts);
    for (int64_t part = 1; part < s->parts; part++)
        for (int64_t place = 0; place < s->count; place++)
            merge(&tile->cells[place], &scratch_of(s, part)->cells[place]);
    settle_tile(s, 0, s->count, tile);
}

static void search_some_rows(void *context, int64_t task, int worker) {
    Search *s = context;
    int64_t first = task * s->task_rows, end = first + s->task_rows;
    if (end > s->count) end = s->count;
    Scratch *scratch = scratch_of(s, worker);
    switch (s->book->box_groups ? s->book->dim : 0) {
        // Widths with boxes get code of their own, in which the loop over components is unrolled.
        case 0: search_tile(s, first, end, scratch); break;
        case 1: search_boxed(s, first, end, 1, scratch); break;
        case 2: search_boxed(s, first, end, 2, scratch); break;
        case 3: search_boxed(s, first, end, 3, scratch); break;
        case 4: search_boxed(s, first, end, 4, scratch); break;
        case 6: search_boxed(s, first, end, 6, scratch); break;
        case 8: search_boxed(s, first, end, 8, scratch); break;
        case 12: search_boxed(s, first, end, 12, scratch); break;
        default: search_boxed(s, first, end, s->book->dim, scratch);
    }
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Vectors in a panel, which the caller must lay out so: with boxes, and without.
EXPORT int64_t NAME(vq_panel_vectors)(int32_t is_boxed) { return is_boxed ? BOX_VECS : VECS; }

EXPORT int64_t NAME(vq_lanes)(void) { return LANES; }

// Finds the winners of (count, dim) rows, float32 or float64: winner[i], or -1 where it can't decide. Adds how many rows
// were looked at twice, and how many of these float64 left open, to `counts`. Returns how many are undecided, or -1
// without memory.
EXPORT int64_t NAME(vq_search)(const Codebook *book, const void *rows, int32_t is_wide, int64_t count, int32_t threads,
                               int64_t *winner, int64_t counts[2]) {
    int is_boxed = book->box_groups > 0;
    // With boxes a row looks at some of the codes: how many, measured on random ones, is guess enough.
    int64_t looked_at = is_boxed ? smaller(book->num_codes, 128 * book->dim * book->dim) : book->num_codes;
    threads = (int32_t)smaller(threads, count * looked_at * (book->dim + 1) / WORK_PER_THREAD);
    if (threads < 1) threads = 1;
    Search s = {.book = book, .count = count, .winner = winner, .parts = 1, .scratch_size = scratch_size(book)};
    if (is_wide) s.wide = rows;
    else s.narrow = rows;
    if (is_boxed) {
        s.task_rows = smaller(BOXED_TASK_ROWS, ratio_up(count, threads));
    } else {
        // Tasks of equal size, as many as there are threads or a multiple.
        int64_t rounds = ratio_up(count, (int64_t)threads * TILE_ROWS);
        s.task_rows = ratio_up(ratio_up(count, threads * rounds + !rounds), ROWS) * ROWS;
        if (count <= TILE_ROWS && ratio_up(count, ROWS) < threads) s.parts = smaller(threads, blocks_of(book));
    }
    char *memory = malloc(threads * s.scratch_size + ALIGNMENT);
    if (!memory) return -1;
    s.memory = memory + (-(uintptr_t)memory & (ALIGNMENT - 1));
    for (int64_t worker = 0; worker < threads; worker++) lay_out(&s, worker);
    // Some libraries switch subnormal numbers off for the threads that load them. Helpers begin with the caller's.
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    if (s.parts > 1) search_parts(&s);
    else if (count) vq_share(search_some_rows, &s, ratio_up(count, s.task_rows), threads);
    fesetenv(&environment);
    free(memory);
    counts[0] += s.rechecked;
    counts[1] += s.expanded;
    return s.unresolved;
}
