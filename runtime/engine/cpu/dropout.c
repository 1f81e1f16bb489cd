/* Leaving elements out of a matrix (dropout.py), compiled once per machine by native_dropout.py.

   A word of SplitMix64's stream (Steele, Lea and Flood 2014) decides about four neighbours in a row: each of its 16-bit
   parts, as a signed number, is compared with a threshold. */

#include <stdint.h>
#include <string.h>

enum {
    PARALLEL = 1 << 15, /* elements below which a second core does not pay */
    BATCH = 64          /* words that are drawn at a time */
};
static const uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* out = x with zeros where a chance is below the threshold: `rows` rows of a matrix, from its row `first` on, whose elements
   lie side by side and whose rows lie so many elements apart; out may be x. */
#define LEAVE_OUT(bits)                                                                                                \
    void tightfit_leave_out_##bits(const int##bits##_t *x, int64_t x_stride, int##bits##_t *out, int64_t out_stride,   \
                                   int64_t rows, int64_t columns, int64_t first, uint64_t key, int threshold) {        \
        const uint64_t words = (uint64_t)(columns + 3) / 4;                                                            \
        _Pragma("omp parallel for schedule(static) if (rows * columns > PARALLEL)") for (int64_t r = 0; r < rows;      \
                                                                                         r++) {                        \
            const int##bits##_t *from = x + r * x_stride;                                                              \
            int##bits##_t *to = out + r * out_stride;                                                                  \
            uint64_t state = key + (uint64_t)(first + r) * words * GOLDEN;                                             \
            for (int64_t c = 0; c < columns; c += 4 * BATCH) {                                                         \
                uint64_t drawn[BATCH];                                                                                 \
                int16_t chances[4 * BATCH];                                                                            \
                for (int w = 0; w < BATCH; w++)                                                                        \
                    drawn[w] = mix(state + (uint64_t)(w + 1) * GOLDEN);                                                \
                state += BATCH * GOLDEN;                                                                               \
                memcpy(chances, drawn, sizeof drawn);                                                                  \
                const int64_t count = columns - c < 4 * BATCH ? columns - c : 4 * BATCH;                               \
                _Pragma("GCC ivdep") for (int64_t i = 0; i < count; i++) to[c + i] =                                   \
                    chances[i] >= threshold ? from[c + i] : 0;                                                         \
            }                                                                                                          \
        }                                                                                                              \
    }

LEAVE_OUT(16)
LEAVE_OUT(32)
