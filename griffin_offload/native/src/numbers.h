// What is multiplied, and its numbers: bfloat16 (in 16 bits), and float.

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

// What is quantized: `count` rows of `columns` numbers, `apart` numbers apart.
struct Rows {
    const void* x;
    int64_t item;  // bytes of a number: 2 is bfloat16, 4 float32
    int64_t apart, count, columns;
    uint8_t* codes;
    uint16_t* pairs;  // of scale and zero
};

static const float OFF_GRID = 0.12f;  // steps that rounding to bfloat16 may take a number off a grid of 15
static const int FEWEST_STEPS = 8;    // fewer are found as their double
static const float TO_WHOLE = 12582912.0f;  // 1.5 * 2^23: added to a number, it leaves the whole number in the low bits
static const int64_t AHEAD = 8192;  // bytes of codes that are fetched before they are needed
INLINE void ahead(const void* place) { __builtin_prefetch(place); }

static const float LEAST = 1e-30f;  // a token without larger numbers counts as zeros

INLINE float value(float x) { return x; }
INLINE float value(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// Two bytes of a float16.
INLINE float half(const uint8_t* from) {
    uint16_t x;
    memcpy(&x, from, 2);
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
    uint32_t bits = sign | ((rest << 13) + 0x38000000);
    if (rest >= 0x7c00) bits += 0x38000000;  // infinity and NaN
    float out;
    if (rest < 0x0400) {  // zero and subnormal numbers
        out = (float)rest * 5.9604644775390625e-8f;
        return sign ? -out : out;
    }
    memcpy(&out, &bits, 4);
    return out;
}

INLINE float number(const void* from, int64_t i, int64_t item) {
    return item == 2 ? value(((const uint16_t*)from)[i]) : ((const float*)from)[i];
}

// To bfloat16, to nearest, ties to even.
INLINE uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE void put(void* to, int64_t i, float x, int64_t item) {
    if (item == 4) {
        ((float*)to)[i] = x;
        return;
    }
    ((uint16_t*)to)[i] = rounded(x);
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
