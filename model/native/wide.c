/* Products by AVX512: a block of rows at a time, times one panel, and all sums stay in registers.

   The inputs of a row stand in words, of two bf16 or four bytes. A block's rows lie side by side,
   [words][rows of the block], so that what a panel's line is multiplied with comes from one place: the
   instruction takes a word from memory and gives it to all lanes.

   Where there are few rows what counts is how few bytes the weights are, and that the next ones are on
   their way. A narrow weight has twelve bits and says the same: the sign and the fraction in a byte, the
   exponent in four bits above a base of its panel, as nearly all weights of an output lie within 2^15 of
   each other. Those that do not are zeros here and stand in a list, to be added to the sums at the end.
   A narrow panel is [inputs / 8] pieces of 192 bytes: 32 of each of 4 pairs of inputs, then 32 words of
   16 bits that hold an exponent of each, the first lowest. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

/* Bytes from where a panel is read to where it is fetched. */
enum { AHEAD = 4096 };

/* Rows of one block: all have the same height, which is one of a few. */
static int height(long rows) {
  long blocks = (rows + TALLEST_BLOCK - 1) / TALLEST_BLOCK, each = (rows + blocks - 1) / blocks;
  return each == 1 ? 1 : (int)(each + 3) / 4 * 4;
}

struct blocks wide_blocks(long rows) {
  struct blocks b = {.height = height(rows)};
  b.count = (rows + b.height - 1) / b.height;
  return b;
}

struct turn {
  const char *x;
  long ldx, rows, words, parts;
  struct blocks blocks;
  uint32_t *to;
};

enum { WORDS_AT_ONCE = 256 };

/* Four words of each of four rows: what was a row is a column. */
INLINE void turn_four(const char *const row[4], long at, uint32_t *to, long height) {
  typedef uint32_t four __attribute__((vector_size(16)));
  four x[4];
  for (int i = 0; i < 4; i++) memcpy(x + i, row[i] + 4 * at, sizeof *x);
  four a = __builtin_shuffle(x[0], x[1], (four){0, 4, 1, 5}), b = __builtin_shuffle(x[2], x[3], (four){0, 4, 1, 5});
  four c = __builtin_shuffle(x[0], x[1], (four){2, 6, 3, 7}), d = __builtin_shuffle(x[2], x[3], (four){2, 6, 3, 7});
  x[0] = __builtin_shuffle(a, b, (four){0, 1, 4, 5});
  x[1] = __builtin_shuffle(a, b, (four){2, 3, 6, 7});
  x[2] = __builtin_shuffle(c, d, (four){0, 1, 4, 5});
  x[3] = __builtin_shuffle(c, d, (four){2, 3, 6, 7});
  for (int i = 0; i < 4; i++) memcpy(to + i * height, x + i, sizeof *x);
}

static void turn_part(void *context, long index) {
  const struct turn *t = context;
  long block = index / t->parts, from = index % t->parts * WORDS_AT_ONCE, height = t->blocks.height;
  long last = from + WORDS_AT_ONCE < t->words ? from + WORDS_AT_ONCE : t->words;
  uint32_t *to = t->to + block * t->words * height;
  for (long row = 0; row < height; row += 4) {
    const char *four[4];
    for (long i = 0; i < 4; i++) { /* a block's rows that are not there are never looked at */
      long at = block * height + row + i;
      four[i] = t->x + (at < t->rows ? at : t->rows - 1) * t->ldx;
    }
    for (long i = from; i < last; i += 4) turn_four(four, i, to + i * height + row, height);
  }
}

/* Rows of so many words, ldx bytes apart, to blocks: in `to`, or where they lie if there is one row. */
const uint32_t *wide_turn(const void *x, long ldx, long rows, long words, uint32_t *to) {
  struct turn t = {x, ldx, rows, words, (words + WORDS_AT_ONCE - 1) / WORDS_AT_ONCE, wide_blocks(rows), to};
  if (rows == 1) return x;
  pool_run(turn_part, &t, t.blocks.count * t.parts);
  return to;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")))

/* The bits of each code's exponent. */
AVX512 INLINE __m512i exponents(int base) {
  short bits[32];
  for (int i = 0; i < 32; i++) bits[i] = i % 16 == ZERO ? 0 : (short)((base + i % 16) << 7);
  return _mm512_loadu_si512(bits);
}

/* 32 weights, those of the pair of inputs whose codes are the lowest. */
AVX512 INLINE __m512i widened(const uint8_t *from, __m512i codes, __m512i exponents) {
  __m512i rest = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)from));
  return _mm512_ternarylogic_epi32(rest, _mm512_set1_epi16((short)0x807f),
                                   _mm512_permutexvar_epi16(codes, exponents), 0xea); /* a & b | c */
}

AVX512 static void widen_avx512(const uint8_t *from, int base, long inputs, bf16 *to) {
  __m512i bits = exponents(base);
  for (long i = 0; i < inputs; i += 8, from += PIECE, to += 8 * LANES) {
    __m512i codes = _mm512_loadu_si512(from + EXPONENTS);
    for (int line = 0; line < PIECE; line += 64) _mm_prefetch((const char *)from + AHEAD + line, _MM_HINT_T0);
    for (int pair = 0; pair < 4; pair++, codes = _mm512_srli_epi16(codes, 4))
      _mm512_storeu_si512(to + pair * 2 * LANES, widened(from + pair * 32, codes, bits));
  }
}

/* gcc 12 does not take the word from memory by itself, which costs a register and an instruction. */
#define ADD_PRODUCT(sum, form, line, word)                                                         \
  if (form == WHOLE)                                                                               \
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(line), "m"(word));                    \
  else                                                                                             \
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(line), "m"(word))

enum form { SIXTEEN, NARROW, WHOLE };

/* `rows` rows times `panels` panels, `apart` bytes from one to the next, to c[rows][COLUMNS]. `ahead`:
   bytes from where a panel is read to where it is fetched, or 0. */
AVX512 INLINE void product(enum form form, const uint32_t *x, const int32_t *start, int rows,
                           const uint8_t *b, long apart, int panels, long words, const uint8_t *bases,
                           long ahead, void *c) {
  __m512i sum[TALLEST_BLOCK][GROUP], bits[GROUP], codes[GROUP];
  const __m512i flip = _mm512_set1_epi8((char)0x80);
#pragma GCC unroll 2
  for (int p = 0; p < panels; p++) {
    if (form == NARROW) bits[p] = exponents(bases[p]);
#pragma GCC unroll 28
    for (int row = 0; row < rows; row++)
      sum[row][p] = form == WHOLE ? _mm512_set1_epi32(start[row]) : _mm512_setzero_si512();
  }
  int piece = form == NARROW ? PIECE : 256;
  for (long i = 0; i < words; i += 4, b += piece, x += 4 * rows) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++) {
      for (int line = 0; ahead && line < piece; line += 64)
        _mm_prefetch((const char *)b + p * apart + ahead + line, _MM_HINT_T0);
      if (form == NARROW) codes[p] = _mm512_loadu_si512(b + p * apart + EXPONENTS);
    }
#pragma GCC unroll 4
    for (int word = 0; word < 4; word++)
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++) {
        __m512i line;
        if (form == NARROW) {
          line = widened(b + p * apart + word * 32, codes[p], bits[p]);
          codes[p] = _mm512_srli_epi16(codes[p], 4);
        } else {
          line = _mm512_loadu_si512(b + p * apart + word * 64);
          if (form == WHOLE) line = _mm512_xor_si512(line, flip);
        }
#pragma GCC unroll 28
        for (int row = 0; row < rows; row++) ADD_PRODUCT(sum[row][p], form, line, x[word * rows + row]);
      }
  }
#pragma GCC unroll 2
  for (int p = 0; p < panels; p++)
#pragma GCC unroll 28
    for (int row = 0; row < rows; row++)
      _mm512_storeu_si512((int32_t *)c + row * COLUMNS + p * LANES, sum[row][p]);
}

/* There are 32 registers: up to 12 rows of both panels, or 28 of one after the other. */
AVX512 INLINE void group(enum form form, const uint32_t *x, const int32_t *start, int rows, const uint8_t *b,
                         long apart, long words, const uint8_t *bases, long ahead, void *c) {
  switch (rows) {
#define BOTH(n) case n: product(form, x, start, n, b, apart, 2, words, bases, ahead, c); break;
#define EACH(n)                                                                                    \
  case n:                                                                                          \
    product(form, x, start, n, b, 0, 1, words, bases, ahead, c);                                   \
    product(form, x, start, n, b + apart, 0, 1, words, bases ? bases + 1 : NULL, ahead, (float *)c + LANES); \
    break;
    BOTH(1) BOTH(4) BOTH(8) BOTH(12) EACH(16) EACH(20) EACH(24) EACH(28)
  }
}

#define OF(form)                                                                                   \
  AVX512 static void group_##form(const uint32_t *x, const int32_t *start, int rows, const uint8_t *b, \
                                  long apart, long words, const uint8_t *bases, long ahead, void *c) { \
    group(form, x, start, rows, b, apart, words, bases, ahead, c);                                 \
  }
OF(SIXTEEN)
OF(NARROW)
OF(WHOLE)

int wide_fit(long rows) { return block_level == 3 && rows <= MOST_ROWS; }

void wide_product(const struct matrix *m, long column, const uint32_t *x, const int32_t *start, int rows,
                  int again, void *c) {
  long panel = column / LANES, apart = panel_bytes(m, m->inputs), ahead = again ? 0 : AHEAD;
  const uint8_t *b = (const uint8_t *)m->panels + panel * apart;
  if (column + LANES >= m->outputs) apart = 0; /* the panel twice: the second result is not used */
  if (m->scales) group_WHOLE(x, start, rows, b, apart, m->inputs / 4, NULL, ahead, c);
  else if (m->bases) group_NARROW(x, NULL, rows, b, apart, m->inputs / 2, m->bases + panel, ahead, c);
  else group_SIXTEEN(x, NULL, rows, b, apart, m->inputs / 2, NULL, ahead, c);
}
#else
int wide_fit(long rows) { return rows < 0; }
void wide_product(const struct matrix *m, long column, const uint32_t *x, const int32_t *start, int rows,
                  int again, void *c) {
  (void)m, (void)column, (void)x, (void)start, (void)rows, (void)again, (void)c;
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
void wide_widen(const uint8_t *from, int base, long inputs, bf16 *to) {
#if defined(__x86_64__)
  if (block_level >= 3) return widen_avx512(from, base, inputs, to);
#endif
  widen_any(from, base, inputs, to);
}

/* What is not in the panels of the group at `column`: c[rows][COLUMNS] += x[rows][..] * odds. */
void wide_add_odds(const struct matrix *m, long column, const bf16 *x, long ldx, long rows, float *c) {
  long panel = column / LANES, last = column + LANES < m->outputs ? panel + GROUP : panel + 1;
  for (const struct odd *odd = m->odds + m->odd_starts[panel]; odd < m->odds + m->odd_starts[last]; odd++)
    for (long row = 0; row < rows; row++)
      c[row * COLUMNS + odd->column] += wide(x[row * ldx + odd->input]) * wide(odd->value);
}
