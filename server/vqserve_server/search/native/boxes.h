// Blocks of neighbouring codes lie in boxes, and LANES boxes in an outer box: a row looks only at the blocks whose boxes
// are within reach of its best distance so far.
#pragma once
#include "layout.h"
#include "scores.h"
#include "settle.h"

// Squared distances of a row to LANES boxes.
INLINE vf box_distances(const float *box, const float *z, int64_t dim) {
    vf distance = {0};
    for (int64_t d = 0; d < dim; d++, box += 2 * LANES) {
        vf x = z[d];
        vf away = max(max(load(box) - x, x - load(box + LANES)), (vf)0);
        distance += away * away;
    }
    return distance;
}

// Squared distance beyond which a box is out of reach of a row: |z - a|^2 = 2 score + |z|^2, with room for the roundings
// of both sides.
INLINE float reach_of(float least_upper, double square, int64_t dim) {
    double upper = least_upper;
    double farthest = 2 * upper + square + 0x1p-20 * (2 * fabs(upper) + square);
    return (float)(farthest * (1 + (dim + 16) * 0x1p-22)) + 0x1p-120f;
}

INLINE int nearest_lane(vf distance) {
    float m = least(distance);
    return __builtin_ctz(bits_of(distance <= (vf)m));
}

// Visits those of the blocks of a group that `lanes` names, and returns the reach after.
INLINE float visit_lanes(const Codebook *book, const float *z, const Length *length, int64_t group, uint32_t lanes,
                         int64_t dim, Cells *cells) {
    for (; lanes; lanes &= lanes - 1)
        visit(book, z, length, group * LANES + __builtin_ctz(lanes), dim, 1, BOX_VECS, cells);
    return reach_of(least(cells->upper), length->square, dim);
}

// Visits the nearest block, then all that are within reach, which shrinks from group to group: to ask before every block
// would save few blocks and cost more. `outer_distance` has room for outer_groups * LANES floats.
INLINE void visit_near_blocks(const Codebook *book, const float *z, const Length *length, int64_t dim,
                              float *outer_distance, Cells *cells) {
    int64_t nearest = 0;
    float least_distance = INFINITY;
    for (int64_t o = 0; o < book->outer_groups; o++) {
        vf distance = box_distances(book->outer + o * dim * 2 * LANES, z, dim);
        memcpy(outer_distance + o * LANES, &distance, sizeof distance);
        float m = least(distance);
        if (m < least_distance) {
            least_distance = m;
            nearest = o * LANES + nearest_lane(distance);
        }
    }
    vf distance = box_distances(book->boxes + nearest * dim * 2 * LANES, z, dim);
    uint32_t first = 1u << nearest_lane(distance);
    float reach = visit_lanes(book, z, length, nearest, first, dim, cells);
    reach = visit_lanes(book, z, length, nearest, bits_of(distance <= (vf)reach) & ~first, dim, cells);
    outer_distance[nearest] = INFINITY;
    for (int64_t group = 0; group < book->box_groups; group++) {
        if (outer_distance[group] > reach) continue;
        distance = box_distances(book->boxes + group * dim * 2 * LANES, z, dim);
        reach = visit_lanes(book, z, length, group, bits_of(distance <= (vf)reach), dim, cells);
    }
}

// Searches the same blocks again, for a row that may have lanes with more cells within the bounds than are known.
INLINE void consider_near_blocks(const Codebook *book, const float *z, const double *wide, const Length *length,
                                 float upper, int64_t dim, Candidates *c) {
    float reach = reach_of(upper, length->square, dim);
    for (int64_t group = 0; group < book->box_groups; group++) {
        vf distance = box_distances(book->boxes + group * dim * 2 * LANES, z, dim);
        for (uint32_t near = bits_of(distance <= (vf)reach); near; near &= near - 1)
            consider_block(book, z, wide, length, upper, group * LANES + __builtin_ctz(near), dim, BOX_VECS, c);
    }
}
