/* One pass over a block: widen, add a weighted delta, round, look at the range.

   The arithmetic is that of the torch path, bit for bit: three float32 operations, each rounded by
   itself, and a cast to nearest even. Compile with -ffp-contract=off; a fused multiply-add would
   change bits. Only a LoRA's float64 product is made of fused multiply-adds, in the order of its
   rank, whatever the machine.

   The loops are the same on every machine, on vectors of eight values; what a vector is and can do
   stands in a header of its own for x86-64 with AVX2, FMA and F16C, and for AArch64. Elsewhere
   `fused_version` tells that nothing is here. */

#include <stdint.h>
#include <string.h>

#define VERSION 2
#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

/* The flag again, for whoever compiles without: GCC knows the flag alone. It has to stand before
   the intrinsics, which are made of operators that may be contracted. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

enum { F16 = 0, BF16 = 1, F32 = 2 };
enum { IS_CHANGED = 1, IS_OUT_OF_RANGE = 2 };

#define LANES 8

/* Vectors: `Floats` are eight float32, `Doubles` eight float64, `Words` eight float32's bits. Where
   a name does not say what it does:

   widen, narrow    eight values of a dtype in memory to float32 and back, to nearest even
   either           or, bit by bit
   out_of_range     ones where a magnitude is not less than the limit, NaN included
   has_nonzero      true when any of eight differs from zero, whatever its sign, NaN included
   scaled           a product in float64, rounded to float32
   multiply_add     a * b + sum in float64, rounded once
   even_of, odd_of  of sixteen bfloat16 in `Words` those in the lower and those in the upper halves */

#if defined(__x86_64__) && defined(__GNUC__)
#include "vectors_x86.h"
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#include "vectors_neon.h"
#else
#define IS_UNKNOWN
#endif

#if !defined(IS_UNKNOWN)

/* Elements that every pass takes whole; a rest of fewer goes through a copy. */
#define STEP 16

API int fused_version(void) { return is_known_processor() ? VERSION : 0; }

/* The smallest magnitude that rounds to infinity. */
INLINE Floats limit_of(int dtype) {
    if (dtype == F16) return all_floats(65520.0f);
    return all_bits(dtype == BF16 ? 0x7f7f8000u : 0x7f800000u);
}

INLINE int flags_of(Floats deltas, Floats outside) {
    return (has_nonzero(deltas) ? IS_CHANGED : 0) | (has_nonzero(outside) ? IS_OUT_OF_RANGE : 0);
}

static inline int width_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE int delta_pass(void *out, int out_dtype, const void *target, int target_dtype,
                      const void *distilled, int distilled_dtype, const void *base, int base_dtype,
                      float weight, int64_t count) {
    Floats scale = all_floats(weight), limit = limit_of(out_dtype);
    Floats deltas = all_floats(0), outside = all_floats(0);
    for (int64_t i = 0; i < count; i += LANES) {
        Floats delta = subtract(widen(distilled, i, distilled_dtype), widen(base, i, base_dtype));
        delta = multiply(delta, scale);
        Floats sum = add(widen(target, i, target_dtype), delta);
        deltas = either(deltas, delta);
        outside = either(outside, out_of_range(sum, limit));
        narrow(out, i, out_dtype, sum);
    }
    return flags_of(deltas, outside);
}

/* The same for bfloat16 alone, which is the upper half of a float32: a pair is widened by a mask and
   a shift where it stands, and nothing is moved from lane to lane. */
INLINE int bf16_delta_pass(void *out, const void *target, const void *distilled, const void *base,
                           float weight, int64_t count) {
    Floats scale = all_floats(weight), limit = limit_of(BF16);
    Floats deltas = all_floats(0), outside = all_floats(0);
    for (int64_t i = 0; i < count; i += STEP) {
        Words t = load_pairs(target, i), d = load_pairs(distilled, i), b = load_pairs(base, i);
        Floats even_delta = multiply(subtract(even_of(d), even_of(b)), scale);
        Floats odd_delta = multiply(subtract(odd_of(d), odd_of(b)), scale);
        Floats even = add(even_of(t), even_delta), odd = add(odd_of(t), odd_delta);
        deltas = either(deltas, either(even_delta, odd_delta));
        outside = either(outside, out_of_range(even, limit));
        outside = either(outside, out_of_range(odd, limit));
        narrow_pairs(out, i, even, odd);
    }
    return flags_of(deltas, outside);
}

INLINE int product_pass(void *out, int out_dtype, const void *target, int target_dtype,
                        const double *product, double factor, int64_t count) {
    Doubles scale = all_doubles(factor);
    Floats limit = limit_of(out_dtype);
    Floats deltas = all_floats(0), outside = all_floats(0);
    for (int64_t i = 0; i < count; i += LANES) {
        Floats delta = scaled(load_doubles(product + i), scale);
        Floats sum = add(widen(target, i, target_dtype), delta);
        deltas = either(deltas, delta);
        outside = either(outside, out_of_range(sum, limit));
        narrow(out, i, out_dtype, sum);
    }
    return flags_of(deltas, outside);
}

/* out = round(target + (distilled - base) * weight) for `count` elements; returns flags. */
TARGET API int fused_add_delta(void *out, int out_dtype, const void *target, int target_dtype,
                               const void *distilled, int distilled_dtype, const void *base,
                               int base_dtype, float weight, int64_t count) {
    int64_t whole = count & ~(int64_t)(STEP - 1), left = count - whole;
    int flags;
    /* The usual cases by themselves: their branches on dtypes are gone, which halves their time. */
#define PASS(from, to) delta_pass(out, to, target, from, distilled, from, base, from, weight, whole)
    int from = target_dtype == distilled_dtype && target_dtype == base_dtype ? target_dtype : -1;
    if (from == F16 && out_dtype == F16) flags = PASS(F16, F16);
    else if (from == BF16 && out_dtype == BF16)
        flags = bf16_delta_pass(out, target, distilled, base, weight, whole);
    else if (from == F32 && out_dtype == F16) flags = PASS(F32, F16);
    else if (from == F32 && out_dtype == F32) flags = PASS(F32, F32);
    else
        flags = delta_pass(out, out_dtype, target, target_dtype, distilled, distilled_dtype, base,
                           base_dtype, weight, whole);
#undef PASS
    if (!left) return flags;
    float ends[4][STEP] = {{0}};
    const void *inputs[3] = {target, distilled, base};
    int dtypes[3] = {target_dtype, distilled_dtype, base_dtype};
    for (int i = 0; i < 3; i++) {
        int width = width_of(dtypes[i]);
        memcpy(ends[i], (const char *)inputs[i] + whole * width, (size_t)(left * width));
    }
    flags |= delta_pass(ends[3], out_dtype, ends[0], target_dtype, ends[1], distilled_dtype, ends[2],
                        base_dtype, weight, STEP);
    int width = width_of(out_dtype);
    memcpy((char *)out + whole * width, ends[3], (size_t)(left * width));
    return flags;
}

/* out = round(target + float32(product * factor)) for `count` elements; returns flags. */
TARGET API int fused_add_product(void *out, int out_dtype, const void *target, int target_dtype,
                                 const double *product, double factor, int64_t count) {
    int64_t whole = count & ~(int64_t)(STEP - 1), left = count - whole;
    int flags = product_pass(out, out_dtype, target, target_dtype, product, factor, whole);
    if (!left) return flags;
    float ends[2][STEP] = {{0}};
    double end[STEP] = {0};
    memcpy(ends[0], (const char *)target + whole * width_of(target_dtype),
           (size_t)(left * width_of(target_dtype)));
    memcpy(end, product + whole, (size_t)left * sizeof(double));
    flags |= product_pass(ends[1], out_dtype, ends[0], target_dtype, end, factor, STEP);
    memcpy((char *)out + whole * width_of(out_dtype), ends[1],
           (size_t)(left * width_of(out_dtype)));
    return flags;
}

/* Twelve accumulators, two columns' registers and a factor: what sixteen registers of four hold, and
   thirty-two of two. */
#define TILE_ROWS 6
#define TILE_COLUMNS 8

/* Copy `down`, (rank, columns), to panels of eight columns, (columns / 8, rank, 8), the last one
   filled up with zeros. */
TARGET API void fused_pack_panels(double *panels, const double *down, int64_t rank,
                                  int64_t columns) {
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
        int64_t valid = columns - column < TILE_COLUMNS ? columns - column : TILE_COLUMNS;
        for (int64_t k = 0; k < rank; k++, panels += TILE_COLUMNS) {
            const double *from = down + k * columns + column;
            for (int64_t i = 0; i < TILE_COLUMNS; i++) panels[i] = i < valid ? from[i] : 0.0;
        }
    }
}

typedef struct {
    char *out;
    const char *target;
    int out_dtype, target_dtype;
    int64_t rank, columns;
    Doubles factor;
    Floats limit, deltas, outside;
} LowRank;

/* Some rows of one panel: sums stay in registers until they are added and rounded. */
INLINE void low_rank_tile(LowRank *all, const double *up, const double *panel, int64_t row,
                          int64_t column, const int rows) {
    Doubles sums[TILE_ROWS];
    /* Unrolled throughout, or the sums would live in memory: twice the time. */
#pragma GCC unroll 6
    for (int i = 0; i < TILE_ROWS; i++) sums[i] = all_doubles(0);
    int64_t rank = all->rank;
    up += row * rank;
    for (int64_t k = 0; k < rank; k++, panel += TILE_COLUMNS) {
        Doubles columns = load_doubles(panel);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
            sums[i] = multiply_add(all_doubles(up[i * rank + k]), columns, sums[i]);
    }
    int is_whole = column + TILE_COLUMNS <= all->columns;
    size_t valid = (size_t)(is_whole ? TILE_COLUMNS : all->columns - column);
    size_t target_width = (size_t)width_of(all->target_dtype);
    size_t out_width = (size_t)width_of(all->out_dtype);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        size_t place = (size_t)((row + i) * all->columns + column);
        const char *from = all->target + place * target_width;
        char *to = all->out + place * out_width;
        float ends[2][TILE_COLUMNS] = {{0}};
        if (!is_whole) memcpy(ends[0], from, valid * target_width);
        Floats delta = scaled(sums[i], all->factor);
        Floats values = widen(is_whole ? from : (const char *)ends[0], 0, all->target_dtype);
        Floats sum = add(values, delta);
        all->deltas = either(all->deltas, delta);
        all->outside = either(all->outside, out_of_range(sum, all->limit));
        narrow(is_whole ? to : (char *)ends[1], 0, all->out_dtype, sum);
        if (!is_whole) memcpy(to, ends[1], valid * out_width);
    }
}

/* out = round(target + float32((up @ down) * factor)), all of `rows` times `columns`; returns flags.
   `up` is (rows, rank); `panels` are down's. Each sum over the rank is a chain of fused multiply-adds
   from its first element on, so its bits do not depend on tiles or registers. */
TARGET API int fused_add_low_rank(void *out, int out_dtype, const void *target, int target_dtype,
                                  const double *up, const double *panels, double factor,
                                  int64_t rank, int64_t rows, int64_t columns) {
    LowRank all = {out,
                   target,
                   out_dtype,
                   target_dtype,
                   rank,
                   columns,
                   all_doubles(factor),
                   limit_of(out_dtype),
                   all_floats(0),
                   all_floats(0)};
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
        int64_t row = 0;
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            low_rank_tile(&all, up, panels, row, column, TILE_ROWS);
        switch (rows - row) {
        case 5: low_rank_tile(&all, up, panels, row, column, 5); break;
        case 4: low_rank_tile(&all, up, panels, row, column, 4); break;
        case 3: low_rank_tile(&all, up, panels, row, column, 3); break;
        case 2: low_rank_tile(&all, up, panels, row, column, 2); break;
        case 1: low_rank_tile(&all, up, panels, row, column, 1); break;
        }
        panels += rank * TILE_COLUMNS;
    }
    return flags_of(all.deltas, all.outside);
}

#else

API int fused_version(void) { return 0; }

#endif
