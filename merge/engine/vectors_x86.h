/* The vectors of `fused.c` on x86-64 with AVX2, FMA and F16C. */

#include <cpuid.h>
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef __m256 Floats;
typedef __m256i Words;
typedef struct {
    __m256d low, high;
} Doubles;

static int is_known_processor(void) {
    __builtin_cpu_init();
    /* Not every compiler knows "f16c" by name. */
    unsigned eax, ebx, ecx, edx;
    int has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

INLINE Floats all_floats(float value) { return _mm256_set1_ps(value); }
INLINE Floats all_bits(uint32_t bits) { return _mm256_castsi256_ps(_mm256_set1_epi32((int)bits)); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats either(Floats a, Floats b) { return _mm256_or_ps(a, b); }

INLINE Floats out_of_range(Floats values, Floats limit) {
    return _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), values), limit, _CMP_NLT_UQ);
}

INLINE int has_nonzero(Floats values) {
    return _mm256_movemask_ps(_mm256_cmp_ps(values, _mm256_setzero_ps(), _CMP_NEQ_UQ)) != 0;
}

INLINE Doubles all_doubles(double value) {
    return (Doubles){_mm256_set1_pd(value), _mm256_set1_pd(value)};
}

INLINE Doubles load_doubles(const double *from) {
    return (Doubles){_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4)};
}

INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles sum) {
    return (Doubles){_mm256_fmadd_pd(a.low, b.low, sum.low),
                     _mm256_fmadd_pd(a.high, b.high, sum.high)};
}

INLINE Floats scaled(Doubles values, Doubles factor) {
    __m128 low = _mm256_cvtpd_ps(_mm256_mul_pd(values.low, factor.low));
    __m128 high = _mm256_cvtpd_ps(_mm256_mul_pd(values.high, factor.high));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

/* The upper half of each lane, to nearest even; the lower is left over. */
INLINE Words rounded_to_bf16(Floats values) {
    /* Add half a step, less one where the last bit that stays is even. */
    Words bits = _mm256_castps_si256(values);
    Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

INLINE Floats widen(const void *from, int64_t index, int dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)from + index);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + index));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void narrow(void *to, int64_t index, int dtype, Floats values) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)to + index, values);
        return;
    }
    __m128i half;
    if (dtype == F16) {
        half = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    } else {
        Words bits = _mm256_srli_epi32(rounded_to_bf16(values), 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)to + index), half);
}

INLINE Words load_pairs(const void *from, int64_t index) {
    return _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + index));
}

INLINE Floats even_of(Words pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

INLINE Floats odd_of(Words pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}

INLINE void narrow_pairs(void *to, int64_t index, Floats even, Floats odd) {
    Words low = _mm256_srli_epi32(rounded_to_bf16(even), 16);
    Words high = _mm256_and_si256(rounded_to_bf16(odd), _mm256_set1_epi32((int)0xffff0000u));
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + index), _mm256_or_si256(low, high));
}
