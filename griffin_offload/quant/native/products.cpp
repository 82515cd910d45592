// Products of tokens with int8 and int4 matrices by the integer instructions of x86 and ARM.
// A plain library without Python or torch: quant/native.py loads it, and says which instructions to take.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#elif defined(__GNUC__) && defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#if defined(_MSC_VER)
#define EXPORT extern "C" __declspec(dllexport)
#define INLINE static __forceinline
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#endif

// What is multiplied: rows x columns codes, tokens (tokens, columns) that lie `apart` numbers apart -> out (tokens, rows).
struct Work {
    const void *codes, *scales;
    int64_t rows, columns;
    int64_t item;  // bytes of a number of x, out and int8's scales: 2 is bfloat16, 4 float32; int4's scales are bfloat16
    const void* x;
    int64_t apart, tokens;
    void* out;
    // The tokens in whole numbers:
    int64_t stride;
    int16_t* levels16;
    int8_t* levels8;
    float *steps, *totals;
    const uint16_t* scales16;
};

static const float LEAST = 1e-30f;  // a token without larger numbers counts as zeros

INLINE float value(float x) { return x; }
INLINE float value(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE float number(const void* from, int64_t i, int64_t item) {
    return item == 2 ? value(((const uint16_t*)from)[i]) : ((const float*)from)[i];
}

INLINE void put(void* to, int64_t i, float x, int64_t item) {
    if (item == 4) {
        ((float*)to)[i] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    ((uint16_t*)to)[i] = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

// The largest absolute value of some columns of token t; NaN if there is NaN or infinity among them.
INLINE float magnitude(const Work& work, int64_t t, int64_t begin, int64_t count) {
    uint32_t largest = 0;  // among floats without sign, bits are in the order of their values
    if (work.item == 2) {
        const uint16_t* x = (const uint16_t*)work.x + t * work.apart + begin;
        uint16_t most = 0;
        for (int64_t k = 0; k < count; k++) {
            const uint16_t bits = x[k] & 0x7fff;
            most = bits > most ? bits : most;
        }
        largest = (uint32_t)most << 16;
    } else {
        const float* x = (const float*)work.x + t * work.apart + begin;
        for (int64_t k = 0; k < count; k++) {
            uint32_t bits;
            memcpy(&bits, x + k, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
    }
    if (largest >= 0x7f800000) return NAN;
    float out;
    memcpy(&out, &largest, 4);
    return out;
}

template <class Out, class In>
INLINE void round_to(const In* x, float per, int64_t count, Out* out) {
    for (int64_t k = 0; k < count; k++) {
        const float shifted = value(x[k]) * per + 12582912.0f;  // 1.5 * 2^23: the low bits are the whole number
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        out[k] = (Out)(bits - 0x4b400000);
    }
}

template <class In>
INLINE void round_to_bytes(const In* x, float per, int64_t count, int8_t* low, int8_t* high) {
    for (int64_t k = 0; k < count; k++) {
        const float shifted = value(x[k]) * per + (12582912.0f + 32896.0f);
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        low[k] = (int8_t)bits, high[k] = (int8_t)(bits >> 8);
    }
}

#if defined(__GNUC__) && defined(__x86_64__)

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
#undef BYTES_OF_TOKENS
#undef TARGET
}  // namespace avx512_vnni

#elif defined(__GNUC__) && defined(__aarch64__)

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
#undef TARGET
}  // namespace neon

#endif

// Any processor: one number at a time.
namespace plain {
#define TARGET
const int LANES = 1;
typedef int32_t I;
typedef float F;
INLINE I zero_i() { return 0; }
INLINE F zero_f() { return 0; }
INLINE F all(float x) { return x; }
INLINE I load(const void* p) {
    I word;
    memcpy(&word, p, 4);
    return word;
}
INLINE void store(float* p, F x) { *p = x; }
INLINE I widen(const int8_t* p) {
    const int16_t both[2] = {p[0], p[1]};
    return load(both);
}
INLINE I low_halves(I x) { return x & 0x0f0f0f0f; }
INLINE I high_halves(I x) { return x >> 4 & 0x0f0f0f0f; }
INLINE I repeat(const int8_t* p) { return load(p); }
INLINE F to_float(I x) { return (F)x; }
INLINE F add(F x, F y) { return x + y; }
INLINE F fma(F x, F y, F z) { return x * y + z; }
INLINE float across(F x) { return x; }
INLINE void load_pairs(const uint16_t* p, F& first, F& second) { first = value(p[0]), second = value(p[1]); }
INLINE I dot16(I sum, I x, I y) {
    int16_t a[2], b[2];
    memcpy(a, &x, 4), memcpy(b, &y, 4);
    return sum + a[0] * b[0] + a[1] * b[1];
}
INLINE I dot8(I sum, I codes, I x) {
    uint8_t a[4];
    int8_t b[4];
    memcpy(a, &codes, 4), memcpy(b, &x, 4);
    for (int i = 0; i < 4; i++) sum += a[i] * b[i];
    return sum;
}
INLINE I dot8_sum(I sum) { return sum; }
static bool here() { return true; }
#include "products.h"
#undef TARGET
}  // namespace plain

struct Kernels {
    const char* name;
    bool (*here)();
    void (*part[3])(const Work&, int64_t, int64_t);  // by Kind
    void (*token[3])(const Work&, int64_t);
};
enum Kind { INT8, INT4, INT8_WORDS };  // codes in rows; in blocks of 16 rows; in oneDNN's layout (avx512_vnni alone)
#define KERNELS(NAME, SPACE, PART, TOKEN) \
    {NAME, SPACE::here, {SPACE::int8_part, SPACE::int4_part, PART}, {SPACE::to_int16, SPACE::to_int8, TOKEN}}
static const Kernels TABLE[] = {  // the best first
#if defined(__GNUC__) && defined(__x86_64__)
    KERNELS("avx512_vnni", avx512_vnni, avx512_vnni::words_part, avx512_vnni::to_bytes),
#if defined(__clang__) || __GNUC__ >= 11
    KERNELS("avx_vnni", avx_vnni, nullptr, nullptr),
#endif
    KERNELS("avx2", avx2, nullptr, nullptr),
#elif defined(__GNUC__) && defined(__aarch64__)
    KERNELS("neon", neon, nullptr, nullptr),
#endif
    KERNELS("plain", plain, nullptr, nullptr),
};
static const int COUNT = sizeof TABLE / sizeof *TABLE;

// The name of a set of instructions, the best first; "" if this processor lacks it; null after the last.
EXPORT const char* griffin_instructions(int number) {
    return number >= COUNT ? nullptr : TABLE[number].here() ? TABLE[number].name : "";
}

// GOMP_parallel of the OpenMP that is already in the process: runs a function on so many threads, and waits.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

template <class Function>
static void share(int64_t count, int64_t each, Parallel parallel, unsigned threads, const Function& function) {
    struct Job {
        std::atomic<int64_t> next;
        int64_t count, each;
        const Function& function;
    } job = {{0}, count, each, function};
    const auto run = [](void* data) {
        Job& job = *(Job*)data;
        for (int64_t begin; (begin = job.next.fetch_add(job.each)) < job.count;)
            job.function(begin, begin + job.each < job.count ? begin + job.each : job.count);
    };
    if (parallel && threads > 1 && count > each) parallel(run, &job, threads, 0);
    else run(&job);
}

static const int64_t BATCH = 64;  // tokens at a time: in whole numbers they fit the cache

static void multiply(const Kernels& kernels, const Work& work, int kind, int64_t block, Parallel parallel, unsigned threads) {
    share(work.tokens, 4, parallel, threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) kernels.token[kind](work, t);
    });
    // Parts of at least 64 KB, and more of them than threads: one that is held up leaves its share to the others.
    const int64_t blocks = (work.rows + block - 1) / block, bytes = block * work.stride / (kind == INT4 ? 2 : 1);
    const int64_t least = 65536 / (bytes * work.tokens + 1) + 1, some = (blocks + 8 * threads - 1) / (8 * threads);
    const int64_t unit = kind == INT8 ? block : 1;  // INT8's parts are of rows, the others' of blocks
    share(kind == INT8 ? work.rows : blocks, (least > some ? least : some) * unit, parallel, threads,
          [&](int64_t begin, int64_t end) { kernels.part[kind](work, begin, end); });
}

// The product of `work`, whose last six fields are not read. Returns 0; 1 if there was no memory for the tokens.
EXPORT int griffin_product(const Work* given, int number, int kind, Parallel parallel, unsigned threads) {
    Work work = *given;
    const int64_t groups = kind == INT4 ? (work.columns + 31) / 32 : 1, block = kind == INT8 ? 4 : kind == INT4 ? 16 : 64;
    const int64_t batch = work.tokens < BATCH ? work.tokens : BATCH;
    work.stride = kind == INT4 ? groups * 32 : (work.columns + 63) / 64 * 64;
    const int64_t levels = batch * work.stride * (kind == INT4 ? 1 : 2), floats = batch * groups;
    const std::unique_ptr<char[]> memory(new (std::nothrow) char[levels + 2 * floats * sizeof(float)]);
    if (!memory) return 1;
    work.levels16 = (int16_t*)memory.get(), work.levels8 = (int8_t*)memory.get();
    work.steps = (float*)(memory.get() + levels), work.totals = work.steps + floats;
    work.scales16 = (const uint16_t*)work.scales;
    for (int64_t first = 0; first < given->tokens; first += BATCH) {
        work.tokens = given->tokens - first < BATCH ? given->tokens - first : BATCH;
        work.x = (const char*)given->x + first * work.apart * work.item;
        work.out = (char*)given->out + first * work.rows * work.item;
        multiply(TABLE[number], work, kind, block, parallel, threads);
    }
    return 0;
}
