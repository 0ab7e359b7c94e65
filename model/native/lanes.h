/* Sixteen numbers at a time, in the compiler's own vectors: one source for every instruction set.
   CLONES compiles a function for several, and the right one is taken when the library is loaded. */
#pragma once
#include "block.h"

#include <string.h>

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

INLINE floats all(float x) { return x - (floats){0}; }

INLINE floats get(const float *from) {
  floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

INLINE void put(float *to, floats x) { memcpy(to, &x, sizeof x); }

INLINE floats get_bf16(const bf16 *from) {
  halves x;
  memcpy(&x, from, sizeof x);
  return (floats)(__builtin_convertvector(x, words) << 16);
}

/* To the nearest, ties to even. A NaN that arithmetic made has its high bits set and stays one. */
INLINE void put_bf16(bf16 *to, floats x) {
  words bits = (words)x;
  halves narrow = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
  memcpy(to, &narrow, sizeof narrow);
}

/* The same for numbers above 0, half way up instead of to even. */
INLINE void put_share(bf16 *to, floats x) {
  halves narrow = __builtin_convertvector(((words)x + 0x8000) >> 16, halves);
  memcpy(to, &narrow, sizeof narrow);
}

INLINE floats pick(ints mask, floats yes, floats no) {
  return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

INLINE floats larger(floats a, floats b) { return pick(a > b, a, b); }

/* 2 to the power of x, for x up to 127: relative error below 3e-6, a thousandth of a rounding to bf16;
   what is below 2^-126 gives that. The coefficients are the minimax polynomial of this degree between
   -1/2 and 1/2. NaN stays NaN. */
INLINE floats power(floats x) {
  x = pick(x < all(-126.0f), all(-126.0f), x);
  /* Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits. */
  floats shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
  floats p = f * 0.009570090100169182f + 0.05591785907745361f;
  p = p * f + 0.2402474582195282f;
  p = p * f + 0.6931217908859253f;
  p = p * f + 0.9999992847442627f;
  return (floats)((ints)p + ((ints)shifted << 23));
}

/* 1 / x for x between 1 and 2^120: relative error below 1e-5. A division of sixteen numbers takes as
   long as twenty of these instructions: an estimate from the exponent, improved twice by Newton. */
INLINE floats inverse(floats x) {
  floats y = (floats)(0x7ef311c7 - (ints)x);
  y = y * (2.0f - x * y);
  return y * (2.0f - x * y);
}

/* x * Phi(x), off by 2e-6 of x at most. Phi(x) - 1/2 is x times a polynomial of x * x; its coefficients are
   the minimax ones between -4.75 and 4.75, outside of which Phi is 0 or 1 to within that, for x * x
   brought between -1 and 1. */
INLINE floats gelu(floats x) {
  floats near = larger(all(-4.75f), x);
  near = pick(near > all(4.75f), all(4.75f), near);
  floats v = near * near * (2 / (4.75f * 4.75f)) - 1.0f;
  floats p = v * 0.001590485917404294f - 0.004033224191516638f;
  p = p * v + 0.0044189332984387875f;
  p = p * v - 0.0066888644360005856f;
  p = p * v + 0.013791065663099289f;
  p = p * v - 0.02193520776927471f;
  p = p * v + 0.030307190492749214f;
  p = p * v - 0.0405072383582592f;
  p = p * v + 0.053242843598127365f;
  p = p * v - 0.07367091625928879f;
  p = p * v + 0.1487482190132141f;
  return x * (near * p + 0.5f);
}

INLINE floats silu(floats x) {
  floats turned = x * -1.44269504f;
  return x * inverse(power(pick(turned > all(100.0f), all(100.0f), turned)) + 1.0f);
}

/* Lanes turned by so many places. */
#define TURNED(x, by)                                                                              \
  __builtin_shuffle(x, (ints){(0 + by) % 16, (1 + by) % 16, (2 + by) % 16, (3 + by) % 16,          \
                              (4 + by) % 16, (5 + by) % 16, (6 + by) % 16, (7 + by) % 16,          \
                              (8 + by) % 16, (9 + by) % 16, (10 + by) % 16, (11 + by) % 16,        \
                              (12 + by) % 16, (13 + by) % 16, (14 + by) % 16, (15 + by) % 16})

/* Rows become columns: every pass shuffles all rows like a deck of cards, the fourth one is the last. */
INLINE void transpose(words x[LANES]) {
  for (int pass = 0; pass < 4; pass++) {
    words y[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      const words a = x[i], b = x[i + LANES / 2];
      y[2 * i] = __builtin_shuffle(a, b, (ints){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      y[2 * i + 1] =
          __builtin_shuffle(a, b, (ints){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    }
    memcpy(x, y, sizeof y);
  }
}

/* The sum of the lanes, in one order everywhere. */
INLINE float total(floats x) {
  x += TURNED(x, 8);
  x += TURNED(x, 4);
  x += TURNED(x, 2);
  x += TURNED(x, 1);
  return x[0];
}

INLINE float largest(floats x) {
  x = larger(x, TURNED(x, 8));
  x = larger(x, TURNED(x, 4));
  x = larger(x, TURNED(x, 2));
  x = larger(x, TURNED(x, 1));
  return x[0];
}
