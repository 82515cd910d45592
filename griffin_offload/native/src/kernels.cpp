// Products with int8 and int4 matrices, and what makes such matrices, by the instructions of x86 and ARM.
// A plain library without Python or torch: native/library.py loads it, and says which instructions to take.

#include "numbers.h"
#include "share.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include "x86.h"
#elif defined(__GNUC__) && defined(__aarch64__)
#include "neon.h"
#endif
#include "plain.h"

struct Kernels {
    const char* name;
    bool (*here)();
    void (*part[3])(const Work&, int64_t, int64_t);  // by Kind
    void (*token[3])(const Work&, int64_t);
    void (*unpack[5])(const uint8_t*, float*);  // by place in BLOCKS
    void (*round)(const float*, int64_t, uint16_t*);
    void (*to_int4)(const Rows&, int64_t, int64_t);
    void (*rms_norm)(const uint16_t*, const uint16_t*, int64_t, int64_t, float, int, uint16_t*);
};
enum Kind { INT8, INT4, INT8_WORDS };  // codes in rows; in blocks of 16 rows; in oneDNN's layout (avx512_vnni alone)
#define KERNELS(NAME, SPACE, PART, TOKEN)                                                                         \
    {NAME, SPACE::here, {SPACE::int8_part, SPACE::int4_part, PART}, {SPACE::to_int16, SPACE::to_int8, TOKEN},     \
     {SPACE::q4_0, SPACE::q8_0, SPACE::q4_k, SPACE::q5_k, SPACE::q6_k}, SPACE::round_all, SPACE::to_int4, SPACE::rms_norm}
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
static const struct {
    int64_t bytes, elements;
} BLOCKS[] = {{18, 32}, {34, 32}, {144, 256}, {176, 256}, {210, 256}};

// The name of a set of instructions, the best first; "" if this processor lacks it; null after the last.
EXPORT const char* griffin_instructions(int number) {
    return number >= COUNT ? nullptr : TABLE[number].here() ? TABLE[number].name : "";
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

// So many blocks of a kind, a place in BLOCKS -> numbers of `item` bytes: 2 is bfloat16, 4 float32.
EXPORT void griffin_unpack(const uint8_t* blocks, int64_t count, int number, int kind, void* out, int item) {
    const int64_t bytes = BLOCKS[kind].bytes, elements = BLOCKS[kind].elements;
    float numbers[256];
    for (int64_t i = 0; i < count; i++) {
        float* const to = item == 4 ? (float*)out + i * elements : numbers;
        TABLE[number].unpack[kind](blocks + i * bytes, to);
        if (item == 2) TABLE[number].round(to, elements, (uint16_t*)out + i * elements);
    }
}

// Rows -> int4. The last block is filled up with zeros.
EXPORT void griffin_to_int4(const Rows* rows, int number, Parallel parallel, unsigned threads) {
    share((rows->count + 15) / 16, 1, parallel, threads,
          [&](int64_t begin, int64_t end) { TABLE[number].to_int4(*rows, begin, end); });
}

// RMS norm of rows (rows, columns) in bfloat16. `way`: see norm.h.
EXPORT void griffin_rms_norm(const uint16_t* x, const uint16_t* weight, int64_t rows, int64_t columns, float eps, int way,
                             int number, uint16_t* out) {
    TABLE[number].rms_norm(x, weight, rows, columns, eps, way, out);
}
