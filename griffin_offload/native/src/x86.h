// Vectors of AVX2, and of its successors.

#define VECTORS_OF_AVX2                                                                                                \
    const int LANES = 8;                                                                                               \
    typedef __m256i I;                                                                                                 \
    typedef __m256 F;                                                                                                  \
    TARGET INLINE I zero_i() { return _mm256_setzero_si256(); }                                                        \
    TARGET INLINE F zero_f() { return _mm256_setzero_ps(); }                                                           \
    TARGET INLINE F all(float x) { return _mm256_set1_ps(x); }                                                         \
    TARGET INLINE I load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }                              \
    TARGET INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }                                                \
    TARGET INLINE I widen(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }        \
    TARGET INLINE I low_halves(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }                              \
    TARGET INLINE I high_halves(I x) { return low_halves(_mm256_srli_epi16(x, 4)); }                                   \
    TARGET INLINE I repeat(const int8_t* p) {                                                                          \
        int32_t word;                                                                                                  \
        memcpy(&word, p, 4);                                                                                           \
        return _mm256_set1_epi32(word);                                                                                \
    }                                                                                                                  \
    TARGET INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }                                                    \
    TARGET INLINE F add(F x, F y) { return _mm256_add_ps(x, y); }                                                      \
    TARGET INLINE F fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }                                            \
    TARGET INLINE float across(F x) {                                                                                  \
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));                              \
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));                                                            \
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));                                                 \
    }                                                                                                                  \
    TARGET INLINE void load_pairs(const uint16_t* p, F& first, F& second) {                                            \
        const I both = load(p);                                                                                        \
        first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));                                                      \
        second = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));                      \
    }

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
VECTORS_OF_AVX2
TARGET INLINE I dot16(I sum, I x, I y) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)); }
// A group's 16 products of 15 x 127 fit int16.
TARGET INLINE I dot8(I sum, I codes, I x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)); }
TARGET INLINE I dot8_sum(I sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
static bool here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#include "products.h"
#include "blocks.h"
#include "quantize.h"
#include "norm.h"
#undef TARGET
}  // namespace avx2

#if defined(__clang__) || __GNUC__ >= 11
#include <cpuid.h>
namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
VECTORS_OF_AVX2
TARGET INLINE I dot16(I sum, I x, I y) { return _mm256_dpwssd_avx_epi32(sum, x, y); }
TARGET INLINE I dot8(I sum, I codes, I x) { return _mm256_dpbusd_avx_epi32(sum, codes, x); }
TARGET INLINE I dot8_sum(I sum) { return sum; }
static bool here() {  // compilers know the name of this feature only lately
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2::here() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#include "products.h"
#include "blocks.h"
#include "quantize.h"
#include "norm.h"
#undef TARGET
}  // namespace avx_vnni
#endif

namespace avx512_vnni {
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vnni")))
const int LANES = 16;
typedef __m512i I;
typedef __m512 F;
TARGET INLINE I zero_i() { return _mm512_setzero_si512(); }
TARGET INLINE F zero_f() { return _mm512_setzero_ps(); }
TARGET INLINE F all(float x) { return _mm512_set1_ps(x); }
TARGET INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
TARGET INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
TARGET INLINE I widen(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
TARGET INLINE I low_halves(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
TARGET INLINE I high_halves(I x) { return low_halves(_mm512_srli_epi16(x, 4)); }
TARGET INLINE I repeat(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}
TARGET INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
TARGET INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
TARGET INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
TARGET INLINE float across(F x) { return _mm512_reduce_add_ps(x); }
TARGET INLINE void load_pairs(const uint16_t* p, F& first, F& second) {
    const I both = load(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
TARGET INLINE I dot16(I sum, I x, I y) { return _mm512_dpwssd_epi32(sum, x, y); }
TARGET INLINE I dot8(I sum, I codes, I x) { return _mm512_dpbusd_epi32(sum, codes, x); }
TARGET INLINE I dot8_sum(I sum) { return sum; }
TARGET INLINE I times128(I x) { return _mm512_slli_epi32(x, 7); }
static bool here() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"); }
#define BYTES_OF_TOKENS
#include "products.h"
#include "blocks.h"
#include "quantize.h"
#include "norm.h"
#undef BYTES_OF_TOKENS
#undef TARGET
}  // namespace avx512_vnni
