/* Products by AVX512: a block of rows at a time, times a group of panels, and all sums stay in registers.

   The inputs of a row stand in words, of two bf16 or four bytes. An instruction takes a word from memory
   and gives it to all lanes, to be multiplied with a line of each panel.

   Where there are few rows what counts is how few bytes the weights are, and that the next ones are on
   their way. A narrow weight has twelve bits and says the same: the sign and the fraction in a byte, the
   exponent in four bits above a base of its panel, as nearly all weights of an output lie within 2^15 of
   each other. Those that do not are zeros here and stand in a list, to be added to the sums at the end.
   A narrow panel is [inputs / 8] pieces of 192 bytes: 32 of each of 4 pairs of inputs, then 32 words of
   16 bits that hold an exponent of each, the first lowest. The pieces of a group's panels take turns, so
   that all of a matrix is one stream.

   Six bits are whole numbers with 32 more. A panel of these is [inputs / 16] pieces of 192 bytes: three
   words of each output in the lower bits of three lines, whose upper bits hold the fourth word, the lowest
   in the first line. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

/* Bytes from where narrow panels are read to where they are fetched. */
enum { AHEAD = 8192 };
/* Words at a time, where several blocks are multiplied with the same: it stays in the first cache. With more
   words sums go to memory and back less often, which pays where there are more than three blocks; two take
   1 to 2 % longer. */
enum { CHUNK = 128, CHUNK_OF_MANY = 256 };

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

/* What a product reads: panels of bf16, of twelve bits, of twelve bits that the block before has widened,
   of whole numbers, or of those in six bits. */
enum form { SIXTEEN, NARROW, WIDENED, WHOLE, SIX };

/* Some words of a block of rows times a group of panels. */
struct product {
  const char *x;
  long ldx, words; /* bytes from row to row */
  const uint8_t *panels, *bases;
  long apart;                 /* bytes from panel to panel, SIXTEEN, WHOLE and SIX */
  const uint8_t *soon[GROUP]; /* what to fetch meanwhile, or NULL: so much further with every four words */
  long soon_step;
  uint8_t *widened;     /* where NARROW leaves bf16 for WIDENED, or NULL */
  const int32_t *start; /* what the sums of whole numbers begin with */
  int32_t *sums;        /* [rows][COLUMNS], added to unless they begin here */
  int begins;
};

#define ADD_PRODUCT(sum, form, line, word)                                                         \
  if (form >= WHOLE) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(line), "v"(word));            \
  else __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(line), "v"(word))

/* A word in all lanes. By hand, or gcc 12 has each product load it: a core loads twice in a cycle, and
   multiplies as often. */
AVX512 INLINE __m512i in_all(const char *word) {
  __m512i x;
  __asm__("vpbroadcastd %1, %0" : "=v"(x) : "m"(*(const int32_t *)word));
  return x;
}

AVX512 INLINE void multiply(enum form form, int rows, const struct product *p) {
  __m512i sum[TALLEST_BLOCK][GROUP], bits[GROUP], codes[GROUP], fourth[GROUP];
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  const uint8_t *b = p->panels, *soon[GROUP] = {p->soon[0], p->soon[1]};
  const char *x[3] = {p->x, p->x + 4 * p->ldx, p->x + 8 * p->ldx};
  long one = p->ldx, three = 3 * p->ldx;
  uint8_t *left = p->widened;
  int bytes = form == SIXTEEN || form == WHOLE ? 256 : PIECE; /* of four words of a panel */
  long apart = form == NARROW ? PIECE : form == WIDENED ? 64 : p->apart;
#pragma GCC unroll 2
  for (int i = 0; i < GROUP; i++) {
    if (form == NARROW) bits[i] = exponents(p->bases[i]);
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
      sum[row][i] = !p->begins      ? _mm512_loadu_si512(p->sums + row * COLUMNS + i * LANES)
                    : form >= WHOLE ? _mm512_set1_epi32(p->start[row])
                                    : _mm512_setzero_si512();
  }
  for (long at = 0; at < p->words; at += 4) {
    /* Five registers name twelve rows; gcc would take one for each, and has not so many. */
    __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(one), "+r"(three));
#pragma GCC unroll 2
    for (int i = 0; i < GROUP; i++) {
      if (soon[i]) {
        for (int line = 0; line < bytes; line += 64) _mm_prefetch((const char *)soon[i] + line, _MM_HINT_T0);
        soon[i] += p->soon_step;
      }
      if (form == NARROW) codes[i] = _mm512_loadu_si512(b + i * apart + EXPONENTS);
    }
#pragma GCC unroll 4
    for (int word = 0; word < 4; word++) {
      __m512i line[GROUP];
#pragma GCC unroll 2
      for (int i = 0; i < GROUP; i++)
        if (form == NARROW) {
          line[i] = widened(b + i * apart + word * 32, codes[i], bits[i]);
          codes[i] = _mm512_srli_epi16(codes[i], 4);
          if (left) _mm512_store_si512(left + (word * GROUP + i) * 64, line[i]);
        } else if (form == SIX && word == 3) {
          line[i] = fourth[i];
        } else if (form == SIX) {
          __m512i both = _mm512_loadu_si512(b + i * apart + word * 64);
          __m512i upper = _mm512_srli_epi16(both, 6 - 2 * word);
          __m512i known = word ? fourth[i] : _mm512_setzero_si512();
          line[i] = _mm512_and_si512(both, _mm512_set1_epi8(63));
          fourth[i] = _mm512_ternarylogic_epi32(upper, _mm512_set1_epi8(3 << 2 * word), known, 0xea);
        } else {
          line[i] = _mm512_loadu_si512(b + i * apart + word * (form == WIDENED ? 128 : 64));
          if (form == WHOLE) line[i] = _mm512_xor_si512(line[i], flip);
        }
#pragma GCC unroll 12
      for (int row = 0; row < rows; row++) {
        long further = row % 4 == 3 ? three : row % 4 * one;
        __m512i both = in_all(x[row / 4] + further + 4 * word);
        ADD_PRODUCT(sum[row][0], form, line[0], both);
        ADD_PRODUCT(sum[row][1], form, line[1], both);
      }
    }
    for (int i = 0; i < 3; i++) x[i] += 16;
    b += form == NARROW ? GROUP * PIECE : form == SIX ? PIECE : form == WIDENED ? 512 : 256;
    if (form == NARROW && left) left += 512;
  }
#pragma GCC unroll 2
  for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
      _mm512_storeu_si512(p->sums + row * COLUMNS + i * LANES, sum[row][i]);
}

/* There are 32 registers: sums of up to 12 rows. */
#define CASE(form, rows) case rows: multiply(form, rows, p); break;
#define OF(form)                                                                                   \
  AVX512 static void multiply_##form(int rows, const struct product *p) {                          \
    switch (rows) {                                                                                \
      CASE(form, 1) CASE(form, 2) CASE(form, 3) CASE(form, 4)                                      \
      CASE(form, 5) CASE(form, 6) CASE(form, 7) CASE(form, 8)                                      \
      CASE(form, 9) CASE(form, 10) CASE(form, 11) CASE(form, 12)                                   \
    }                                                                                              \
  }
OF(SIXTEEN)
OF(NARROW)
OF(WIDENED)
OF(WHOLE)
OF(SIX)

int wide_fit(const struct matrix *m, long rows) { return block_level == 3 && (m->bases || rows <= MOST_ROWS); }

void wide_product(const struct matrix *m, long column, const void *x, long ldx, int rows, const int32_t *starts,
                  void *c) {
  uint8_t widened[GROUP * CHUNK_OF_MANY * 64] __attribute__((aligned(64)));
  int blocks = (rows + TALLEST_BLOCK - 1) / TALLEST_BLOCK, many = blocks > 1, inputs = m->scales ? 4 : 2;
  long panel = column / LANES, apart = panel_bytes(m, m->inputs), words = m->inputs / inputs;
  long most = blocks > 3 ? CHUNK_OF_MANY : CHUNK, chunks = many || !m->bases ? (words + most - 1) / most : 1;
  long chunk = (words / 4 + chunks - 1) / chunks * 4;
  const uint8_t *b = (const uint8_t *)m->panels + panel * apart, *next = b + GROUP * apart;
  for (long at = 0; at < words; at += chunk) {
    struct product p = {.ldx = ldx, .words = words - at < chunk ? words - at : chunk, .begins = !at};
    long bytes = panel_bytes(m, p.words * inputs) * (m->bases ? GROUP : 1);
    const uint8_t *soon[GROUP];
    if (m->bases) { /* the next chunk in two halves, or what comes so far behind */
      p.bases = m->bases + panel;
      p.widened = many ? widened : NULL;
      p.soon_step = many ? PIECE : GROUP * PIECE;
      soon[0] = b + (many ? bytes : AHEAD);
      soon[1] = soon[0] + (many ? bytes / 2 : PIECE);
    } else {
      p.apart = column + LANES < m->outputs ? apart : 0; /* the panel twice: the second result is not used */
      p.soon_step = panel_bytes(m, 4 * inputs);
      soon[0] = at + chunk < words ? b + bytes : next;
      soon[1] = soon[0] + apart;
    }
    for (int block = 0, row = 0, height; block < blocks; block++, row += height) {
      height = (rows - row + blocks - block - 1) / (blocks - block);
      p.x = (const char *)x + row * ldx + at * 4;
      p.panels = m->bases && block ? widened : b;
      p.soon[0] = block == 0 ? soon[0] : NULL;
      p.soon[1] = block == many ? soon[1] : NULL;
      p.start = starts ? starts + row : NULL;
      p.sums = (int32_t *)c + row * COLUMNS;
      if (is_six(m)) multiply_SIX(height, &p);
      else if (m->scales) multiply_WHOLE(height, &p);
      else if (!m->bases) multiply_SIXTEEN(height, &p);
      else if (block) multiply_WIDENED(height, &p);
      else multiply_NARROW(height, &p);
    }
    b += bytes;
  }
}
#else
int wide_fit(const struct matrix *m, long rows) { return m->outputs < 0 && rows < 0; }
void wide_product(const struct matrix *m, long column, const void *x, long ldx, int rows, const int32_t *starts,
                  void *c) {
  (void)m, (void)column, (void)x, (void)ldx, (void)rows, (void)starts, (void)c;
}
#endif

/* `inputs` of a narrow panel as block_product wants them. */
CLONES void wide_widen(const uint8_t *from, int base, long inputs, bf16 *to) {
  for (long i = 0; i < inputs; i += 8, from += GROUP * PIECE)
    for (int pair = 0; pair < 4; pair++, to += 2 * LANES)
      for (int k = 0; k < 2 * LANES; k++) {
        unsigned rest = from[pair * 32 + k];
        unsigned code = from[EXPONENTS + 2 * k + pair / 2] >> pair % 2 * 4 & 15;
        to[k] = (bf16)((rest & 0x80) << 8 | (rest & 0x7f) | (code == ZERO ? 0 : (base + code) << 7));
      }
}

/* What is not in the panels of the group at `column`: c[rows][COLUMNS] += x[rows][..] * odds. */
void wide_add_odds(const struct matrix *m, long column, const bf16 *x, long ldx, long rows, float *c) {
  long panel = column / LANES, last = column + LANES < m->outputs ? panel + GROUP : panel + 1;
  for (const struct odd *odd = m->odds + m->odd_starts[panel]; odd < m->odds + m->odd_starts[last]; odd++)
    for (long row = 0; row < rows; row++)
      c[row * COLUMNS + odd->column] += wide(x[row * ldx + odd->input]) * wide(odd->value);
}
