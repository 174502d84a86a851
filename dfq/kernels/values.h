/* The types that values come in: arithmetic is done in float, whatever they are kept in. */
#ifndef DFQ_VALUES_H
#define DFQ_VALUES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;
typedef float float32;

static inline float from_bits(uint32_t bits) {
  union { uint32_t bits; float value; } both = {.bits = bits};
  return both.value;
}

static inline uint32_t to_bits(float value) {
  union { float value; uint32_t bits; } both = {.value = value};
  return both.bits;
}

static inline float load_bfloat16(bfloat16 value) { return from_bits((uint32_t)value << 16); }

/* To nearest, ties to even, as PyTorch rounds. NaN stays NaN where its low bits are 0: such as
 * arithmetic makes, and such as come from a bfloat16. */
static inline bfloat16 store_bfloat16(float value) {
  uint32_t bits = to_bits(value);
  return (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Ask for what lies AHEAD bytes further on than so many bytes: tensors that were made long before,
 * or freed, come from far away, and processors look ahead within a page alone. */
#define AHEAD 2048
#define LINE 64

static inline void fetch(const void *from, ptrdiff_t bytes) {
  for (ptrdiff_t i = AHEAD; i < AHEAD + bytes; i += LINE)
    __builtin_prefetch((const char *)from + i, 0);
}

static inline void fetch_to_write(const void *to, ptrdiff_t bytes) {
  for (ptrdiff_t i = AHEAD; i < AHEAD + bytes; i += LINE) __builtin_prefetch((const char *)to + i, 1);
}

static inline float load_float32(float value) { return value; }
static inline float store_float32(float value) { return value; }

#endif
