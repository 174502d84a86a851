/* What BatchNorm statistics cost an optimised image, done while the activation is read anyway.
 *
 * All tensors are dense with the channels innermost: `rows` times `channels`. Sums are taken about
 * `shift`, the mean that is expected, so that little cancels; of BLOCK rows in float, of all blocks
 * in double. Plain C that compilers vectorise; one thread, as every process of a synthesis has.
 */
#include "values.h"

/* Channels of a layer at most; moments.py asks no more. */
#define WIDEST 8192
/* Rows are taken several at a time until they are no shorter than that, and a multiple of EVEN: the
 * loop over them would hardly be vectorised, or have a rest that is not. */
#define SHORT 64
#define EVEN 32
#define BLOCK 64

/* e^r for |r| <= ln(2) / 2: to one unit in the last place (Cephes' expf), and to 17 bits. */
static inline float exponential_float32(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

static inline float exponential_bfloat16(float r) {
  float p = 4.1277747e-02f;
  p = p * r + 1.6753514e-01f;
  p = p * r + 5.0005116e-01f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

/* 1 / (1 + e^y) with y = -x, and e^y = 2^n e^r, without a call or a branch. Adding 1.5 * 2^23
 * leaves n in the lowest bits, from where it goes to the exponent of e^r. Beyond 87 it would not
 * fit there; |x| is limited as an integer, for compilers make a mess of limits of floats. */
#define LARGEST 0x42ae0000u /* 87.0f */
#define SIGMOID(T, EXPONENTIAL)                                                                    \
  static inline float sigmoid_##T(float x) {                                                       \
    uint32_t bits = to_bits(x), size = bits & 0x7fffffffu;                                         \
    size = size < LARGEST ? size : LARGEST;                                                        \
    float y = from_bits(size | (~bits & 0x80000000u));                                             \
    float shifted = y * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;                      \
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;                                           \
    return 1.0f / (1.0f + from_bits(to_bits(EXPONENTIAL(r)) + (to_bits(shifted) << 23)));          \
  }

SIGMOID(float32, exponential_float32)
SIGMOID(bfloat16, exponential_bfloat16)

/* Rows to take at a time: a power of two that divides `rows`. */
static inline ptrdiff_t together(ptrdiff_t rows, ptrdiff_t channels) {
  ptrdiff_t count = 1;
  while ((channels * count < SHORT || channels * count % EVEN) && count < SHORT &&
         2 * channels * count <= WIDEST && rows % (2 * count) == 0)
    count *= 2;
  return count;
}

static inline void repeat(float *to, const float *from, ptrdiff_t channels, ptrdiff_t count) {
  for (ptrdiff_t i = 0; i < count; i++) memcpy(to + i * channels, from, channels * sizeof(float));
}

#define DEFINE(T)                                                                                  \
  /* Mean and biased variance of each channel of x; with `silu`, out = silu(x) as well. It is a    \
   * constant in all calls: a choice left in the loop keeps compilers from vectorising it for      \
   * processors that cannot store a part of a vector. */                                           \
  static inline void moments_##T(const T *restrict x, T *restrict out, const float *shift,         \
                                 float *mean, float *var, ptrdiff_t rows, ptrdiff_t channels,      \
                                 int silu) {                                                       \
    float base[WIDEST], sum[WIDEST], square[WIDEST];                                               \
    double sums[WIDEST], squares[WIDEST];                                                          \
    ptrdiff_t count = together(rows, channels), width = channels * count;                          \
    ptrdiff_t lines = rows / count;                                                                \
    repeat(base, shift, channels, count);                                                          \
    memset(sums, 0, width * sizeof(double));                                                       \
    memset(squares, 0, width * sizeof(double));                                                    \
    for (ptrdiff_t start = 0; start < lines; start += BLOCK) {                                     \
      ptrdiff_t stop = start + BLOCK < lines ? start + BLOCK : lines;                              \
      memset(sum, 0, width * sizeof(float));                                                       \
      memset(square, 0, width * sizeof(float));                                                    \
      for (ptrdiff_t i = start; i < stop; i++) {                                                   \
        const T *restrict from = x + i * width;                                                    \
        T *restrict to = silu ? out + i * width : NULL;                                            \
        fetch(from, width * sizeof(T));                                                            \
        if (silu) fetch_to_write(to, width * sizeof(T));                                           \
        for (ptrdiff_t j = 0; j < width; j++) {                                                    \
          float value = load_##T(from[j]), away = value - base[j];                                 \
          sum[j] += away;                                                                          \
          square[j] += away * away;                                                                \
          if (silu) to[j] = store_##T(value * sigmoid_##T(value));                                 \
        }                                                                                          \
      }                                                                                            \
      for (ptrdiff_t j = 0; j < width; j++) {                                                      \
        sums[j] += sum[j];                                                                         \
        squares[j] += square[j];                                                                   \
      }                                                                                            \
    }                                                                                              \
    for (ptrdiff_t j = 0; j < channels; j++) {                                                     \
      double first = 0, second = 0;                                                                \
      for (ptrdiff_t k = j; k < width; k += channels) {                                            \
        first += sums[k];                                                                          \
        second += squares[k];                                                                      \
      }                                                                                            \
      first /= rows;                                                                               \
      mean[j] = (float)(shift[j] + first);                                                         \
      var[j] = (float)(second / rows - first * first);                                             \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  void moments_of_##T(const T *x, const float *shift, float *mean, float *var, ptrdiff_t rows,     \
                      ptrdiff_t channels) {                                                        \
    moments_##T(x, NULL, shift, mean, var, rows, channels, 0);                                     \
  }                                                                                                \
                                                                                                   \
  void silu_and_moments_of_##T(const T *x, T *out, const float *shift, float *mean, float *var,    \
                               ptrdiff_t rows, ptrdiff_t channels) {                               \
    moments_##T(x, out, shift, mean, var, rows, channels, 1);                                      \
  }                                                                                                \
                                                                                                   \
  /* out = grad + slope * x + offset, the gradient of x by way of its moments added; with `silu`,  \
   * grad is that of silu(x). The rows of grad lie `apart` values from each other, those of what was\
   * one of several parts of a concatenation. */                                                   \
  static inline void backward_##T(const T *restrict x, const T *restrict grad, T *restrict out,    \
                                  const float *slope, const float *offset, ptrdiff_t rows,         \
                                  ptrdiff_t channels, ptrdiff_t apart, int silu) {                 \
    float a[WIDEST], b[WIDEST];                                                                    \
    T line[WIDEST];                                                                                \
    ptrdiff_t count = together(rows, channels), width = channels * count;                          \
    repeat(a, slope, channels, count);                                                             \
    repeat(b, offset, channels, count);                                                            \
    for (ptrdiff_t row = 0; row < rows; row += count) {                                            \
      ptrdiff_t start = row * channels;                                                            \
      const T *restrict from = grad + row * apart;                                                 \
      if (apart != channels) {                                                                     \
        for (ptrdiff_t k = 0; k < count; k++)                                                      \
          memcpy(line + k * channels, from + k * apart, channels * sizeof(T));                     \
        from = line;                                                                               \
      }                                                                                            \
      fetch(x + start, width * sizeof(T));                                                         \
      fetch_to_write(out + start, width * sizeof(T));                                              \
      for (ptrdiff_t j = 0; j < width; j++) {                                                      \
        float value = load_##T(x[start + j]), through = load_##T(from[j]);                         \
        if (silu) {                                                                                \
          float p = sigmoid_##T(value);                                                            \
          through = through * p * (1.0f + value * (1.0f - p));                                     \
        }                                                                                          \
        out[start + j] = store_##T(through + (a[j] * value + b[j]));                               \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  void add_linear_of_##T(const T *x, const T *grad, T *out, const float *slope,                    \
                         const float *offset, ptrdiff_t rows, ptrdiff_t channels,                  \
                         ptrdiff_t apart) {                                                        \
    backward_##T(x, grad, out, slope, offset, rows, channels, apart, 0);                           \
  }                                                                                                \
                                                                                                   \
  void silu_backward_of_##T(const T *x, const T *grad, T *out, const float *slope,                 \
                            const float *offset, ptrdiff_t rows, ptrdiff_t channels,               \
                            ptrdiff_t apart) {                                                     \
    backward_##T(x, grad, out, slope, offset, rows, channels, apart, 1);                           \
  }

DEFINE(bfloat16)
DEFINE(float32)
