"""In C++, what Inductor leaves to libraries or to Python.

For small matrices: products, c = beta * d + alpha * a @ b, and triangular systems, t @ x = b; every matrix has its strides.
Running sums and products; and sums over chains of states, whose operator is the package's own.
"""

SOURCE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

template <typename T>
static inline void product(const T* a, const T* b, T* c, const T* d, double alpha, double beta, long rows, long inner,
    long columns, long a0, long a1, long b0, long b1, long c0, long c1, long d0, long d1)
{
    for (long i = 0; i < rows; i++) for (long j = 0; j < columns; j++) {
        T sum = 0;
        for (long k = 0; k < inner; k++) sum += a[i * a0 + k * a1] * b[k * b0 + j * b1];
        c[i * c0 + j * c1] = d ? (T) (beta * d[i * d0 + j * d1] + alpha * sum) : sum;
    }
}

template <typename T>
static inline void solve(const T* t, const T* b, T* x, long size, long columns, bool upper, bool unit,
    long t0, long t1, long b0, long b1, long x0, long x1)
{
    for (long j = 0; j < columns; j++) for (long step = 0; step < size; step++) {
        const long i = upper ? size - 1 - step : step, first = upper ? i + 1 : 0, end = upper ? size : i;
        T rest = b[i * b0 + j * b1];
        for (long k = first; k < end; k++) rest -= t[i * t0 + k * t1] * x[k * x0 + j * x1];
        x[i * x0 + j * x1] = unit ? rest : rest / t[i * t0 + i * t1];
    }
}

// Running sums or products, in double precision as torch takes them; what is summed is contiguous.
template <typename T, typename R, typename S>
static inline void cumulate(const T* x, R* result, long outer, long size, long inner, bool multiplies)
{
    for (long o = 0; o < outer; o++) for (long i = 0; i < inner; i++) {
        S total = multiplies;
        for (long k = 0; k < size; k++) {
            const long at = (o * size + k) * inner + i;
            if (multiplies) total *= x[at]; else total += x[at];
            result[at] = total;
        }
    }
}

#pragma GCC push_options
#pragma GCC optimize("tree-loop-vectorize")  // which torch turns off

// exp(x) for x <= 0 in operations that compilers make vectors of: 2^n times the power series of the rest, where n is what
// the sum with 1.5 * 2^mantissa has in its last bits. Below the least normal number it is 0.
template <typename T, int k, int terms>
static inline T series(T x)
{
    if constexpr (k > terms) return 1;
    else return 1 + x * T(1.0 / k) * series<T, k + 1, terms>(x);
}
template <typename T, typename I, int mantissa, int terms>
static inline T exponential_of(T x, T least, T high, T low)
{
    const T shift = 1.5 * (I(1) << mantissa), shifted = x * T(1.4426950408889634) + shift, n = shifted - shift;
    const T rest = x - n * high - n * low;
    I bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    const I scale = (bits << mantissa) + (I(sizeof(T) == 4 ? 127 : 1023) << mantissa);
    T power;
    __builtin_memcpy(&power, &scale, sizeof power);
    return x < least ? 0 : series<T, 1, terms>(rest) * power;
}
static inline float exponential(float x)
{
    return exponential_of<float, uint32_t, 23, 7>(x, -87.0f, 0.693359375f, -2.12194440e-4f);
}
static inline double exponential(double x)
{
    return exponential_of<double, uint64_t, 52, 13>(x, -708.0, 6.93145751953125e-1, 1.42860682030941723212e-6);
}

// log(x) for x >= 1, or x = 0, likewise: the exponent, and the series of 2 artanh((m - 1) / (m + 1)) for the rest m.
template <typename T, int k, int terms>
static inline T odd_series(T square)
{
    if constexpr (k > terms) return 0;
    else return T(2.0 / (2 * k + 1)) + square * odd_series<T, k + 1, terms>(square);
}
template <typename T, typename I, int mantissa, int terms>
static inline T logarithm_of(T x, I bias, T high, T low)
{
    const T scaled = x * T(1.4142135623730951), shift = T(I(1) << mantissa);
    I bits, of_shift;
    __builtin_memcpy(&bits, &scaled, sizeof bits);
    __builtin_memcpy(&of_shift, &shift, sizeof bits);
    const I exponent = bits >> mantissa, raised = of_shift + exponent;
    T power, divisor;
    __builtin_memcpy(&power, &raised, sizeof power);
    const I inverse = (2 * bias - exponent) << mantissa;
    __builtin_memcpy(&divisor, &inverse, sizeof divisor);
    const T n = power - shift - T(bias), rest = x * divisor, z = (rest - 1) / (rest + 1);
    return x == 0 ? -std::numeric_limits<T>::infinity() : n * high + (n * low + z * odd_series<T, 0, terms>(z * z));
}
static inline float logarithm(float x)
{
    return logarithm_of<float, uint32_t, 23, 4>(x, 127, 0.693359375f, -2.12194440e-4f);
}
static inline double logarithm(double x)
{
    return logarithm_of<double, uint64_t, 52, 11>(x, 1023, 6.93145751953125e-1, 1.42860682030941723212e-6);
}

// Of layers of states, see sum_of_chain: what is in ``alone`` and ``between`` for itself and for pairs of neighbours; the
// latter are the same for all of a batch if ``stride`` is 0. Of each pair two exponentials are taken, none greater than 1.
template <typename T>
static void chain(const T* alone, const T* between, T* log_sum, T* of_alone, T* of_between, long layers, long batch,
    long states, long stride)
{
    const long pairs = states * states, step = stride ? batch * pairs : pairs;
    const T least = -std::numeric_limits<T>::max();
    std::vector<T> scratch(3 * states);
    T* __restrict most = scratch.data();
    T* __restrict sums = most + states;
    T* __restrict after = sums + states;
    for (long b = 0; b < batch; b++) {
        for (long t = 0; t < layers; t++) {  // of_alone takes the messages from the front
            const T* own = alone + (t * batch + b) * states;
            T* here = of_alone + (t * batch + b) * states;
            if (t == 0) { for (long j = 0; j < states; j++) here[j] = own[j]; continue; }
            const T* last = here - batch * states;
            const T* factor = between + (t - 1) * step + b * stride;
            for (long j = 0; j < states; j++) { most[j] = least; sums[j] = 0; }
            for (long i = 0; i < states; i++) {
                const T from = last[i];
                const T* row = factor + i * states;
                _Pragma("omp simd")
                for (long j = 0; j < states; j++) most[j] = most[j] < from + row[j] ? from + row[j] : most[j];
            }
            for (long i = 0; i < states; i++) {
                const T from = last[i];
                const T* row = factor + i * states;
                _Pragma("omp simd")
                for (long j = 0; j < states; j++) sums[j] += exponential(from + row[j] - most[j]);
            }
            _Pragma("omp simd")
            for (long j = 0; j < states; j++) here[j] = logarithm(sums[j]) + most[j] + own[j];
        }
        const T* end = of_alone + ((layers - 1) * batch + b) * states;
        T highest = least, sum = 0;
        for (long j = 0; j < states; j++) highest = std::max(highest, end[j]);
        _Pragma("omp simd reduction(+ : sum)")
        for (long j = 0; j < states; j++) sum += exponential(end[j] - highest);
        log_sum[b] = logarithm(sum) + highest;
        const T known = std::max(log_sum[b], least);
        for (long j = 0; j < states; j++) after[j] = 0;  // messages from the end
        for (long t = layers - 1; t >= 0; t--) {
            T* here = of_alone + (t * batch + b) * states;
            if (t == layers - 1) {
                _Pragma("omp simd")
                for (long i = 0; i < states; i++) here[i] = exponential(here[i] - known);
                continue;
            }
            const T* own = alone + ((t + 1) * batch + b) * states;
            const T* factor = between + t * step + b * stride;
            T* both = of_between + (t * batch + b) * pairs;
            for (long j = 0; j < states; j++) after[j] += own[j];
            for (long i = 0; i < states; i++) {
                const T* row = factor + i * states;
                T* pair = both + i * states;
                T high = least, total = 0;
                _Pragma("omp simd reduction(max : high)")
                for (long j = 0; j < states; j++) high = high < row[j] + after[j] ? row[j] + after[j] : high;
                _Pragma("omp simd reduction(+ : total)")
                for (long j = 0; j < states; j++) total += pair[j] = exponential(row[j] + after[j] - high);
                most[i] = high;
                sums[i] = total;
            }
            _Pragma("omp simd")
            for (long i = 0; i < states; i++) {
                after[i] = logarithm(sums[i]) + most[i];
                most[i] = exponential(here[i] + most[i] - known);
                here[i] = most[i] * sums[i];
            }
            for (long i = 0; i < states; i++) {
                const T front = most[i];
                T* pair = both + i * states;
                _Pragma("omp simd")
                for (long j = 0; j < states; j++) pair[j] *= front;
            }
        }
    }
}
#pragma GCC pop_options
"""
