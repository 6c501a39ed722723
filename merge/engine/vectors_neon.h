/* The vectors of `fused.c` on little-endian AArch64: Apple silicon, Graviton and the like.

   That they have the bits of x86-64 is shown under an emulator, `tests/test_fused_arm64.py`; and every
   process compares with numpy before it uses the library. */

#include <arm_neon.h>

#define TARGET
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    float32x4_t low, high;
} Floats;
typedef struct {
    uint32x4_t low, high;
} Words;
typedef struct {
    float64x2_t part[4];
} Doubles;

/* All that is used here is in every AArch64 processor. */
static int is_known_processor(void) { return 1; }

#define FLOATS(bits) vreinterpretq_f32_u32(bits)
#define BITS(floats) vreinterpretq_u32_f32(floats)

INLINE Floats all_floats(float value) {
    return (Floats){vdupq_n_f32(value), vdupq_n_f32(value)};
}

INLINE Floats all_bits(uint32_t bits) {
    return (Floats){FLOATS(vdupq_n_u32(bits)), FLOATS(vdupq_n_u32(bits))};
}

INLINE Floats add(Floats a, Floats b) {
    return (Floats){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}

INLINE Floats subtract(Floats a, Floats b) {
    return (Floats){vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
}

INLINE Floats multiply(Floats a, Floats b) {
    return (Floats){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}

INLINE Floats either(Floats a, Floats b) {
    return (Floats){FLOATS(vorrq_u32(BITS(a.low), BITS(b.low))),
                    FLOATS(vorrq_u32(BITS(a.high), BITS(b.high)))};
}

INLINE Floats out_of_range(Floats values, Floats limit) {
    return (Floats){FLOATS(vmvnq_u32(vcaltq_f32(values.low, limit.low))),
                    FLOATS(vmvnq_u32(vcaltq_f32(values.high, limit.high)))};
}

INLINE int has_nonzero(Floats values) {
    uint32x4_t is_zero = vandq_u32(vceqzq_f32(values.low), vceqzq_f32(values.high));
    return vminvq_u32(is_zero) == 0;
}

INLINE Doubles all_doubles(double value) {
    float64x2_t pair = vdupq_n_f64(value);
    return (Doubles){{pair, pair, pair, pair}};
}

INLINE Doubles load_doubles(const double *from) {
    return (Doubles){{vld1q_f64(from), vld1q_f64(from + 2), vld1q_f64(from + 4), vld1q_f64(from + 6)}};
}

INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles sum) {
    return (Doubles){{vfmaq_f64(sum.part[0], a.part[0], b.part[0]),
                      vfmaq_f64(sum.part[1], a.part[1], b.part[1]),
                      vfmaq_f64(sum.part[2], a.part[2], b.part[2]),
                      vfmaq_f64(sum.part[3], a.part[3], b.part[3])}};
}

INLINE Floats scaled(Doubles values, Doubles factor) {
#define PART(i) vmulq_f64(values.part[i], factor.part[i])
    return (Floats){vcvt_high_f32_f64(vcvt_f32_f64(PART(0)), PART(1)),
                    vcvt_high_f32_f64(vcvt_f32_f64(PART(2)), PART(3))};
#undef PART
}

/* The upper half of each lane, to nearest even; the lower is left over. */
INLINE uint32x4_t rounded_to_bf16(float32x4_t values) {
    /* Add half a step, less one where the last bit that stays is even. */
    uint32x4_t bits = BITS(values);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}

/* Bytes, since stored values need not stand at a multiple of their size. */
INLINE Floats widen(const void *from, int64_t index, int dtype) {
    if (dtype == F32) {
        const uint8_t *floats = (const uint8_t *)from + index * 4;
        return (Floats){vreinterpretq_f32_u8(vld1q_u8(floats)),
                        vreinterpretq_f32_u8(vld1q_u8(floats + 16))};
    }
    uint16x8_t half = vreinterpretq_u16_u8(vld1q_u8((const uint8_t *)from + index * 2));
    if (dtype == F16) {
        float16x8_t values = vreinterpretq_f16_u16(half);
        return (Floats){vcvt_f32_f16(vget_low_f16(values)), vcvt_high_f32_f16(values)};
    }
    return (Floats){FLOATS(vshll_n_u16(vget_low_u16(half), 16)), FLOATS(vshll_high_n_u16(half, 16))};
}

INLINE void narrow(void *to, int64_t index, int dtype, Floats values) {
    if (dtype == F32) {
        uint8_t *floats = (uint8_t *)to + index * 4;
        vst1q_u8(floats, vreinterpretq_u8_f32(values.low));
        vst1q_u8(floats + 16, vreinterpretq_u8_f32(values.high));
        return;
    }
    uint8x16_t half;
    if (dtype == F16) {
        half = vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(values.low), values.high));
    } else {
        uint16x4_t low = vshrn_n_u32(rounded_to_bf16(values.low), 16);
        half = vreinterpretq_u8_u16(vshrn_high_n_u32(low, rounded_to_bf16(values.high), 16));
    }
    vst1q_u8((uint8_t *)to + index * 2, half);
}

INLINE Words load_pairs(const void *from, int64_t index) {
    const uint8_t *pairs = (const uint8_t *)from + index * 2;
    return (Words){vreinterpretq_u32_u8(vld1q_u8(pairs)), vreinterpretq_u32_u8(vld1q_u8(pairs + 16))};
}

INLINE Floats even_of(Words pairs) {
    return (Floats){FLOATS(vshlq_n_u32(pairs.low, 16)), FLOATS(vshlq_n_u32(pairs.high, 16))};
}

INLINE Floats odd_of(Words pairs) {
    uint32x4_t upper = vdupq_n_u32(0xffff0000u);
    return (Floats){FLOATS(vandq_u32(pairs.low, upper)), FLOATS(vandq_u32(pairs.high, upper))};
}

INLINE void narrow_pairs(void *to, int64_t index, Floats even, Floats odd) {
    uint8_t *pairs = (uint8_t *)to + index * 2;
    /* The upper halves stay, the even ones are shifted in below. */
    uint32x4_t low = vsriq_n_u32(rounded_to_bf16(odd.low), rounded_to_bf16(even.low), 16);
    uint32x4_t high = vsriq_n_u32(rounded_to_bf16(odd.high), rounded_to_bf16(even.high), 16);
    vst1q_u8(pairs, vreinterpretq_u8_u32(low));
    vst1q_u8(pairs + 16, vreinterpretq_u8_u32(high));
}

#undef FLOATS
#undef BITS
