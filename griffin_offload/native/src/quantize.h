// Rows -> int4 codes q, w = (q - 8) s + z, with scale s and zero z for each group of 32 columns, in the layout that
// products.h multiplies by. Results are the same bit for bit as those of quant/int4.py.

typedef float Lanes __attribute__((vector_size(4 * LANES)));  // a number of each of so many rows
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

TARGET INLINE Lanes of_all(float x) { return x - Lanes{}; }
TARGET INLINE bool any(const Bits& x) {
    int32_t some = 0;
    for (int r = 0; r < LANES; r++) some |= x[r];
    return some != 0;
}

// A group of each row, x[column], and its extremes -> the steps between them: 15, or fewer if all numbers lie on a grid
// of these, but for rounding, as numbers do that had 4 bits before.
TARGET INLINE Lanes grid_steps(const Lanes* x, const Lanes& least, const Lanes& most) {
    const Lanes to_whole = of_all(TO_WHOLE), width = most - least;
    Lanes steps = of_all(15);
    Bits searching = width > 0;
    for (int n = 15; n >= FEWEST_STEPS && any(searching); n--) {
        const Lanes per = of_all(n) / width;
        Bits on = searching;
        for (int first = 0; first < 32 && any(on); first += 8)
            for (int k = first; k < first + 8; k++) {
                const Lanes level = (x[k] - least) * per, off = level - ((level + to_whole) - to_whole);
                on &= (off <= OFF_GRID) & (off >= -OFF_GRID);
            }
        steps = on ? of_all(n) : steps;
        searching &= ~on;
    }
    return steps;
}

// A group of LANES rows, from numbers[column] on -> codes, and pairs of scale and zero in bfloat16.
TARGET INLINE void groups_to_int4(const float (*numbers)[16], uint32_t* codes, uint16_t* pairs) {
    Lanes x[32];
    for (int k = 0; k < 32; k++) memcpy(x + k, numbers[k], sizeof *x);
    Lanes least = x[0], most = x[0], scale, zero;
    for (int k = 1; k < 32; k++) {
        least = x[k] < least ? x[k] : least;
        most = x[k] > most ? x[k] : most;
    }
    const Lanes step = (most - least) / grid_steps(x, least, most);
    for (int r = 0; r < LANES; r++) {
        pairs[2 * r] = rounded(step[r] > 1e-10f ? step[r] : 1e-10f);
        scale[r] = value(pairs[2 * r]);
        pairs[2 * r + 1] = rounded(least[r] + 8 * scale[r]);
        zero[r] = value(pairs[2 * r + 1]);
    }
    const Lanes per = 1 / scale, offset = 8 - zero * per;
    for (int s = 0; s < 4; s++, codes += 16) {
        Bits words = {};
        for (int b = 0; b < 8; b++) {  // columns 4 s + b of the low nibbles, then 16 + 4 s + b of the high ones
            const Lanes level = x[4 * s + b % 4 + b / 4 * 16] * per + offset;
            const Lanes above = level > 0 ? level : Lanes{}, within = above < 15 ? above : of_all(15);
            words |= ((Bits)(within + TO_WHOLE) & 15) << (b % 4 * 8 + b / 4 * 4);
        }
        memcpy(codes, &words, sizeof words);
    }
}

template <class In>
TARGET static void block_to_int4(const In* rows, int64_t apart, int64_t count, int64_t columns, uint32_t* codes, uint16_t* pairs) {
    for (int64_t begin = 0; begin < columns; begin += 32, codes += 64, pairs += 32) {
        float x[32][16];
        const int64_t width = columns - begin < 32 ? columns - begin : 32;
        if (count < 16 || width < 32) memset(x, 0, sizeof x);
        for (int64_t r = 0; r < count; r++) {
            const In* from = rows + r * apart + begin;
            ahead(from + 512);
            for (int64_t k = 0; k < width; k++) x[k][r] = value(from[k]);
        }
        for (int r = 0; r < 16; r += LANES)
            groups_to_int4((const float(*)[16])(x[0] + r), codes + r, pairs + 2 * r);
    }
}

// Blocks [begin, end) of 16 rows.
TARGET static void to_int4(const Rows& rows, int64_t begin, int64_t end) {
    const int64_t groups = (rows.columns + 31) / 32;
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = 16 * block, count = rows.count - first < 16 ? rows.count - first : 16;
        uint32_t* codes = (uint32_t*)rows.codes + block * groups * 64;
        uint16_t* pairs = rows.pairs + block * groups * 32;
        if (rows.item == 2)
            block_to_int4((const uint16_t*)rows.x + first * rows.apart, rows.apart, count, rows.columns, codes, pairs);
        else block_to_int4((const float*)rows.x + first * rows.apart, rows.apart, count, rows.columns, codes, pairs);
    }
}
