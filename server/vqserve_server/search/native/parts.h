// Arrays of requests as Python hands them over (mirrored by batch.py), and the copies between them and rows.
//
// Requests have no alignment: every number is read and written by memcpy, which compilers turn into one instruction.
#pragma once
#include <stdint.h>
#include <string.h>

#define COPY static inline __attribute__((always_inline))

// Numbers of DType in tokenizer.proto.
enum { FLOAT32 = 1, FLOAT16, BFLOAT16, FLOAT64, UINT8, UINT16, UINT32, INT32, INT64 };

// Tokens [start, start + rows) of a request, which are those from `first` on of its batch.
typedef struct {
    int64_t type;                   // of the latents
    int64_t tokens;                 // of an image
    int64_t image, token, channel;  // from one to the next, in numbers
    int64_t index_type;
    char *latents;  // (images, tokens, channels) or (images, channels, tokens)
    char *indices;  // (images * tokens)
    int64_t start, rows;
    int64_t first;
} Part;

COPY int size_of(int64_t type) {
    return type == UINT8 ? 1 : type == UINT16 || type == FLOAT16 || type == BFLOAT16 ? 2 : type >= INT64 || type == FLOAT64 ? 8 : 4;
}

COPY char *place_of(const Part *part, int64_t image, int64_t token) {
    return part->latents + size_of(part->type) * (image * part->image + token * part->token);
}

// The part that has a row of the batch.
COPY int64_t part_of(const Part *parts, int64_t count, int64_t row) {
    int64_t low = 0;
    while (count - low > 1) {
        int64_t middle = low + (count - low) / 2;
        if (parts[middle].first <= row) low = middle;
        else count = middle;
    }
    return low;
}

// Negative ones are greater than any codebook.
COPY uint64_t read_index(const char *at, int64_t type) {
    uint64_t bits = 0;
    int32_t narrow;
    switch (type) {
        case UINT8: memcpy(&bits, at, 1); break;
        case UINT16: memcpy(&bits, at, 2); break;
        case UINT32: memcpy(&bits, at, 4); break;
        case INT32: memcpy(&narrow, at, 4); return (uint64_t)(int64_t)narrow;
        default: memcpy(&bits, at, 8);
    }
    return bits;
}
