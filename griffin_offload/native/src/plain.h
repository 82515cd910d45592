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
#include "blocks.h"
#include "quantize.h"
#include "norm.h"
#undef TARGET
}  // namespace plain
