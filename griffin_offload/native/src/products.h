// Products of tokens with int8 and int4 matrices, for one instruction set. x86.h, neon.h and plain.h include this, in a
// namespace of its own, with TARGET (an attribute of every function), LANES (32-bit lanes of a vector), I and F (vectors
// of int32 and float), and the functions that are used below.

// R rows of int8 codes (R, columns) x T tokens of int16 (T, stride), padded with zeros -> sums (R, T), not yet scaled.
template <int R, int T>
TARGET static void int8_tile(const int8_t* codes, int64_t columns, const int16_t* tokens, int64_t stride, float* sums) {
    const int64_t step = 2 * LANES, whole = columns / step * step;
    F total[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) total[r][t] = zero_f();
    for (int64_t begin = 0; begin < columns; begin += 512 * LANES) {  // a lane's sum of 512 products fits int32
        I sum[R][T];
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sum[r][t] = zero_i();
        const int64_t end = begin + 512 * LANES < whole ? begin + 512 * LANES : whole;
        for (int64_t k = begin; k < end; k += step) {
            I row[R];
            if (k % 64 == 0)
                for (int r = 0; r < R; r++) ahead(codes + (R + r) * columns + k);  // the next rows
            for (int r = 0; r < R; r++) row[r] = widen(codes + r * columns + k);
            for (int t = 0; t < T; t++) {
                const I x = load(tokens + t * stride + k);
                for (int r = 0; r < R; r++) sum[r][t] = dot16(sum[r][t], row[r], x);
            }
        }
        if (end == whole && whole < columns && begin + 512 * LANES >= columns)
            for (int r = 0; r < R; r++) {
                int8_t last[2 * LANES] = {};
                memcpy(last, codes + r * columns + whole, columns - whole);
                for (int t = 0; t < T; t++)
                    sum[r][t] = dot16(sum[r][t], widen(last), load(tokens + t * stride + whole));
            }
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) total[r][t] = add(total[r][t], to_float(sum[r][t]));
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sums[r * T + t] = across(total[r][t]);
}

template <int R, int T>
TARGET static void int8_rows(const Work& work, int64_t begin, int64_t end, int64_t first) {
    float sums[R * T];
    for (int64_t n = begin; n < end; n += R) {
        int8_tile<R, T>((const int8_t*)work.codes + n * work.columns, work.columns,
                        work.levels16 + first * work.stride, work.stride, sums);
        for (int r = 0; r < R; r++) {
            const float scale = number(work.scales, n + r, work.item);
            for (int t = 0; t < T; t++)
                put(work.out, (first + t) * work.rows + n + r, scale * work.steps[first + t] * sums[r * T + t], work.item);
        }
    }
}

// Rows [begin, end) x all tokens, four at a time.
TARGET static void int8_part(const Work& work, int64_t begin, int64_t end) {
    const int64_t twos = begin + (end - begin) / 2 * 2, fours = begin + (end - begin) / 4 * 4;
    int64_t first = 0;
    for (; first + 4 <= work.tokens; first += 4) {
        int8_rows<2, 4>(work, begin, twos, first);
        int8_rows<1, 4>(work, twos, end, first);
    }
    for (; first + 2 <= work.tokens; first += 2) {
        int8_rows<4, 2>(work, begin, fours, first);
        int8_rows<1, 2>(work, fours, end, first);
    }
    if (first < work.tokens) {
        int8_rows<4, 1>(work, begin, fours, first);
        int8_rows<1, 1>(work, fours, end, first);
    }
}

// A block of 16 rows of int4 codes x T tokens of int8. A lane has a row, so that no sum crosses lanes. For each group of
// 32 columns there are 4 steps of 16 rows x 4 bytes: byte b of step s has column 4 s + b, and 16 + 4 s + b above it.
template <int T>
TARGET static void int4_tile(const Work& work, int64_t block, int64_t first) {
    const int W = 16 / LANES;
    const int64_t groups = work.stride / 32;
    const uint8_t* codes = (const uint8_t*)work.codes + block * groups * 256;
    const uint16_t* scales = work.scales16 + block * groups * 32;
    const int8_t* tokens = work.levels8 + first * work.stride;
    const float* steps = work.steps + first * groups;
    const float* totals = work.totals + first * groups;
    F sum[T][W];
    for (int t = 0; t < T; t++)
        for (int w = 0; w < W; w++) sum[t][w] = zero_f();
    for (int64_t g = 0; g < groups; g++, codes += 256, scales += 32, tokens += 32) {
        if (first == 0) {  // later tokens find the block in the cache
            for (int line = 0; line < 4; line++) ahead(codes + AHEAD + 64 * line);
            ahead((const uint8_t*)scales + AHEAD / 4);
        }
        I dot[T][W];
        for (int t = 0; t < T; t++)
            for (int w = 0; w < W; w++) dot[t][w] = zero_i();
        for (int s = 0; s < 4; s++) {
            I low[W], high[W];
            for (int w = 0; w < W; w++) {
                const I both = load(codes + s * 64 + w * 4 * LANES);
                low[w] = low_halves(both), high[w] = high_halves(both);
            }
            for (int t = 0; t < T; t++) {
                const I x = repeat(tokens + t * work.stride + 4 * s), y = repeat(tokens + t * work.stride + 16 + 4 * s);
                for (int w = 0; w < W; w++) dot[t][w] = dot8(dot8(dot[t][w], low[w], x), high[w], y);
            }
        }
        for (int w = 0; w < W; w++) {
            F scale, zero;
            load_pairs(scales + w * 2 * LANES, scale, zero);
            for (int t = 0; t < T; t++) {  // scale (step dot - 8 total) + zero total, where total is the sum of the group
                const float total = totals[t * groups + g];
                const F from_middle = fma(all(steps[t * groups + g]), to_float(dot8_sum(dot[t][w])), all(-8 * total));
                sum[t][w] = fma(scale, from_middle, fma(zero, all(total), sum[t][w]));
            }
        }
    }
    float out[16];
    const int64_t row = block * 16, count = work.rows - row < 16 ? work.rows - row : 16;
    for (int t = 0; t < T; t++) {
        for (int w = 0; w < W; w++) store(out + w * LANES, sum[t][w]);
        for (int r = 0; r < count; r++) put(work.out, (first + t) * work.rows + row + r, out[r], work.item);
    }
}

// Blocks [begin, end) of 16 rows x all tokens, four at a time.
TARGET static void int4_part(const Work& work, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        int64_t first = 0;
        for (; first + 4 <= work.tokens; first += 4) int4_tile<4>(work, block, first);
        for (; first + 2 <= work.tokens; first += 2) int4_tile<2>(work, block, first);
        if (first < work.tokens) int4_tile<1>(work, block, first);
    }
}

// Token t -> int16 with one step.
TARGET static void to_int16(const Work& work, int64_t t) {
    int16_t* out = work.levels16 + t * work.stride;
    const float largest = magnitude(work, t, 0, work.columns);
    const float per = largest > LEAST ? 32767 / largest : 0;
    if (work.item == 2) round_to<int16_t>((const uint16_t*)work.x + t * work.apart, per, work.columns, out);
    else round_to<int16_t>((const float*)work.x + t * work.apart, per, work.columns, out);
    for (int64_t k = work.columns; k < work.stride; k++) out[k] = 0;
    work.steps[t] = largest / 32767;
}

// Token t -> int8 with a step, and the sum of its levels times the step, for each group of 32.
TARGET static void to_int8(const Work& work, int64_t t) {
    const int64_t groups = work.stride / 32;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = 32 * g, count = work.columns - begin < 32 ? work.columns - begin : 32;
        int8_t* out = work.levels8 + t * work.stride + begin;
        const float largest = magnitude(work, t, begin, count);
        const float per = largest > LEAST ? 127 / largest : 0;
        if (work.item == 2) round_to<int8_t>((const uint16_t*)work.x + t * work.apart + begin, per, count, out);
        else round_to<int8_t>((const float*)work.x + t * work.apart + begin, per, count, out);
        for (int64_t k = count; k < 32; k++) out[k] = 0;
        int total = 0;
        for (int64_t k = 0; k < 32; k++) total += out[k];
        work.steps[t * groups + g] = largest / 127;
        work.totals[t * groups + g] = largest / 127 * total;
    }
}

#ifdef BYTES_OF_TOKENS
// A block of 64 rows of int8 codes in oneDNN's layout (quant/onednn.py) x T tokens of 16 bits, as their low and their high
// bytes. A lane has a row. Behind all codes are the negative sums of the rows.
template <int T>
TARGET static void words_tile(const Work& work, int64_t block, int64_t first) {
    const int W = 64 / LANES;
    const int8_t* codes = (const int8_t*)work.codes + block * 64 * work.stride;
    const int8_t* tokens = work.levels8 + first * 2 * work.stride;
    const int8_t* sums = (const int8_t*)work.codes + (work.rows + 63) / 64 * 64 * work.stride + block * 64 * 4;
    I low[T][W], high[T][W];
    for (int t = 0; t < T; t++)
        for (int w = 0; w < W; w++) {  // both bytes are 128 too large
            const I sum = load(sums + w * 4 * LANES);
            low[t][w] = high[t][w] = times128(sum);
        }
    for (int64_t k = 0; k < work.stride; k += 4, codes += 256) {
        for (int line = 0; line < 4; line++) ahead(codes + AHEAD + 64 * line);
        for (int t = 0; t < T; t++) {
            const I x = repeat(tokens + 2 * t * work.stride + k), y = repeat(tokens + (2 * t + 1) * work.stride + k);
            for (int w = 0; w < W; w++) {
                const I row = load(codes + w * 4 * LANES);
                low[t][w] = dot8(low[t][w], x, row), high[t][w] = dot8(high[t][w], y, row);
            }
        }
    }
    float out[64];
    const int64_t row = block * 64, count = work.rows - row < 64 ? work.rows - row : 64;
    for (int t = 0; t < T; t++) {
        for (int w = 0; w < W; w++) store(out + w * LANES, fma(to_float(high[t][w]), all(256), to_float(low[t][w])));
        for (int r = 0; r < count; r++)
            put(work.out, (first + t) * work.rows + row + r,
                ((const float*)work.scales)[row + r] * work.steps[first + t] * out[r], work.item);
    }
}

// Blocks [begin, end) of 64 rows x all tokens, two at a time.
TARGET static void words_part(const Work& work, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        int64_t first = 0;
        for (; first + 2 <= work.tokens; first += 2) words_tile<2>(work, block, first);
        if (first < work.tokens) words_tile<1>(work, block, first);
    }
}

// Token t -> 16 bits with one step, as low bytes, then high bytes; zero is 128 in both.
TARGET static void to_bytes(const Work& work, int64_t t) {
    int8_t *low = work.levels8 + t * 2 * work.stride, *high = low + work.stride;
    const float largest = magnitude(work, t, 0, work.columns);
    const float per = largest > LEAST ? 32639 / largest : 0;
    if (work.item == 2) round_to_bytes((const uint16_t*)work.x + t * work.apart, per, work.columns, low, high);
    else round_to_bytes((const float*)work.x + t * work.apart, per, work.columns, low, high);
    for (int64_t k = work.columns; k < work.stride; k++) low[k] = high[k] = 0;
    work.steps[t] = largest / 32639;
}
#endif
