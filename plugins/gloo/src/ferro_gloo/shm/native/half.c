/* Sums and products of 16-bit floats, float16 and bfloat16: they are widened to float32, added or multiplied from left
   to right, divided if asked for, and rounded once, to nearest even. The bits are those of NumPy and
   ml_dtypes, except that one NaN may be another. */

#include "native.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

#define BLOCK 512

typedef void (*Kernel)(const HalfReduction *);

static inline const uint16_t *source(const HalfReduction *reduction, Py_ssize_t s)
{
    return (const uint16_t *)reduction->sources[s];
}

static inline float as_float(uint32_t bits)
{
    return (union { uint32_t bits; float value; }){bits}.value;
}

static inline uint32_t as_bits(float value)
{
    return (union { float value; uint32_t bits; }){value}.bits;
}

static inline float widen_brain(uint16_t brain)
{
    return as_float((uint32_t)brain << 16);
}

static inline uint16_t narrow_brain(float value)
{
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    uint32_t nan = (bits >> 16 & 0x8000) | 0x7FC0;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

static inline float widen_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = (uint32_t)(half & 0x7FFF) << 13;
    if (bits >= 31u << 23) /* infinity, NaN */
        bits += 224u << 23;
    else if (bits >= 1u << 23) /* normal: the bias of the exponent is 15, and becomes 127 */
        bits += 112u << 23;
    else /* subnormal: put its digits after 2^-14, then subtract 2^-14 */
        bits = as_bits(as_float(bits + (113u << 23)) - 0x1p-14f);
    return as_float(sign | bits);
}

static inline uint16_t narrow_half(float value)
{
    uint32_t sign = as_bits(value) >> 16 & 0x8000, bits = as_bits(value) & 0x7FFFFFFF;
    if (bits > 255u << 23) /* NaN */
        bits = 0x7E00;
    else if (bits >= 143u << 23) /* 65536 and more */
        bits = 0x7C00;
    else if (bits < 113u << 23) /* subnormal: adding 0.5 rounds at the last place */
        bits = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);
    else
        bits = (bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
    return (uint16_t)(sign | bits);
}

/* Reduce from `start` on, in blocks that stay in the first cache; inlined in each use. */
static inline __attribute__((always_inline)) void reduce_blocks(const HalfReduction *reduction, Py_ssize_t start,
                                                                float (*widen)(uint16_t), uint16_t (*narrow)(float))
{
    float wide[BLOCK];
    for (; start < reduction->length; start += BLOCK) {
        Py_ssize_t length = reduction->length - start < BLOCK ? reduction->length - start : BLOCK;
        for (Py_ssize_t i = 0; i < length; i++)
            wide[i] = widen(source(reduction, 0)[start + i]);
        for (Py_ssize_t s = 1; s < reduction->count; s++)
            if (reduction->multiply)
                for (Py_ssize_t i = 0; i < length; i++)
                    wide[i] *= widen(source(reduction, s)[start + i]);
            else
                for (Py_ssize_t i = 0; i < length; i++)
                    wide[i] += widen(source(reduction, s)[start + i]);
        if (reduction->divisor != 0)
            for (Py_ssize_t i = 0; i < length; i++)
                wide[i] /= reduction->divisor;
        for (Py_ssize_t i = 0; i < length; i++)
            reduction->out[start + i] = narrow(wide[i]);
    }
}

static void reduce_portably(const HalfReduction *reduction)
{
    if (reduction->brain)
        reduce_blocks(reduction, 0, widen_brain, narrow_brain);
    else
        reduce_blocks(reduction, 0, widen_half, narrow_half);
}

#ifdef __x86_64__
__attribute__((target("avx2,f16c"))) static void reduce_with_avx2(const HalfReduction *reduction)
{
    if (reduction->brain) {
        reduce_blocks(reduction, 0, widen_brain, narrow_brain);
        return;
    }
    Py_ssize_t i = 0;
    for (; i + 8 <= reduction->length && !reduction->multiply; i += 8) {
        __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source(reduction, 0) + i)));
        for (Py_ssize_t s = 1; s < reduction->count; s++) {
            __m128i half = _mm_loadu_si128((const __m128i *)(source(reduction, s) + i));
            wide = _mm256_add_ps(wide, _mm256_cvtph_ps(half));
        }
        if (reduction->divisor != 0)
            wide = _mm256_div_ps(wide, _mm256_set1_ps(reduction->divisor));
        __m128i half = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(reduction->out + i), half);
    }
    reduce_blocks(reduction, i, widen_half, narrow_half);
}
#endif

static Kernel fastest(void)
{
#ifdef __x86_64__
    unsigned a, b, c, d; /* not every compiler's __builtin_cpu_supports knows f16c */
    int f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    if (f16c && __builtin_cpu_supports("avx2"))
        return reduce_with_avx2;
#endif
    return reduce_portably;
}

void reduce_halves(const HalfReduction *reduction)
{
    static Kernel kernel; /* two threads that find it at once find the same */
    Kernel found = __atomic_load_n(&kernel, __ATOMIC_RELAXED);
    if (!found) {
        found = fastest();
        __atomic_store_n(&kernel, found, __ATOMIC_RELAXED);
    }
    found(reduction);
}

PyObject *sum_half(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer out;
    PyObject *sources, *result = NULL;
    int brain;
    double divisor;
    if (!PyArg_ParseTuple(args, "w*Opd:sum_half", &out, &sources, &brain, &divisor))
        return NULL;
    Operands operands;
    if (hold_operands(&operands, sources, &out, 2, 1)) {
        HalfReduction sum = {operands.arrays, operands.count, out.len / 2, out.buf, brain, 0, (float)divisor};
        Py_BEGIN_ALLOW_THREADS
        reduce_halves(&sum);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release_operands(&operands);
    PyBuffer_Release(&out);
    return result;
}
