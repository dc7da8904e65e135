/* Sums of 16-bit floats, float16 and bfloat16: they are widened to float32, added from left to
   right, divided if asked for, and rounded once, to nearest even. The bits are those of NumPy and
   ml_dtypes, except that one NaN may be another. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

#define BLOCK 512

typedef struct {
    uint16_t *out;
    Py_buffer *sources;
    Py_ssize_t count, length;
    int brain;
    float divisor; /* 0: none */
} Sum;

typedef void (*Kernel)(const Sum *);

static inline const uint16_t *source(const Sum *sum, Py_ssize_t s)
{
    return sum->sources[s].buf;
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

/* Sum from `start` on, in blocks that stay in the first cache; inlined in each use. */
static inline __attribute__((always_inline)) void
sum_blocks(const Sum *sum, Py_ssize_t start, float (*widen)(uint16_t), uint16_t (*narrow)(float))
{
    float wide[BLOCK];
    for (; start < sum->length; start += BLOCK) {
        Py_ssize_t length = sum->length - start < BLOCK ? sum->length - start : BLOCK;
        for (Py_ssize_t i = 0; i < length; i++)
            wide[i] = widen(source(sum, 0)[start + i]);
        for (Py_ssize_t s = 1; s < sum->count; s++)
            for (Py_ssize_t i = 0; i < length; i++)
                wide[i] += widen(source(sum, s)[start + i]);
        if (sum->divisor != 0)
            for (Py_ssize_t i = 0; i < length; i++)
                wide[i] /= sum->divisor;
        for (Py_ssize_t i = 0; i < length; i++)
            sum->out[start + i] = narrow(wide[i]);
    }
}

static void sum_portably(const Sum *sum)
{
    sum->brain ? sum_blocks(sum, 0, widen_brain, narrow_brain)
               : sum_blocks(sum, 0, widen_half, narrow_half);
}

#ifdef __x86_64__
__attribute__((target("avx2,f16c"))) static void sum_with_avx2(const Sum *sum)
{
    if (sum->brain) {
        sum_blocks(sum, 0, widen_brain, narrow_brain);
        return;
    }
    Py_ssize_t i = 0;
    for (; i + 8 <= sum->length; i += 8) {
        __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source(sum, 0) + i)));
        for (Py_ssize_t s = 1; s < sum->count; s++) {
            __m128i half = _mm_loadu_si128((const __m128i *)(source(sum, s) + i));
            wide = _mm256_add_ps(wide, _mm256_cvtph_ps(half));
        }
        if (sum->divisor != 0)
            wide = _mm256_div_ps(wide, _mm256_set1_ps(sum->divisor));
        __m128i half = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(sum->out + i), half);
    }
    sum_blocks(sum, i, widen_half, narrow_half);
}
#endif

static Kernel fastest(void)
{
#ifdef __x86_64__
    unsigned a, b, c, d; /* not every compiler's __builtin_cpu_supports knows f16c */
    int f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    if (f16c && __builtin_cpu_supports("avx2"))
        return sum_with_avx2;
#endif
    return sum_portably;
}

/* Return 1 if a buffer can be a source of `out`; set an error if not. */
static int fits(const Py_buffer *source, const Py_buffer *out)
{
    const char *from = source->buf, *to = out->buf;
    if (source->len != out->len || source->len % 2 || (uintptr_t)from % 2 || source->itemsize > 2) {
        PyErr_Format(PyExc_ValueError, "sum_half() takes aligned 16-bit floats, %zd bytes, not %zd",
                     out->len, source->len);
        return 0;
    }
    if (from != to && from < to + out->len && to < from + source->len) {
        PyErr_SetString(PyExc_ValueError, "`out` may be a source, but not overlap one in part");
        return 0;
    }
    return 1;
}

/* Hold the operands' buffers, sum them, release them; set an error if one does not fit. */
static int sum_operands(PyObject *operands, const Py_buffer *out, Sum *sum)
{
    static Kernel kernel; /* guarded by the GIL */
    if (!kernel)
        kernel = fastest();
    int valid = fits(out, out);
    Py_ssize_t held = 0;
    while (valid && held < sum->count) {
        PyObject *operand = PyTuple_GetItem(operands, held);
        if (PyObject_GetBuffer(operand, &sum->sources[held], PyBUF_SIMPLE))
            valid = 0;
        else
            valid = fits(&sum->sources[held++], out);
    }
    if (valid) {
        Py_BEGIN_ALLOW_THREADS
        kernel(sum);
        Py_END_ALLOW_THREADS
    }
    while (held--)
        PyBuffer_Release(&sum->sources[held]);
    return valid;
}

extern PyObject *sum_half(PyObject *, PyObject *); /* called from _native.c */
PyObject *sum_half(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer out;
    PyObject *sources;
    int brain, valid = 0;
    double divisor;
    if (!PyArg_ParseTuple(args, "w*Opd:sum_half", &out, &sources, &brain, &divisor))
        return NULL;
    PyObject *operands = PySequence_Tuple(sources);
    Py_ssize_t count = operands ? PyTuple_Size(operands) : 0;
    Py_buffer *held = PyMem_Calloc((size_t)count, sizeof *held);
    Sum sum = {out.buf, held, count, out.len / 2, brain, (float)divisor};
    if (operands && !held)
        PyErr_NoMemory();
    else if (operands && !count)
        PyErr_SetString(PyExc_ValueError, "sum_half() takes at least one source");
    else if (operands)
        valid = sum_operands(operands, &out, &sum);
    PyMem_Free(held);
    Py_XDECREF(operands);
    PyBuffer_Release(&out);
    return valid ? Py_NewRef(Py_None) : NULL;
}
