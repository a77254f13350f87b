// Decodes a batch: rows of a table, found by the indices of requests, into replies of any layout.
#include "parts.h"
#include "pool.h"

#include <stdatomic.h>

// Bytes of a task, and of what a thread is woken for.
#define TASK_BYTES (1 << 16)
#define BYTES_PER_THREAD (1 << 20)
// Tokens whose channels are written side by side: a line of the cache of 4-byte numbers.
#define TOKENS 16

typedef struct {
    const Part *parts;
    int64_t num_parts, rows, task_rows;
    const char *table;  // (num_codes, width)
    int64_t table_type, width;
    uint64_t num_codes;
    _Atomic int64_t outside;
} Decode;

COPY void write_number(char *to, const char *from, int64_t to_type, int64_t from_type) {
    if (to_type == from_type) {
        memcpy(to, from, size_of(to_type));
        return;
    }
    float x;
    memcpy(&x, from, sizeof x);
    double wide = x;
    memcpy(to, &wide, sizeof wide);
}

// Writes `count` tokens of one image, each the row of its place in the table.
COPY void write_tokens(const Decode *d, const Part *part, char *to, const char *const *rows, int64_t count,
                       const int64_t to_type, const int64_t from_type) {
    const int to_size = size_of(to_type), from_size = size_of(from_type);
    if (part->channel == 1) {
        for (int64_t t = 0; t < count; t++)
            for (int64_t c = 0; c < d->width; c++)
                write_number(to + to_size * (t * part->token + c), rows[t] + from_size * c, to_type, from_type);
        return;
    }
    for (int64_t c = 0; c < d->width; c++, to += to_size * part->channel)
        for (int64_t t = 0; t < count; t++)
            write_number(to + to_size * t * part->token, rows[t] + from_size * c, to_type, from_type);
}

static void decode_some_rows(void *context, int64_t task, int worker) {
    (void)worker;
    Decode *d = context;
    int64_t first = task * d->task_rows, end = first + d->task_rows, outside = 0;
    if (end > d->rows) end = d->rows;
    int64_t row_bytes = size_of(d->table_type) * d->width;
    for (const Part *part = d->parts + part_of(d->parts, d->num_parts, first); first < end; part++) {
        int64_t stop = part->first + part->rows < end ? part->first + part->rows : end;
        while (first < stop) {
            int64_t token = part->start + first - part->first, within = token % part->tokens;
            int64_t count = stop - first;
            if (count > TOKENS) count = TOKENS;
            if (count > part->tokens - within) count = part->tokens - within;
            const char *rows[TOKENS];
            for (int64_t t = 0; t < count; t++) {
                const char *at = part->indices + size_of(part->index_type) * (token + t);
                uint64_t index = read_index(at, part->index_type);
                // The caller finds out which one it is.
                outside += index >= d->num_codes;
                rows[t] = d->table + (index < d->num_codes ? (int64_t)index * row_bytes : 0);
            }
            char *to = place_of(part, token / part->tokens, within);
            if (part->type != d->table_type) write_tokens(d, part, to, rows, count, FLOAT64, FLOAT32);
            else switch (size_of(part->type)) {
                case 2: write_tokens(d, part, to, rows, count, FLOAT16, FLOAT16); break;
                case 4: write_tokens(d, part, to, rows, count, FLOAT32, FLOAT32); break;
                default: write_tokens(d, part, to, rows, count, FLOAT64, FLOAT64);
            }
            first += count;
        }
    }
    if (outside) atomic_fetch_add(&d->outside, outside);
}

// Writes the rows of a batch: the parts have `rows` tokens in all, and latents of the table's type, or float64 from a
// table of float32. Returns how many indices are not below `num_codes`; what is written for those has no meaning.
__attribute__((visibility("default"))) int64_t vq_decode(const Part *parts, int64_t num_parts, int64_t rows,
                                                         const void *table, int64_t table_type, int64_t num_codes,
                                                         int64_t width, int32_t threads) {
    Decode d = {.parts = parts, .num_parts = num_parts, .rows = rows, .table = table, .table_type = table_type,
                .width = width, .num_codes = (uint64_t)num_codes};
    int64_t row_bytes = size_of(table_type) * width;
    d.task_rows = TASK_BYTES / row_bytes < TOKENS ? TOKENS : TASK_BYTES / row_bytes;
    int64_t useful = rows * row_bytes / BYTES_PER_THREAD;
    if (threads > useful) threads = useful < 1 ? 1 : (int32_t)useful;
    vq_share(decode_some_rows, &d, (rows + d.task_rows - 1) / d.task_rows, threads);
    return d.outside;
}
