/* Unpacking of quantised groups (layout.py), and their products with one row of activations, compiled once per machine by
   native.py.

   A group with 4-bit codes has sixteen possible values: they are computed and rounded once, and every nibble picks one.
   Products of a code and a float16 scale are exact in float32, so each value is rounded exactly where PyTorch's path
   rounds it, and the results are equal bit for bit. Groups are even, as PyTorch's path needs them. The blocks q5_0 to
   q6_k and mxfp4 are those of llama.cpp (ggml-common.h), whose codes are gathered into bytes first. */

#include <stdint.h>
#include <string.h>
#ifdef __SSSE3__
#include <immintrin.h>
#endif

enum { PARALLEL = 1 << 15 }; /* elements below which a second core does not pay */
enum { LARGEST_GROUP = 256 }; /* elements of a group of which products can be made */

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

#ifdef __F16C__

static float half(const uint8_t *at) {
    uint16_t h;
    memcpy(&h, at, 2);
    return _cvtsh_ss(h);
}

#else

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float half(const uint8_t *at) {
    uint16_t h;
    memcpy(&h, at, 2);
    float magnitude = from_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f; /* exact, subnormals included */
    if (magnitude >= 65536.0f)
        magnitude = from_bits(to_bits(magnitude) | 0x7f800000u);
    return from_bits(to_bits(magnitude) | (uint32_t)(h & 0x8000) << 16);
}

#endif

static uint16_t bfloat16(float value) {
    uint32_t bits = to_bits(value);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));

/* The sixteen values of a group with 4-bit codes, from what comes after its nibbles. */

static const floats CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const floats NF4 = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                           -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                           0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                           0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

static inline void values_q4(const uint8_t *at, floats *value) { *value = CODES * half(at) + half(at + 2); }

static inline void values_q4_zero(const uint8_t *at, floats *value) { *value = (CODES - (float)at[2]) * half(at); }

static inline void values_nf4(const uint8_t *at, floats *value) {
    float scale;
    memcpy(&scale, at, 4);
    *value = NF4 * scale;
}

/* Rounds to bfloat16; NaN, which no packed weight holds, may differ from `bfloat16`. */
static inline void round_all(const floats *value, shorts *to) {
    words bits;
    memcpy(&bits, value, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *to = __builtin_convertvector(bits, shorts);
}

/* out[e] is the value of nibble e, for `group` of them. */
#ifdef __AVX512BW__

static inline void pick(const uint8_t *packed, const shorts *values, uint16_t *out, int group) {
    const shorts value = *values;
    const __m512i table = _mm512_broadcast_i64x4((__m256i)value);
    int j = 0;
    for (; 2 * j + 32 <= group; j += 16) {
        /* Of a 16-bit index only the low five bits count, and of those, the table being there twice, four. */
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + j)));
        const __m512i picked = _mm512_permutexvar_epi16(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), table);
        _mm512_storeu_si512(out + 2 * j, picked);
    }
    for (; 2 * j < group; j++) {
        out[2 * j] = value[packed[j] & 15];
        out[2 * j + 1] = value[packed[j] >> 4];
    }
}

#else

typedef uint8_t bytes __attribute__((vector_size(16)));

static inline void pick(const uint8_t *packed, const shorts *values, uint16_t *out, int group) {
    const shorts value = *values;
    int j = 0;
#ifdef __SSSE3__
    const bytes low = __builtin_convertvector(value & 255, bytes), high = __builtin_convertvector(value >> 8, bytes);
    const __m128i mask = _mm_set1_epi8(15);
    for (; 2 * j + 32 <= group; j += 16) {
        const __m128i pairs = _mm_loadu_si128((const __m128i *)(packed + j));
        const __m128i even = _mm_and_si128(pairs, mask), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        for (int part = 0; part < 2; part++) {
            const __m128i codes16 = part ? _mm_unpackhi_epi8(even, odd) : _mm_unpacklo_epi8(even, odd);
            const __m128i first = _mm_shuffle_epi8((__m128i)low, codes16), second = _mm_shuffle_epi8((__m128i)high, codes16);
            __m128i *to = (__m128i *)(out + 2 * j + 16 * part);
            _mm_storeu_si128(to, _mm_unpacklo_epi8(first, second));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(first, second));
        }
    }
#endif
    for (; 2 * j < group; j++) {
        out[2 * j] = value[packed[j] & 15];
        out[2 * j + 1] = value[packed[j] >> 4];
    }
}

#endif

/* The same for values that are not rounded. */
static inline void pick_wide(const uint8_t *packed, const floats *values, float *out, int group) {
    const floats value = *values;
    int j = 0;
#ifdef __AVX512F__
    const __m512i shifts = _mm512_set_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
    for (; 2 * j + 16 <= group; j += 8) {
        /* Each byte twice, shifted to its lower and to its upper nibble; of an index only the low four bits count. */
        const __m128i bytes8 = _mm_loadl_epi64((const __m128i *)(packed + j));
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes8, bytes8));
        _mm512_storeu_ps(out + 2 * j, _mm512_permutexvar_ps(_mm512_srlv_epi32(pairs, shifts), (__m512)value));
    }
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps((const float *)&value), high = _mm256_loadu_ps((const float *)&value + 8);
    const __m256i shifts = _mm256_set_epi32(4, 0, 4, 0, 4, 0, 4, 0);
    for (; 2 * j + 8 <= group; j += 4) {
        int32_t four;
        memcpy(&four, packed + j, 4);
        const __m128i bytes4 = _mm_cvtsi32_si128(four);
        const __m256i pairs = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes4, bytes4));
        const __m256i index = _mm256_srlv_epi32(pairs, shifts); /* of which a lookup counts three bits */
        const __m256 first = _mm256_permutevar8x32_ps(low, index), second = _mm256_permutevar8x32_ps(high, index);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* the sign is the fourth bit */
        _mm256_storeu_ps(out + 2 * j, _mm256_blendv_ps(first, second, upper));
    }
#endif
    for (; 2 * j < group; j++) {
        out[2 * j] = value[packed[j] & 15];
        out[2 * j + 1] = value[packed[j] >> 4];
    }
}

#define NIBBLES(name)                                                                                                  \
    static inline void group_##name##_bfloat16(const uint8_t *packed, uint16_t *out, int group) {                      \
        floats value;                                                                                                  \
        shorts rounded;                                                                                                \
        values_##name(packed + group / 2, &value);                                                                     \
        round_all(&value, &rounded);                                                                                   \
        pick(packed, &rounded, out, group);                                                                            \
    }                                                                                                                  \
    static inline void group_##name##_float32(const uint8_t *packed, float *out, int group) {                          \
        floats value;                                                                                                  \
        values_##name(packed + group / 2, &value);                                                                     \
        pick_wide(packed, &value, out, group);                                                                         \
    }

NIBBLES(q4)
NIBBLES(q4_zero)
NIBBLES(nf4)

/* Groups with a byte for each code. */

static inline void group_q8_bfloat16(const uint8_t *packed, uint16_t *out, int group) {
    const float scale = half(packed);
    for (int e = 0; e < group; e++)
        out[e] = bfloat16((float)(int8_t)packed[2 + e] * scale);
}

/* Sixteen signed bytes as numbers. */
static inline void numbers(const uint8_t *at, floats *to) {
#if defined(__AVX512F__)
    *to = (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(__AVX2__)
    for (int part = 0; part < 2; part++) {
        const __m128i eight = _mm_loadl_epi64((const __m128i *)(at + 8 * part));
        _mm256_storeu_ps((float *)to + 8 * part, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
    }
#else
    for (int e = 0; e < 16; e++)
        (*to)[e] = (float)(int8_t)at[e];
#endif
}

static inline void group_q8_float32(const uint8_t *packed, float *out, int group) {
    const float scale = half(packed);
    int e = 0;
    for (; e + 16 <= group; e += 16) {
        floats value;
        numbers(packed + 2 + e, &value);
        value *= scale;
        memcpy(out + e, &value, sizeof value);
    }
    for (; e < group; e++)
        out[e] = (float)(int8_t)packed[2 + e] * scale;
}

static const float INT8_STEP = 7.874015718698502e-3f;

static inline void group_int8_bfloat16(const uint8_t *packed, uint16_t *out, int group) {
    float scale;
    memcpy(&scale, packed, 4);
    for (int e = 0; e < group; e++)
        out[e] = bfloat16((float)(int8_t)packed[4 + e] * scale * INT8_STEP);
}

static inline void group_int8_float32(const uint8_t *packed, float *out, int group) {
    float scale;
    memcpy(&scale, packed, 4);
    int e = 0;
    for (; e + 16 <= group; e += 16) {
        floats value;
        numbers(packed + 4 + e, &value);
        value = value * scale * INT8_STEP;
        memcpy(out + e, &value, sizeof value);
    }
    for (; e < group; e++)
        out[e] = (float)(int8_t)packed[4 + e] * scale * INT8_STEP;
}

/* llama.cpp's blocks. Each is opened into codes, and a scale and what is subtracted for each run of them. */

typedef struct {
    int8_t code[256];
    float scale[16], least[16];
} block;

static inline void open_q5_0(const uint8_t *packed, block *to) {
    uint32_t high;
    memcpy(&high, packed + 2, 4);
    for (int j = 0; j < 16; j++) {
        to->code[j] = (int8_t)(((packed[6 + j] & 15) | (high >> j & 1) << 4) - 16);
        to->code[j + 16] = (int8_t)(((packed[6 + j] >> 4) | (high >> (j + 16) & 1) << 4) - 16);
    }
    to->scale[0] = half(packed);
    to->least[0] = 0;
}

static inline void open_q5_1(const uint8_t *packed, block *to) {
    uint32_t high;
    memcpy(&high, packed + 4, 4);
    for (int j = 0; j < 16; j++) {
        to->code[j] = (int8_t)((packed[8 + j] & 15) | (high >> j & 1) << 4);
        to->code[j + 16] = (int8_t)((packed[8 + j] >> 4) | (high >> (j + 16) & 1) << 4);
    }
    to->scale[0] = half(packed);
    to->least[0] = -half(packed + 2);
}

static inline void open_q2_k(const uint8_t *packed, block *to) {
    const float scale = half(packed + 80), least = half(packed + 82);
    for (int r = 0; r < 16; r++) {
        to->scale[r] = scale * (float)(packed[r] & 15);
        to->least[r] = least * (float)(packed[r] >> 4);
    }
    for (int part = 0; part < 8; part++)
        for (int j = 0; j < 32; j++)
            to->code[32 * part + j] = (int8_t)(packed[16 + 32 * (part / 4) + j] >> 2 * (part % 4) & 3);
}

static inline void open_q3_k(const uint8_t *packed, block *to) {
    const float scale = half(packed + 108);
    for (int r = 0; r < 16; r++) {
        const int low = packed[96 + r % 8] >> 4 * (r / 8) & 15, high = packed[104 + r % 4] >> 2 * (r / 4) & 3;
        to->scale[r] = scale * (float)((low | high << 4) - 32);
        to->least[r] = 0;
    }
    for (int part = 0; part < 8; part++)
        for (int j = 0; j < 32; j++) {
            const int low = packed[32 + 32 * (part / 4) + j] >> 2 * (part % 4) & 3;
            to->code[32 * part + j] = (int8_t)((low | (packed[j] >> part & 1) << 2) - 4);
        }
}

/* Scales and minima of the runs of a q4_k or q5_k block. */
static inline void open_runs(const uint8_t *packed, block *to) {
    const float scale = half(packed), least = half(packed + 2);
    const uint8_t *at = packed + 4;
    for (int r = 0; r < 4; r++) {
        to->scale[r] = scale * (float)(at[r] & 63);
        to->least[r] = least * (float)(at[r + 4] & 63);
        to->scale[r + 4] = scale * (float)((at[r + 8] & 15) | (at[r] >> 2 & 48));
        to->least[r + 4] = least * (float)(at[r + 8] >> 4 | (at[r + 4] >> 2 & 48));
    }
}

static inline void open_q4_k(const uint8_t *packed, block *to) {
    open_runs(packed, to);
    for (int part = 0; part < 4; part++)
        for (int j = 0; j < 32; j++) {
            to->code[64 * part + j] = (int8_t)(packed[16 + 32 * part + j] & 15);
            to->code[64 * part + 32 + j] = (int8_t)(packed[16 + 32 * part + j] >> 4);
        }
}

static inline void open_q5_k(const uint8_t *packed, block *to) {
    open_runs(packed, to);
    for (int part = 0; part < 4; part++)
        for (int j = 0; j < 32; j++) {
            const uint8_t low = packed[48 + 32 * part + j], high = packed[16 + j];
            to->code[64 * part + j] = (int8_t)((low & 15) | (high >> 2 * part & 1) << 4);
            to->code[64 * part + 32 + j] = (int8_t)(low >> 4 | (high >> (2 * part + 1) & 1) << 4);
        }
}

static inline void open_q6_k(const uint8_t *packed, block *to) {
    const float scale = half(packed + 208);
    for (int r = 0; r < 16; r++) {
        to->scale[r] = scale * (float)(int8_t)packed[192 + r];
        to->least[r] = 0;
    }
    for (int part = 0; part < 2; part++)
        for (int j = 0; j < 32; j++) {
            const uint8_t *low = packed + 64 * part + j, high = packed[128 + 32 * part + j];
            int8_t *code = to->code + 128 * part + j;
            code[0] = (int8_t)(((low[0] & 15) | (high & 3) << 4) - 32);
            code[32] = (int8_t)(((low[32] & 15) | (high >> 2 & 3) << 4) - 32);
            code[64] = (int8_t)((low[0] >> 4 | (high >> 4 & 3) << 4) - 32);
            code[96] = (int8_t)((low[32] >> 4 | high >> 6 << 4) - 32);
        }
}

static inline void open_mxfp4(const uint8_t *packed, block *to) {
    static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const uint32_t bits = packed[0] < 2 ? 0x200000u << packed[0] : (uint32_t)(packed[0] - 1) << 23;
    memcpy(&to->scale[0], &bits, 4);
    to->least[0] = 0;
    for (int j = 0; j < 16; j++) {
        to->code[j] = twice[packed[1 + j] & 15];
        to->code[16 + j] = twice[packed[1 + j] >> 4];
    }
}

#define BLOCK(name, elements, run)                                                                                     \
    static __attribute__((noinline)) void group_##name##_float32(const uint8_t *packed, float *out, int group) {       \
        block opened;                                                                                                  \
        (void)group;                                                                                                   \
        open_##name(packed, &opened);                                                                                  \
        for (int r = 0; r < (elements) / (run); r++)                                                                   \
            for (int e = r * (run); e < (r + 1) * (run); e++)                                                          \
                out[e] = (float)opened.code[e] * opened.scale[r] - opened.least[r];                                    \
    }                                                                                                                  \
    static inline void group_##name##_bfloat16(const uint8_t *packed, uint16_t *out, int group) {                      \
        float wide[elements];                                                                                          \
        group_##name##_float32(packed, wide, group);                                                                   \
        for (int e = 0; e < (elements); e++)                                                                           \
            out[e] = bfloat16(wide[e]);                                                                                \
    }

BLOCK(q5_0, 32, 32)
BLOCK(q5_1, 32, 32)
BLOCK(q2_k, 256, 16)
BLOCK(q3_k, 256, 16)
BLOCK(q4_k, 256, 32)
BLOCK(q5_k, 256, 32)
BLOCK(q6_k, 256, 16)
BLOCK(mxfp4, 32, 32)

/* `groups` groups of `group` elements, `stride` bytes apart in `packed`, into `out`. */
#define UNPACK(name, type)                                                                                             \
    void tightfit_##name(const uint8_t *packed, type *out, int64_t groups, int group, int stride) {                    \
        _Pragma("omp parallel for schedule(static) if (groups * group > PARALLEL)") for (int64_t g = 0; g < groups;    \
                                                                                         g++)                          \
            group_##name(packed + g * stride, out + g * group, group);                                                 \
    }

/* y[r] = the sum of x[e] times row r, which has `groups` groups: a group at a time is unpacked, and stays in registers or in
   the first cache. Sums are made in the same order whatever the number of threads. `group` is a constant where it is called,
   for the usual sizes. */
#define DOT(name)                                                                                                      \
    static inline __attribute__((always_inline)) float dot_##name(const uint8_t *row, const float *x, int groups,      \
                                                                  int group, int stride) {                             \
        floats first = {0}, second = {0};                                                                              \
        float wide[LARGEST_GROUP] __attribute__((aligned(64))), rest = 0;                                              \
        for (int g = 0; g < groups; g++, row += stride, x += group) {                                                  \
            floats of_x, of_row;                                                                                       \
            group_##name##_float32(row, wide, group);                                                                  \
            int e = 0;                                                                                                 \
            for (; e + 32 <= group; e += 32) {                                                                         \
                memcpy(&of_x, x + e, sizeof of_x);                                                                     \
                memcpy(&of_row, wide + e, sizeof of_row);                                                              \
                first += of_x * of_row;                                                                                \
                memcpy(&of_x, x + e + 16, sizeof of_x);                                                                \
                memcpy(&of_row, wide + e + 16, sizeof of_row);                                                         \
                second += of_x * of_row;                                                                               \
            }                                                                                                          \
            for (; e < group; e++)                                                                                     \
                rest += x[e] * wide[e];                                                                                \
        }                                                                                                              \
        first += second;                                                                                               \
        for (int lane = 0; lane < 16; lane++)                                                                          \
            rest += first[lane];                                                                                       \
        return rest;                                                                                                   \
    }                                                                                                                  \
    void tightfit_dot_##name(const uint8_t *packed, const float *x, float *y, int64_t rows, int groups, int group,     \
                             int stride) {                                                                             \
        const int64_t step = (int64_t)groups * stride;                                                                 \
        _Pragma("omp parallel for schedule(static) if (rows * groups * group > PARALLEL)") for (int64_t r = 0;         \
                                                                                                r < rows; r++)         \
            y[r] = group == 32 ? dot_##name(packed + r * step, x, groups, 32, stride)                                  \
                               : dot_##name(packed + r * step, x, groups, group, stride);                              \
    }
#define BOTH(name)                                                                                                     \
    UNPACK(name##_bfloat16, uint16_t)                                                                                  \
    UNPACK(name##_float32, float)                                                                                      \
    DOT(name)

BOTH(q4)
BOTH(q4_zero)
BOTH(nf4)
BOTH(q8)
BOTH(int8)
BOTH(q5_0)
BOTH(q5_1)
BOTH(q2_k)
BOTH(q3_k)
BOTH(q4_k)
BOTH(q5_k)
BOTH(q6_k)
BOTH(mxfp4)
