/* What an iteration does to the pixels themselves, each in one pass over them.
 *
 * Pixels are float32 in planes, (images, 3, height, width); what the network sees, and the gradient
 * it gives back, have the channels innermost. One thread, as every process of a synthesis has.
 */
#include "values.h"

/* Of a rectangle: first and last row, first and last column, the last ones not within. */
enum { TOP, BOTTOM, LEFT, RIGHT, EDGES };

static inline int crosses(const int32_t *edges, ptrdiff_t y) {
  return edges[TOP] <= y && y < edges[BOTTOM] && edges[LEFT] < edges[RIGHT];
}

#define DEFINE(T)                                                                                  \
  /* Images mirrored where `flipped` is not 0, then blanked within `erased`, a rectangle each. A   \
   * `line` holds 3 * width values: to convert while they are interleaved is not vectorised. */    \
  void view_of_##T(const float *restrict pixels, T *restrict view,                                 \
                   const uint8_t *restrict flipped, const int32_t *restrict erased,                \
                   float *restrict line, ptrdiff_t images, ptrdiff_t height, ptrdiff_t width) {    \
    ptrdiff_t plane = height * width;                                                              \
    for (ptrdiff_t row = 0; row < images * height; row++) {                                        \
      ptrdiff_t n = row / height, y = row % height;                                                \
      const float *restrict r = pixels + n * 3 * plane + y * width;                                \
      const float *restrict g = r + plane, *restrict b = g + plane;                                \
      if (flipped[n])                                                                              \
        for (ptrdiff_t x = 0; x < width; x++) {                                                    \
          line[3 * x] = r[width - 1 - x];                                                          \
          line[3 * x + 1] = g[width - 1 - x];                                                      \
          line[3 * x + 2] = b[width - 1 - x];                                                      \
        }                                                                                          \
      else                                                                                         \
        for (ptrdiff_t x = 0; x < width; x++) {                                                    \
          line[3 * x] = r[x];                                                                      \
          line[3 * x + 1] = g[x];                                                                  \
          line[3 * x + 2] = b[x];                                                                  \
        }                                                                                          \
      T *restrict to = view + row * width * 3;                                                     \
      for (ptrdiff_t x = 0; x < 3 * width; x++) to[x] = store_##T(line[x]);                        \
      const int32_t *edges = erased + n * EDGES;                                                   \
      if (crosses(edges, y))                                                                       \
        memset(to + 3 * edges[LEFT], 0, 3 * (edges[RIGHT] - edges[LEFT]) * sizeof(T));             \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  /* The gradient of the pixels, `out`, from that of such a view. */                               \
  void view_backward_of_##T(const T *restrict grad, float *restrict out,                           \
                            const uint8_t *restrict flipped, const int32_t *restrict erased,       \
                            ptrdiff_t images, ptrdiff_t height, ptrdiff_t width) {                 \
    ptrdiff_t plane = height * width;                                                              \
    for (ptrdiff_t row = 0; row < images * height; row++) {                                        \
      ptrdiff_t n = row / height, y = row % height;                                                \
      const T *restrict from = grad + row * width * 3;                                             \
      float *restrict r = out + n * 3 * plane + y * width;                                         \
      float *restrict g = r + plane, *restrict b = g + plane;                                      \
      fetch_to_write(r, width * sizeof(float));                                                    \
      fetch_to_write(g, width * sizeof(float));                                                    \
      fetch_to_write(b, width * sizeof(float));                                                    \
      if (flipped[n])                                                                              \
        for (ptrdiff_t x = 0; x < width; x++) {                                                    \
          r[width - 1 - x] = load_##T(from[3 * x]);                                                \
          g[width - 1 - x] = load_##T(from[3 * x + 1]);                                            \
          b[width - 1 - x] = load_##T(from[3 * x + 2]);                                            \
        }                                                                                          \
      else                                                                                         \
        for (ptrdiff_t x = 0; x < width; x++) {                                                    \
          r[x] = load_##T(from[3 * x]);                                                            \
          g[x] = load_##T(from[3 * x + 1]);                                                        \
          b[x] = load_##T(from[3 * x + 2]);                                                        \
        }                                                                                          \
      const int32_t *edges = erased + n * EDGES;                                                   \
      if (crosses(edges, y)) {                                                                     \
        ptrdiff_t first = flipped[n] ? width - edges[RIGHT] : edges[LEFT];                         \
        size_t bytes = (edges[RIGHT] - edges[LEFT]) * sizeof(float);                               \
        memset(r + first, 0, bytes);                                                               \
        memset(g + first, 0, bytes);                                                               \
        memset(b + first, 0, bytes);                                                               \
      }                                                                                            \
    }                                                                                              \
  }

DEFINE(bfloat16)
DEFINE(float32)

/* Of each pixel its value times how many pixels its neighbourhood of 3 x 3 holds, less their sum:
 * the gradient, `out`, of half the sum of the squared differences to the eight neighbours. `sums`
 * are, of each image, the sum of its squares and its inner product with the pixels. A `line` holds
 * width + 2 values. */
void variation_of_float32(const float *restrict pixels, float *restrict out, double *restrict sums,
                          float *restrict line, ptrdiff_t images, ptrdiff_t rows_each,
                          ptrdiff_t height, ptrdiff_t width) {
  line[0] = line[width + 1] = 0.0f;
  memset(sums, 0, 2 * images * sizeof(double));
  for (ptrdiff_t row = 0; row < images * rows_each; row++) {
    ptrdiff_t n = row / rows_each, y = row % height;
    const float *restrict x = pixels + row * width;
    float *restrict to = out + row * width, *restrict column = line + 1;
    float rows = 1.0f + (y > 0) + (y + 1 < height);
    memcpy(column, x, width * sizeof(float));
    if (y > 0)
      for (ptrdiff_t i = 0; i < width; i++) column[i] += x[i - width];
    if (y + 1 < height)
      for (ptrdiff_t i = 0; i < width; i++) column[i] += x[i + width];
    for (ptrdiff_t i = 0; i < width; i++)
      to[i] = 3.0f * rows * x[i] - (line[i] + line[i + 1] + line[i + 2]);
    /* A column less at either end, two where there is but one. */
    to[0] -= rows * x[0];
    to[width - 1] -= rows * x[width - 1];
    float square = 0.0f, inner = 0.0f;
#pragma omp simd reduction(+ : square, inner)
    for (ptrdiff_t i = 0; i < width; i++) {
      square += to[i] * to[i];
      inner += to[i] * x[i];
    }
    sums[2 * n] += square;
    sums[2 * n + 1] += inner;
  }
}

/* Sums of blocks of 2 by 2, `(planes, height / 2, width / 2)`; the rows of a block first. */
void halved_of_float32(const float *restrict images, float *restrict out, float *restrict line,
                       ptrdiff_t planes, ptrdiff_t height, ptrdiff_t width) {
  for (ptrdiff_t row = 0; row < planes * height / 2; row++) {
    const float *restrict upper = images + 2 * row * width, *restrict lower = upper + width;
    float *restrict to = out + row * (width / 2);
    for (ptrdiff_t x = 0; x < width; x++) line[x] = upper[x] + lower[x];
    for (ptrdiff_t x = 0; x < width / 2; x++) to[x] = line[2 * x] + line[2 * x + 1];
  }
}

/* Adds to `out`, `(planes, 2 * height, 2 * width)`, what a grid of half the side is when it is
 * enlarged bilinearly: three quarters of the nearest and one of the next nearest, in both
 * directions. A `line` holds width + 2 values. */
void add_doubled_of_float32(const float *restrict grid, float *restrict out, float *restrict line,
                            ptrdiff_t planes, ptrdiff_t height, ptrdiff_t width) {
  for (ptrdiff_t row = 0; row < planes * 2 * height; row++) {
    ptrdiff_t plane = row / (2 * height), down = row % (2 * height), y = down / 2;
    ptrdiff_t next = down % 2 ? (y + 1 < height ? y + 1 : y) : (y > 0 ? y - 1 : y);
    const float *restrict near = grid + (plane * height + y) * width;
    const float *restrict far = grid + (plane * height + next) * width;
    float *restrict to = out + row * 2 * width;
    fetch_to_write(to, 2 * width * sizeof(float));
    for (ptrdiff_t x = 0; x < width; x++) line[x + 1] = 0.75f * near[x] + 0.25f * far[x];
    line[0] = line[1];
    line[width + 1] = line[width];
    for (ptrdiff_t x = 0; x < width; x++) {
      to[2 * x] += 0.75f * line[x + 1] + 0.25f * line[x];
      to[2 * x + 1] += 0.75f * line[x + 1] + 0.25f * line[x + 2];
    }
  }
}
