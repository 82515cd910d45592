// RMS norm of rows (rows, columns) in bfloat16, as transformers' modules compute it in their several ways.

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// `way`: 0 rounds the normed number before it is multiplied by the weight, 1 multiplies by 1 + weight, 2 by the weight.
INLINE float normed(float x, float per, float weight, int way) {
    return way == 0 ? value(rounded(x * per)) * weight : x * per * (way == 1 ? 1 + weight : weight);
}

TARGET static void rms_norm(const uint16_t* x, const uint16_t* weight, int64_t rows, int64_t columns, float eps, int way, uint16_t* out) {
    for (int64_t r = 0; r < rows; r++, x += columns, out += columns) {
        Lanes squares = {};
        int64_t k = 0;
        for (; k + LANES <= columns; k += LANES) {
            Halves halves;
            memcpy(&halves, x + k, sizeof halves);
            const Lanes numbers = (Lanes)(__builtin_convertvector(halves, Bits) << 16);
            squares += numbers * numbers;
        }
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
        for (; k < columns; k++) sum += value(x[k]) * value(x[k]);
        const float per = 1 / std::sqrt(sum / (float)columns + eps);
        if (way == 0) for (k = 0; k < columns; k++) out[k] = rounded(normed(value(x[k]), per, value(weight[k]), 0));
        else if (way == 1) for (k = 0; k < columns; k++) out[k] = rounded(normed(value(x[k]), per, value(weight[k]), 1));
        else for (k = 0; k < columns; k++) out[k] = rounded(normed(value(x[k]), per, value(weight[k]), 2));
    }
}
