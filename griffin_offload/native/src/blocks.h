// GGUF's blocks -> float. Layouts and formulas: ggml-quants.c of llama.cpp. Every result is the same bit for bit as that
// of checkpoint/gguf/blocks.py: products of a half and of small integers are exact, and only the last step rounds.

TARGET static void q4_0(const uint8_t* block, float* out) {
    const float d = half(block);
    for (int k = 0; k < 16; k++) {
        out[k] = d * (float)((block[2 + k] & 15) - 8);
        out[16 + k] = d * (float)((block[2 + k] >> 4) - 8);
    }
}

TARGET static void q8_0(const uint8_t* block, float* out) {
    const float d = half(block);
    for (int k = 0; k < 32; k++) out[k] = d * (float)(int8_t)block[2 + k];
}

// Scale and minimum of group g, 6 bits each, of 12 bytes.
INLINE void pair_of_6_bits(const uint8_t* s, int g, int& scale, int& least) {
    if (g < 4) scale = s[g] & 63, least = s[g + 4] & 63;
    else scale = (s[g + 4] & 15) | (s[g - 4] >> 6 << 4), least = (s[g + 4] >> 4) | (s[g] >> 6 << 4);
}

// 8 groups of 32 with a scale and a minimum each: nibbles at `codes`, and, of five bits, the fifth ones at `fifth`.
TARGET INLINE void groups_of_32(const uint8_t* block, const uint8_t* codes, const uint8_t* fifth, float* out) {
    const float d = half(block), least = half(block + 2);
    for (int g = 0; g < 8; g++) {
        int s, m;
        pair_of_6_bits(block + 4, g, s, m);
        const float scale = d * (float)s, minimum = least * (float)m;
        const uint8_t* from = codes + g / 2 * 32;
        const int shift = g % 2 * 4;
        for (int k = 0; k < 32; k++)
            out[32 * g + k] = scale * (float)((from[k] >> shift & 15) | (fifth ? fifth[k] >> g & 1 : 0) << 4) - minimum;
    }
}

TARGET static void q4_k(const uint8_t* block, float* out) { groups_of_32(block, block + 16, nullptr, out); }

TARGET static void q5_k(const uint8_t* block, float* out) { groups_of_32(block, block + 48, block + 16, out); }

TARGET static void q6_k(const uint8_t* block, float* out) {
    const float d = half(block + 208);
    for (int g = 0; g < 8; g++) {  // 32 numbers: of half g / 4, the nibbles of place g % 4
        const int place = g % 4;
        const uint8_t* codes = block + g / 4 * 64 + place % 2 * 32;
        const uint8_t* upper = block + 128 + g / 4 * 32;
        const int8_t* scales = (const int8_t*)block + 192 + 2 * g;
        const int shift = place / 2 * 4, up = 2 * place;
        for (int h = 0; h < 2; h++) {
            const float scale = d * (float)scales[h];
            for (int k = 16 * h; k < 16 * h + 16; k++)
                out[32 * g + k] = scale * (float)(((codes[k] >> shift & 15) | (upper[k] >> up & 3) << 4) - 32);
        }
    }
}

TARGET static void round_all(const float* x, int64_t count, uint16_t* out) {
    for (int64_t k = 0; k < count; k++) out[k] = rounded(x[k]);
}
