/* A matrix times few rows. Every weight comes from memory for a handful of products, so what counts is
   how few bytes they are, and that the next ones are on their way.

   A narrow weight has twelve bits and says the same: the sign and the fraction in a byte, the exponent
   in four bits above a base of its panel, as nearly all weights of an output lie within 2^15 of each
   other. Those that do not are zeros here and stand in a list, to be added to the sums at the end.

   A narrow panel is [inputs / 8] pieces of 192 bytes: 32 of each of 4 pairs of inputs, then 32 words
   that hold an exponent of each, the first lowest. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

/* Bytes from where a panel is read to where it is fetched. */
enum { AHEAD = 4096 };

/* Rows are computed in so many at once; there are zeros where that is more. */
int few_rows(long rows) { return rows <= 2 ? (int)rows : rows <= 12 ? (int)(rows + 3) / 4 * 4 : rows <= 16 ? 16 : 24; }

struct pairs {
  const bf16 *x;
  long ldx, rows, inputs;
  uint32_t *to;
  int count;
};

enum { PAIRS_AT_ONCE = 256 };

static void turn(void *context, long part) {
  const struct pairs *p = context;
  long last = (part + 1) * PAIRS_AT_ONCE < p->inputs / 2 ? (part + 1) * PAIRS_AT_ONCE : p->inputs / 2;
  for (long i = part * PAIRS_AT_ONCE; i < last; i++) {
    uint32_t *to = p->to + i * p->count;
    for (long row = 0; row < p->rows; row++) memcpy(to + row, p->x + row * p->ldx + 2 * i, sizeof *to);
    for (long row = p->rows; row < p->count; row++) to[row] = 0;
  }
}

/* x[rows][inputs] to [inputs / 2][few_rows(rows)] pairs: in `to`, or where x lies if it is one row. */
const uint32_t *few_pairs(const bf16 *x, long ldx, long rows, long inputs, uint32_t *to) {
  struct pairs p = {x, ldx, rows, inputs, to, few_rows(rows)};
  if (rows == 1) return (const void *)x;
  pool_run(turn, &p, (inputs / 2 + PAIRS_AT_ONCE - 1) / PAIRS_AT_ONCE);
  return to;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

/* The word of each exponent's code. */
AVX512 INLINE __m512i exponents(int base) {
  short word[32];
  for (int i = 0; i < 32; i++) word[i] = i % 16 == ZERO ? 0 : (short)((base + i % 16) << 7);
  return _mm512_loadu_si512(word);
}

/* 32 weights of the pair of inputs whose codes are the lowest in `codes`. */
AVX512 INLINE __m512i widened(const uint8_t *from, __m512i codes, __m512i words) {
  __m512i rest = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)from));
  return _mm512_ternarylogic_epi32(rest, _mm512_set1_epi16((short)0x807f),
                                   _mm512_permutexvar_epi16(codes, words), 0xea); /* a & b | c */
}

AVX512 static void widen_avx512(const uint8_t *from, int base, long inputs, bf16 *to) {
  __m512i words = exponents(base);
  for (long i = 0; i < inputs; i += 8, from += PIECE, to += 8 * LANES) {
    __m512i codes = _mm512_loadu_si512(from + EXPONENTS);
    for (int pair = 0; pair < 4; pair++, codes = _mm512_srli_epi16(codes, 4))
      _mm512_storeu_si512(to + pair * 2 * LANES, widened(from + pair * 32, codes, words));
  }
}

/* gcc 12 never reads the pair of a row as part of the product, which takes a register and an
   instruction more. */
#define ADD_PRODUCT(sum, weights, pair)                                                            \
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(pair))

/* `count` rows times `panels` panels, `apart` bytes from one to the next, to c[count][COLUMNS]. */
AVX512 INLINE void product(const uint32_t *x, int count, const uint8_t *b, long apart, int panels,
                           long inputs, const uint8_t *bases, float *c) {
  __m512 sum[24][GROUP];
  __m512i words[GROUP], codes[GROUP];
#pragma GCC unroll 2
  for (int p = 0; p < panels; p++) {
    if (bases) words[p] = exponents(bases[p]);
#pragma GCC unroll 24
    for (int row = 0; row < count; row++) sum[row][p] = _mm512_setzero_ps();
  }
  int piece = bases ? PIECE : 8 * LANES * (int)sizeof(bf16);
  for (long i = 0; i < inputs; i += 8, b += piece, x += 4 * count) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++) {
      for (int line = 0; line < piece; line += 64)
        _mm_prefetch((const char *)b + p * apart + AHEAD + line, _MM_HINT_T0);
      if (bases) codes[p] = _mm512_loadu_si512(b + p * apart + EXPONENTS);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++)
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++) {
        __m512i weights;
        if (bases) {
          weights = widened(b + p * apart + pair * 32, codes[p], words[p]);
          codes[p] = _mm512_srli_epi16(codes[p], 4);
        } else {
          weights = _mm512_loadu_si512(b + p * apart + pair * 64);
        }
#pragma GCC unroll 24
        for (int row = 0; row < count; row++) ADD_PRODUCT(sum[row][p], weights, x[pair * count + row]);
      }
  }
#pragma GCC unroll 2
  for (int p = 0; p < panels; p++)
#pragma GCC unroll 24
    for (int row = 0; row < count; row++) _mm512_storeu_ps(c + row * COLUMNS + p * LANES, sum[row][p]);
}

/* There are 32 registers: up to 12 rows of both panels, or 24 of one after the other. */
AVX512 INLINE void group(const uint32_t *x, int count, const uint8_t *b, long apart, long inputs,
                         const uint8_t *bases, float *c) {
  switch (count) {
  case 1: return product(x, 1, b, apart, 2, inputs, bases, c);
  case 2: return product(x, 2, b, apart, 2, inputs, bases, c);
  case 4: return product(x, 4, b, apart, 2, inputs, bases, c);
  case 8: return product(x, 8, b, apart, 2, inputs, bases, c);
  case 12: return product(x, 12, b, apart, 2, inputs, bases, c);
  case 16:
    product(x, 16, b, 0, 1, inputs, bases, c);
    return product(x, 16, b + apart, 0, 1, inputs, bases ? bases + 1 : NULL, c + LANES);
  default:
    product(x, 24, b, 0, 1, inputs, bases, c);
    return product(x, 24, b + apart, 0, 1, inputs, bases ? bases + 1 : NULL, c + LANES);
  }
}

AVX512 static void group_plain(const uint32_t *x, int count, const uint8_t *b, long apart, long inputs,
                               float *c) {
  group(x, count, b, apart, inputs, NULL, c);
}

AVX512 static void group_narrow(const uint32_t *x, int count, const uint8_t *b, long apart, long inputs,
                                const uint8_t *bases, float *c) {
  group(x, count, b, apart, inputs, bases, c);
}

int few_fit(long rows) { return block_level == 3 && rows <= FEW; }

void few_product(const struct matrix *m, long column, const uint32_t *x, int count, float *c) {
  long panel = column / LANES, apart = panel_bytes(m, m->inputs);
  const uint8_t *b = (const uint8_t *)m->panels + panel * apart;
  if (column + LANES >= m->outputs) apart = 0; /* the panel twice: the second result is not used */
  if (m->bases) group_narrow(x, count, b, apart, m->inputs, m->bases + panel, c);
  else group_plain(x, count, b, apart, m->inputs, c);
}
#else
int few_fit(long rows) { return (void)rows, 0; }
void few_product(const struct matrix *m, long column, const uint32_t *x, int count, float *c) {
  (void)m, (void)column, (void)x, (void)count, (void)c;
}
#endif

CLONES static void widen_any(const uint8_t *from, int base, long inputs, bf16 *to) {
  for (long i = 0; i < inputs; i += 8, from += PIECE)
    for (int pair = 0; pair < 4; pair++, to += 2 * LANES)
      for (int k = 0; k < 2 * LANES; k++) {
        unsigned rest = from[pair * 32 + k];
        unsigned code = from[EXPONENTS + 2 * k + pair / 2] >> pair % 2 * 4 & 15;
        to[k] = (bf16)((rest & 0x80) << 8 | (rest & 0x7f) | (code == ZERO ? 0 : (base + code) << 7));
      }
}

/* `inputs` of a narrow panel as block_product wants them. */
void few_widen(const uint8_t *from, int base, long inputs, bf16 *to) {
#if defined(__x86_64__)
  if (block_level >= 3) return widen_avx512(from, base, inputs, to);
#endif
  widen_any(from, base, inputs, to);
}

/* What is not in the panels of the group at `column`: c[rows][COLUMNS] += x[rows][..] * odds. */
void few_add_odds(const struct matrix *m, long column, const bf16 *x, long ldx, long rows, float *c) {
  long panel = column / LANES, last = column + LANES < m->outputs ? panel + GROUP : panel + 1;
  for (const struct odd *odd = m->odds + m->odd_starts[panel]; odd < m->odds + m->odd_starts[last]; odd++)
    for (long row = 0; row < rows; row++)
      c[row * COLUMNS + odd->column] += wide(x[row * ldx + odd->input]) * wide(odd->value);
}
