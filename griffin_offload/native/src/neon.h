// Vectors of NEON.

namespace neon {
#if defined(__ARM_FEATURE_DOTPROD)
#define TARGET
#elif defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
const int LANES = 4;
typedef int32x4_t I;
typedef float32x4_t F;
TARGET INLINE I zero_i() { return vdupq_n_s32(0); }
TARGET INLINE F zero_f() { return vdupq_n_f32(0); }
TARGET INLINE F all(float x) { return vdupq_n_f32(x); }
TARGET INLINE I load(const void* p) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t*)p)); }
TARGET INLINE void store(float* p, F x) { vst1q_f32(p, x); }
TARGET INLINE I widen(const int8_t* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p))); }
TARGET INLINE I low_halves(I x) { return vandq_s32(x, vreinterpretq_s32_s8(vdupq_n_s8(15))); }
TARGET INLINE I high_halves(I x) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }
TARGET INLINE I repeat(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return vdupq_n_s32(word);
}
TARGET INLINE F to_float(I x) { return vcvtq_f32_s32(x); }
TARGET INLINE F add(F x, F y) { return vaddq_f32(x, y); }
TARGET INLINE F fma(F x, F y, F z) { return vfmaq_f32(z, x, y); }
TARGET INLINE float across(F x) { return vaddvq_f32(x); }
TARGET INLINE void load_pairs(const uint16_t* p, F& first, F& second) {
    const I both = load(p);
    first = vreinterpretq_f32_s32(vshlq_n_s32(both, 16));
    second = vreinterpretq_f32_s32(vandq_s32(both, vdupq_n_s32((int)0xffff0000)));
}
TARGET INLINE I dot16(I sum, I x, I y) {
    const int16x8_t a = vreinterpretq_s16_s32(x), b = vreinterpretq_s16_s32(y);
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}
TARGET INLINE I dot8(I sum, I codes, I x) { return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x)); }
TARGET INLINE I dot8_sum(I sum) { return sum; }
static bool here() {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#include "products.h"
#include "blocks.h"
#include "quantize.h"
#include "norm.h"
#undef TARGET
}  // namespace neon
