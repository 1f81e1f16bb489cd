/* Unpacking of quantised groups (profiles/layout.py), compiled once per machine by profiles/native.py.

   A q4 group has sixteen possible values: they are computed and rounded once, and every nibble picks one. Products of a
   4- or 8-bit code and a float16 scale are exact in float32, so each value is rounded exactly where PyTorch's path rounds
   it, and the results are equal bit for bit. Groups are even, as PyTorch's path needs them. */

#include <stdint.h>
#include <string.h>
#ifdef __SSSE3__
#include <immintrin.h>
#endif

enum { PARALLEL = 1 << 15 }; /* elements below which a second core does not pay */

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

/* The sixteen values of a q4 group; NaN, which no packed weight holds, may differ from `bfloat16`. */
static void values_q4(const uint8_t *scale_and_least, shorts *values) {
    const float scale = half(scale_and_least), least = half(scale_and_least + 2);
    const floats code = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const floats value = code * scale + least;
    words bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *values = __builtin_convertvector(bits, shorts);
}

#ifdef __AVX512BW__

static void group_q4_bfloat16(const uint8_t *packed, uint16_t *out, int group) {
    shorts value;
    values_q4(packed + group / 2, &value);
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

static void group_q4_bfloat16(const uint8_t *packed, uint16_t *out, int group) {
    shorts value;
    values_q4(packed + group / 2, &value);
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

static void group_q8_bfloat16(const uint8_t *packed, uint16_t *out, int group) {
    const float scale = half(packed);
    for (int e = 0; e < group; e++)
        out[e] = bfloat16((float)(int8_t)packed[2 + e] * scale);
}

static void group_q8_float32(const uint8_t *packed, float *out, int group) {
    const float scale = half(packed);
    for (int e = 0; e < group; e++)
        out[e] = (float)(int8_t)packed[2 + e] * scale;
}

/* `groups` groups of `group` elements, `stride` bytes apart in `packed`, into `out`. */
#define UNPACK(name, type)                                                                                             \
    void tightfit_##name(const uint8_t *packed, type *out, int64_t groups, int group, int stride) {                    \
        _Pragma("omp parallel for schedule(static) if (groups * group > PARALLEL)") for (int64_t g = 0; g < groups;    \
                                                                                         g++)                          \
            group_##name(packed + g * stride, out + g * group, group);                                                 \
    }

UNPACK(q4_bfloat16, uint16_t)
UNPACK(q8_bfloat16, uint16_t)
UNPACK(q8_float32, float)
