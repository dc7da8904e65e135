/* The arithmetic of every reduction but sums and products of 16-bit floats (see half.c).

   The results are those of ferro.collectives.reduction: arrays are combined from left to right, a mean is a sum that
   is divided, integers wrap around, and NaN wins against every other number. Where NumPy leaves a choice, between zeros
   of both signs or between two NaN, this code makes it, on all ranks alike. */

#include "native.h"

#include <stdbool.h>

#define BLOCK_BYTES 8192 /* reduced at once where there are more than two arrays, so that it stays in the first cache */

/* `out` may be one of the arrays. No element depends on another, which the compiler cannot know. */
#if defined(__clang__)
#define ANY_ORDER _Pragma("clang loop vectorize(assume_safety)")
#else
#define ANY_ORDER _Pragma("GCC ivdep")
#endif

#define COMBINE(name, type, expression)                                                  \
    static void name(void *out, const void *left, const void *right, size_t count)       \
    {                                                                                    \
        type *result = out;                                                              \
        const type *a = left, *b = right;                                                \
        ANY_ORDER                                                                        \
        for (size_t i = 0; i < count; i++) {                                             \
            const type x = a[i], y = b[i];                                               \
            result[i] = (type)(expression);                                              \
        }                                                                                \
    }

#define COMBINE_INTEGERS(type)                     \
    COMBINE(sum_##type, type, x + y)               \
    COMBINE(prod_##type, type, (uint64_t)x * y)    \
    COMBINE(band_##type, type, x & y)              \
    COMBINE(bor_##type, type, x | y)               \
    COMBINE(bxor_##type, type, x ^ y)

#define COMBINE_ORDERED(type)                      \
    COMBINE(min_##type, type, x < y ? x : y)       \
    COMBINE(max_##type, type, x > y ? x : y)

#define COMBINE_FLOATS(type)                                        \
    COMBINE(sum_##type, type, x + y)                                \
    COMBINE(prod_##type, type, x * y)                               \
    COMBINE(min_##type, type, (x < y) | (x != x) ? x : y)           \
    COMBINE(max_##type, type, (x > y) | (x != x) ? x : y)           \
    static void divide_##type(void *numbers, size_t count, int divisor) \
    {                                                               \
        type *number = numbers;                                     \
        for (size_t i = 0; i < count; i++)                          \
            number[i] /= (type)divisor;                             \
    }

COMBINE_INTEGERS(uint8_t)
COMBINE_INTEGERS(uint16_t)
COMBINE_INTEGERS(uint32_t)
COMBINE_INTEGERS(uint64_t)
COMBINE_ORDERED(uint8_t)
COMBINE_ORDERED(uint16_t)
COMBINE_ORDERED(uint32_t)
COMBINE_ORDERED(uint64_t)
COMBINE_ORDERED(int8_t)
COMBINE_ORDERED(int16_t)
COMBINE_ORDERED(int32_t)
COMBINE_ORDERED(int64_t)
COMBINE_FLOATS(float)
COMBINE_FLOATS(double)

/* A bool is a byte, of which NumPy takes every value but 0 for true. */
COMBINE(or_bool, uint8_t, (x | y) != 0)
COMBINE(and_bool, uint8_t, (x != 0) & (y != 0))
COMBINE(xor_bool, uint8_t, (x != 0) != (y != 0))

/* A 16-bit float as an integer in the same order; all bits of a NaN's exponent are set. */
static inline int order_of(uint16_t bits)
{
    int magnitude = bits & 0x7FFF;
    return bits >> 15 ? -magnitude : magnitude;
}

#define IS_NAN(bits, infinity) (((bits) & 0x7FFF) > (infinity))
#define COMBINE_HALVES(kind, infinity)                                                                    \
    COMBINE(min_##kind, uint16_t,                                                                         \
            IS_NAN(x, infinity) | (!IS_NAN(y, infinity) & (order_of(x) < order_of(y))) ? x : y)           \
    COMBINE(max_##kind, uint16_t,                                                                         \
            IS_NAN(x, infinity) | (!IS_NAN(y, infinity) & (order_of(x) > order_of(y))) ? x : y)

COMBINE_HALVES(half, 0x7C00)
COMBINE_HALVES(brain, 0x7F80)

typedef struct {
    const char *dtype, *reduction;
    Combine combine;
    Divide divide;
    size_t itemsize;
    int brain, multiply;
} Entry;

#define BITS(name, type)                                                                          \
    {name, "sum", sum_##type, NULL, sizeof(type), 0, 0}, {name, "prod", prod_##type, NULL, sizeof(type), 0, 0}, \
    {name, "band", band_##type, NULL, sizeof(type), 0, 0}, {name, "bor", bor_##type, NULL, sizeof(type), 0, 0}, \
    {name, "bxor", bxor_##type, NULL, sizeof(type), 0, 0}
#define ORDER(name, type) \
    {name, "min", min_##type, NULL, sizeof(type), 0, 0}, {name, "max", max_##type, NULL, sizeof(type), 0, 0}
#define SUMS(name, type) \
    {name, "sum", sum_##type, NULL, sizeof(type), 0, 0}, {name, "mean", sum_##type, divide_##type, sizeof(type), 0, 0}
#define HALVES(name, kind, brain)                                                        \
    {name, "sum", NULL, NULL, 2, brain, 0}, {name, "mean", NULL, NULL, 2, brain, 0},     \
    {name, "prod", NULL, NULL, 2, brain, 1}, {name, "min", min_##kind, NULL, 2, brain, 0}, \
    {name, "max", max_##kind, NULL, 2, brain, 0}

static const Entry entries[] = {
    BITS("int8", uint8_t), ORDER("int8", int8_t),
    BITS("int16", uint16_t), ORDER("int16", int16_t),
    BITS("int32", uint32_t), ORDER("int32", int32_t),
    BITS("int64", uint64_t), ORDER("int64", int64_t),
    BITS("uint8", uint8_t), ORDER("uint8", uint8_t),
    BITS("uint16", uint16_t), ORDER("uint16", uint16_t),
    BITS("uint32", uint32_t), ORDER("uint32", uint32_t),
    BITS("uint64", uint64_t), ORDER("uint64", uint64_t),
    {"bool", "sum", or_bool, NULL, 1, 0, 0}, {"bool", "bor", or_bool, NULL, 1, 0, 0},
    {"bool", "max", or_bool, NULL, 1, 0, 0}, {"bool", "prod", and_bool, NULL, 1, 0, 0},
    {"bool", "band", and_bool, NULL, 1, 0, 0}, {"bool", "min", and_bool, NULL, 1, 0, 0},
    {"bool", "bxor", xor_bool, NULL, 1, 0, 0},
    SUMS("float32", float), ORDER("float32", float), {"float32", "prod", prod_float, NULL, sizeof(float), 0, 0},
    SUMS("float64", double), ORDER("float64", double), {"float64", "prod", prod_double, NULL, sizeof(double), 0, 0},
    SUMS("complex64", float), SUMS("complex128", double), /* their products are not those of the real numbers */
    HALVES("float16", half, 0), HALVES("bfloat16", brain, 1),
};

int find_arithmetic(const char *dtype, const char *reduction, int ranks, Arithmetic *found)
{
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        const Entry *entry = &entries[i];
        if (strcmp(entry->dtype, dtype) || strcmp(entry->reduction, reduction))
            continue;
        int divisor = strcmp(reduction, "mean") ? 0 : ranks;
        *found = (Arithmetic){entry->combine, entry->divide, entry->itemsize, entry->brain, entry->multiply, divisor};
        return 1;
    }
    return 0;
}

void reduce_arrays(const Arithmetic *how, char *out, const char *const *arrays, Py_ssize_t count, size_t nbytes)
{
    if (!how->combine) {
        HalfReduction halves = {arrays, count, (Py_ssize_t)(nbytes / 2), (uint16_t *)out,
                                how->brain, how->multiply, (float)how->divisor};
        reduce_halves(&halves);
        return;
    }
    size_t block = count > 2 ? BLOCK_BYTES : nbytes;
    for (size_t start = 0; start < nbytes; start += block) {
        size_t length = (nbytes - start < block ? nbytes - start : block) / how->itemsize;
        char *result = out + start;
        if (count == 1 && result != arrays[0] + start)
            memmove(result, arrays[0] + start, length * how->itemsize);
        if (count > 1)
            how->combine(result, arrays[0] + start, arrays[1] + start, length);
        for (Py_ssize_t i = 2; i < count; i++)
            how->combine(result, result, arrays[i] + start, length);
        if (how->divide)
            how->divide(result, length, how->divisor);
    }
}

PyObject *has_arithmetic(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *dtype, *reduction;
    Arithmetic found;
    if (!PyArg_ParseTuple(args, "ss:has_arithmetic", &dtype, &reduction))
        return NULL;
    return PyBool_FromLong(find_arithmetic(dtype, reduction, 1, &found));
}

PyObject *reduce(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer out;
    PyObject *sources, *result = NULL;
    const char *dtype, *reduction;
    int ranks;
    Arithmetic how;
    if (!PyArg_ParseTuple(args, "w*Ossi:reduce", &out, &sources, &dtype, &reduction, &ranks))
        return NULL;
    if (ranks < 1 || !find_arithmetic(dtype, reduction, ranks, &how)) {
        PyErr_Format(PyExc_ValueError, "there is no %s of %s over %d ranks", reduction, dtype, ranks);
        PyBuffer_Release(&out);
        return NULL;
    }
    Operands operands;
    if (hold_operands(&operands, sources, &out, (Py_ssize_t)how.itemsize, strncmp(dtype, "complex", 7) ? 1 : 2)) {
        int valid = 1;
        for (Py_ssize_t i = how.combine ? 2 : operands.count; i < operands.count; i++)
            valid &= operands.arrays[i] != out.buf || !out.len;
        if (valid) {
            Py_BEGIN_ALLOW_THREADS
            reduce_arrays(&how, out.buf, operands.arrays, operands.count, (size_t)out.len);
            Py_END_ALLOW_THREADS
            result = Py_NewRef(Py_None);
        } else {
            PyErr_SetString(PyExc_ValueError, "`out` may be one of the first two sources only");
        }
    }
    release_operands(&operands);
    PyBuffer_Release(&out);
    return result;
}
