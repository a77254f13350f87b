// Rows of a batch, read from requests of any layout and any type of latents, and winners, written into replies.
#pragma once
#include "layout.h"
#include "parts.h"

// Channels that are read together where each has its tokens side by side: a line of the cache is written whole.
#define GATHERED_CHANNELS 16

INLINE float from_float32(const char *at) {
    float x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE float from_float16(const char *at) {
    _Float16 x;
    memcpy(&x, at, sizeof x);
    return (float)x;
}

INLINE float from_bfloat16(const char *at) {
    uint16_t upper;
    memcpy(&upper, at, sizeof upper);
    uint32_t bits = (uint32_t)upper << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE double from_float64(const char *at) {
    double x;
    memcpy(&x, at, sizeof x);
    return x;
}

// Copies `count` tokens of one image: out is (count, dim).
#define DEFINE_GATHER(name, Number, size, read)                                                                       \
    static void name(const char *at, int64_t token, int64_t channel, int64_t count, int64_t dim, Number *out) {       \
        if (channel == 1) {                                                                                           \
            for (int64_t t = 0; t < count; t++)                                                                       \
                for (int64_t d = 0; d < dim; d++) out[t * dim + d] = read(at + size * (t * token + d));               \
            return;                                                                                                   \
        }                                                                                                             \
        for (int64_t from = 0; from < dim; from += GATHERED_CHANNELS) {                                               \
            int64_t to = from + GATHERED_CHANNELS < dim ? from + GATHERED_CHANNELS : dim;                             \
            for (int64_t d = from; d < to; d++)                                                                       \
                for (int64_t t = 0; t < count; t++)                                                                   \
                    out[t * dim + d] = read(at + size * (t * token + d * channel));                                   \
        }                                                                                                             \
    }

DEFINE_GATHER(gather_float32, float, 4, from_float32)
DEFINE_GATHER(gather_float16, float, 2, from_float16)
DEFINE_GATHER(gather_bfloat16, float, 2, from_bfloat16)
DEFINE_GATHER(gather_float64, double, 8, from_float64)

// Rows [first, first + count) of a batch, as they lie in one request: null if they must be gathered.
INLINE const char *as_they_lie(const Part *parts, int64_t num_parts, int64_t first, int64_t count, int64_t dim) {
    const Part *part = parts + part_of(parts, num_parts, first);
    int64_t start = part->start + first - part->first;
    if ((part->type != FLOAT32 && part->type != FLOAT64) || part->channel != 1 || part->token != dim) return 0;
    if (first + count > part->first + part->rows || part->image != part->tokens * dim) return 0;
    const char *at = part->latents + size_of(part->type) * start * dim;
    return (uintptr_t)at % size_of(part->type) ? 0 : at;
}

// Widens rows [first, first + count) of a batch into `out`, (count, dim) float32 or, of float64 latents, float64.
static void gather(const Part *parts, int64_t num_parts, int64_t first, int64_t count, int64_t dim, void *out) {
    for (const Part *part = parts + part_of(parts, num_parts, first); count; part++) {
        int64_t token = part->start + first - part->first, left = part->rows - (first - part->first);
        if (left > count) left = count;
        first += left;
        count -= left;
        while (left) {
            int64_t image = token / part->tokens, within = token % part->tokens;
            int64_t some = part->tokens - within < left ? part->tokens - within : left;
            const char *at = place_of(part, image, within);
            switch (part->type) {
                case FLOAT16: gather_float16(at, part->token, part->channel, some, dim, out); break;
                case BFLOAT16: gather_bfloat16(at, part->token, part->channel, some, dim, out); break;
                case FLOAT64: gather_float64(at, part->token, part->channel, some, dim, out); break;
                default: gather_float32(at, part->token, part->channel, some, dim, out);
            }
            out = (char *)out + some * dim * (part->type == FLOAT64 ? sizeof(double) : sizeof(float));
            token += some;
            left -= some;
        }
    }
}

// Little-endian.
INLINE void write_indices(char *at, const int size, const int64_t *index, int64_t count) {
    for (int64_t i = 0; i < count; i++) memcpy(at + size * i, &index[i], size);
}

// Writes the indices of rows [first, first + count) of a batch; `names`, if not null, has the index for each winner.
static void scatter(const Part *parts, int64_t num_parts, int64_t first, int64_t count, int64_t *winner,
                    const int64_t *names) {
    if (names)
        for (int64_t i = 0; i < count; i++) winner[i] = winner[i] < 0 ? winner[i] : names[winner[i]];
    for (const Part *part = parts + part_of(parts, num_parts, first); count; part++) {
        int64_t left = part->rows - (first - part->first);
        if (left > count) left = count;
        int size = size_of(part->index_type);
        char *at = part->indices + size * (part->start + first - part->first);
        switch (size) {
            case 1: write_indices(at, 1, winner, left); break;
            case 2: write_indices(at, 2, winner, left); break;
            case 4: write_indices(at, 4, winner, left); break;
            default: write_indices(at, 8, winner, left);
        }
        winner += left;
        first += left;
        count -= left;
    }
}
