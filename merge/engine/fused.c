/* One pass over a block: widen, add a weighted delta, round, look at the range.

   The arithmetic is that of the torch path, bit for bit: three float32 operations, each rounded by
   itself, and a cast to nearest even. Compile with -ffp-contract=off; a fused multiply-add would
   change bits. Only a LoRA's float64 product is made of fused multiply-adds, in the order of its
   rank, whatever the machine. Only x86-64 with AVX2, FMA and F16C: elsewhere `fused_version` tells
   that nothing is here. */

#include <stdint.h>
#include <string.h>

#define VERSION 2
#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

enum { F16 = 0, BF16 = 1, F32 = 2 };
enum { IS_CHANGED = 1, IS_OUT_OF_RANGE = 2 };

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define LANES 8
/* Elements that every pass takes whole; a rest of fewer goes through a copy. */
#define STEP 16

API int fused_version(void) {
    __builtin_cpu_init();
    int is_known = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                   __builtin_cpu_supports("fma");
    return is_known ? VERSION : 0;
}

INLINE __m256 widen(const void *from, int64_t index, int dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)from + index);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + index));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The upper half of each lane, to nearest even; the lower is left over. */
INLINE __m256i rounded_to_bf16(__m256 values) {
    /* Add half a step, less one where the last bit that stays is even. */
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

INLINE void narrow(void *to, int64_t index, int dtype, __m256 values) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)to + index, values);
        return;
    }
    __m128i half;
    if (dtype == F16) {
        half = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    } else {
        __m256i bits = _mm256_srli_epi32(rounded_to_bf16(values), 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)to + index), half);
}

/* The smallest magnitude that rounds to infinity. */
INLINE __m256 limit_of(int dtype) {
    if (dtype == F16) return _mm256_set1_ps(65520.0f);
    uint32_t bits = dtype == BF16 ? 0x7f7f8000u : 0x7f800000u;
    return _mm256_castsi256_ps(_mm256_set1_epi32((int)bits));
}

INLINE __m256 out_of_range(__m256 values, __m256 limit) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    /* Not less than: true for NaN, too. */
    return _mm256_cmp_ps(_mm256_andnot_ps(sign, values), limit, _CMP_NLT_UQ);
}

INLINE int flags_of(__m256 deltas, __m256 outside) {
    __m256 differs = _mm256_cmp_ps(deltas, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return (_mm256_movemask_ps(differs) ? IS_CHANGED : 0) |
           (_mm256_movemask_ps(outside) ? IS_OUT_OF_RANGE : 0);
}

static inline int width_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE int delta_pass(void *out, int out_dtype, const void *target, int target_dtype,
                      const void *distilled, int distilled_dtype, const void *base, int base_dtype,
                      float weight, int64_t count) {
    __m256 scale = _mm256_set1_ps(weight), limit = limit_of(out_dtype);
    __m256 deltas = _mm256_setzero_ps(), outside = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __m256 delta = _mm256_sub_ps(widen(distilled, i, distilled_dtype), widen(base, i, base_dtype));
        delta = _mm256_mul_ps(delta, scale);
        __m256 sum = _mm256_add_ps(widen(target, i, target_dtype), delta);
        deltas = _mm256_or_ps(deltas, delta);
        outside = _mm256_or_ps(outside, out_of_range(sum, limit));
        narrow(out, i, out_dtype, sum);
    }
    return flags_of(deltas, outside);
}

/* The same for bfloat16 alone, which is the upper half of a float32: a pair is widened by a mask and
   a shift where it stands, and nothing is moved from lane to lane. */
INLINE int bf16_delta_pass(void *out, const void *target, const void *distilled, const void *base,
                           float weight, int64_t count) {
    __m256 scale = _mm256_set1_ps(weight), limit = limit_of(BF16);
    __m256 deltas = _mm256_setzero_ps(), outside = _mm256_setzero_ps();
    __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
#define PAIRS(from) _mm256_loadu_si256((const __m256i *)((const uint16_t *)(from) + i))
#define EVEN(pairs) _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))
#define ODD(pairs) _mm256_castsi256_ps(_mm256_and_si256(pairs, upper))
    for (int64_t i = 0; i < count; i += STEP) {
        __m256i t = PAIRS(target), d = PAIRS(distilled), b = PAIRS(base);
        __m256 even_delta = _mm256_mul_ps(_mm256_sub_ps(EVEN(d), EVEN(b)), scale);
        __m256 odd_delta = _mm256_mul_ps(_mm256_sub_ps(ODD(d), ODD(b)), scale);
        __m256 even = _mm256_add_ps(EVEN(t), even_delta), odd = _mm256_add_ps(ODD(t), odd_delta);
        deltas = _mm256_or_ps(deltas, _mm256_or_ps(even_delta, odd_delta));
        outside = _mm256_or_ps(outside, out_of_range(even, limit));
        outside = _mm256_or_ps(outside, out_of_range(odd, limit));
        __m256i low = _mm256_srli_epi32(rounded_to_bf16(even), 16);
        __m256i high = _mm256_and_si256(rounded_to_bf16(odd), upper);
        _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), _mm256_or_si256(low, high));
    }
#undef PAIRS
#undef EVEN
#undef ODD
    return flags_of(deltas, outside);
}

INLINE int product_pass(void *out, int out_dtype, const void *target, int target_dtype,
                        const double *product, double factor, int64_t count) {
    __m256d scale = _mm256_set1_pd(factor);
    __m256 limit = limit_of(out_dtype);
    __m256 deltas = _mm256_setzero_ps(), outside = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __m128 low = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_loadu_pd(product + i), scale));
        __m128 high = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_loadu_pd(product + i + 4), scale));
        __m256 delta = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
        __m256 sum = _mm256_add_ps(widen(target, i, target_dtype), delta);
        deltas = _mm256_or_ps(deltas, delta);
        outside = _mm256_or_ps(outside, out_of_range(sum, limit));
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

/* Twelve accumulators, two columns' registers and a factor: what sixteen registers hold. */
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
    __m256d factor;
    __m256 limit, deltas, outside;
} LowRank;

/* Some rows of one panel: sums stay in registers until they are added and rounded. */
INLINE void low_rank_tile(LowRank *all, const double *up, const double *panel, int64_t row,
                          int64_t column, const int rows) {
    __m256d sums[TILE_ROWS][2];
    /* Unrolled throughout, or the sums would live in memory: twice the time. */
#pragma GCC unroll 6
    for (int i = 0; i < TILE_ROWS; i++) sums[i][0] = sums[i][1] = _mm256_setzero_pd();
    int64_t rank = all->rank;
    up += row * rank;
    for (int64_t k = 0; k < rank; k++, panel += TILE_COLUMNS) {
        __m256d low = _mm256_loadu_pd(panel), high = _mm256_loadu_pd(panel + 4);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m256d value = _mm256_broadcast_sd(up + i * rank + k);
            sums[i][0] = _mm256_fmadd_pd(value, low, sums[i][0]);
            sums[i][1] = _mm256_fmadd_pd(value, high, sums[i][1]);
        }
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
        __m128 low = _mm256_cvtpd_ps(_mm256_mul_pd(sums[i][0], all->factor));
        __m128 high = _mm256_cvtpd_ps(_mm256_mul_pd(sums[i][1], all->factor));
        __m256 delta = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
        __m256 values = widen(is_whole ? from : (const char *)ends[0], 0, all->target_dtype);
        __m256 sum = _mm256_add_ps(values, delta);
        all->deltas = _mm256_or_ps(all->deltas, delta);
        all->outside = _mm256_or_ps(all->outside, out_of_range(sum, all->limit));
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
                   _mm256_set1_pd(factor),
                   limit_of(out_dtype),
                   _mm256_setzero_ps(),
                   _mm256_setzero_ps()};
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
