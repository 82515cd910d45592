// Rows -> int4 codes q, w = (q - 8) s + z, with scale s and zero z for each group of 32 columns, in the layout that
// products.h multiplies by. Results are the same bit for bit as those of quant/int4.py.

// Whether x are on a grid of n steps between their extremes, but for rounding: as numbers are that had 4 bits before.
TARGET static bool on_grid(const float* x, float least, float per) {
    for (int k = 0; k < 32; k += 8) {
        int off = 0;
        for (int j = k; j < k + 8; j++) {
            const float level = (x[j] - least) * per, away = level - ((level + 12582912.0f) - 12582912.0f);
            off |= away > OFF_GRID || away < -OFF_GRID;
        }
        if (off) return false;
    }
    return true;
}

// One group -> its codes, and scale and zero in bfloat16.
TARGET static void group_to_int4(const float* x, uint8_t* codes, uint16_t* pair) {
    float low[8], high[8];
    for (int j = 0; j < 8; j++) low[j] = high[j] = x[j];
    for (int k = 8; k < 32; k += 8)
        for (int j = 0; j < 8; j++) {
            low[j] = x[k + j] < low[j] ? x[k + j] : low[j];
            high[j] = x[k + j] > high[j] ? x[k + j] : high[j];
        }
    float least = low[0], most = high[0];
    for (int j = 1; j < 8; j++) least = low[j] < least ? low[j] : least, most = high[j] > most ? high[j] : most;
    int steps = 15;
    if (most > least)
        for (int n = 15; n >= FEWEST_STEPS; n--)
            if (on_grid(x, least, (float)n / (most - least))) {
                steps = n;
                break;
            }
    const float found = (most - least) / (float)steps;
    pair[0] = rounded(found > 1e-10f ? found : 1e-10f);
    const float scale = value(pair[0]);
    pair[1] = rounded(least + 8 * scale);
    const float per = 1 / scale, offset = 8 - value(pair[1]) * per;
    for (int k = 0; k < 32; k++) {
        const float level = x[k] * per + offset, above = level > 0 ? level : 0, within = above < 15 ? above : 15;
        const float shifted = within + 12582912.0f;  // 1.5 * 2^23: the low bits are the whole number
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        codes[k] = (uint8_t)bits;
    }
}

template <class In>
TARGET static void block_to_int4(const In* x, int64_t apart, int64_t rows, int64_t columns, uint8_t* codes, uint16_t* pairs) {
    const int64_t groups = (columns + 31) / 32;
    for (int64_t g = 0; g < groups; g++, codes += 256, pairs += 32) {
        const int64_t begin = 32 * g, count = columns - begin < 32 ? columns - begin : 32;
        for (int r = 0; r < 16; r++) {
            float group[32];
            uint8_t levels[32];
            if (r < rows && count == 32)
                for (int k = 0; k < 32; k++) group[k] = value(x[r * apart + begin + k]);
            else
                for (int k = 0; k < 32; k++) group[k] = r < rows && k < count ? value(x[r * apart + begin + k]) : 0;
            group_to_int4(group, levels, pairs + 2 * r);
            for (int s = 0; s < 4; s++)
                for (int b = 0; b < 4; b++)
                    codes[(s * 16 + r) * 4 + b] = levels[4 * s + b] | levels[16 + 4 * s + b] << 4;
        }
    }
}

// Blocks [begin, end) of 16 rows.
TARGET static void to_int4(const Rows& rows, int64_t begin, int64_t end) {
    const int64_t groups = (rows.columns + 31) / 32;
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = 16 * block, count = rows.count - first < 16 ? rows.count - first : 16;
        uint8_t* codes = rows.codes + block * groups * 256;
        uint16_t* pairs = rows.pairs + block * groups * 32;
        if (rows.item == 2)
            block_to_int4((const uint16_t*)rows.x + first * rows.apart, rows.apart, count, rows.columns, codes, pairs);
        else block_to_int4((const float*)rows.x + first * rows.apart, rows.apart, count, rows.columns, codes, pairs);
    }
}
