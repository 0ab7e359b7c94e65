#include "block.h"

#include <stddef.h>
#include <string.h>
#include <unistd.h>

static void portable(const bf16 *a, long lda, int rows, const bf16 *b, long stride, int panels,
                     int inputs, float *c, long ldc, int more, struct soon *soon) {
  (void)soon;
  for (int row = 0; row < rows; row++)
    for (int panel = 0; panel < panels; panel++) {
      float sum[LANES] = {0}, *to = c + row * ldc + panel * LANES;
      if (more) memcpy(sum, to, sizeof sum);
      const bf16 *pairs = b + panel * stride;
      for (int i = 0; i < inputs; i++)
        for (int lane = 0; lane < LANES; lane++)
          sum[lane] += wide(a[row * lda + i]) * wide(pairs[(i / 2 * LANES + lane) * 2 + i % 2]);
      memcpy(to, sum, sizeof sum);
    }
}

static void portable8(const int8_t *a, long lda, int rows, const int8_t *b, long stride, int panels,
                      int inputs, const int32_t *sums, int32_t *c, int more, struct soon *soon) {
  (void)soon;
  (void)sums;
  for (int row = 0; row < rows; row++)
    for (int panel = 0; panel < panels; panel++) {
      int32_t sum[LANES] = {0}, *to = c + row * COLUMNS + panel * LANES;
      if (more) memcpy(sum, to, sizeof sum);
      const int8_t *fours = b + panel * stride;
      for (int i = 0; i < inputs; i++)
        for (int lane = 0; lane < LANES; lane++)
          sum[lane] += a[row * lda + i] * fours[(i / 4 * LANES + lane) * 4 + i % 4];
      memcpy(to, sum, sizeof sum);
    }
}

static void by_groups(const bf16 *a, long lda, int rows, const bf16 *b, int panels, int inputs, float *c,
                      long ldc) {
  long stride = (long)inputs * LANES;
  for (int panel = 0; panel < panels; panel += GROUP)
    block_product(a, lda, rows, b + panel * stride, stride, GROUP, inputs, c + panel * LANES, ldc, 0,
                  NULL);
}

static void nothing(void) {}

block8_fn block_product8 = portable8;

block_fn block_product = portable;
panels_fn block_panels = by_groups;
int block_level = 1;
void (*block_end)(void) = nothing;

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>

/* Rows of `r` at once so that enough sums are under way to hide the latency of an addition. */
#define AVX2 __attribute__((target("avx2,fma")))
AVX2 static inline __attribute__((always_inline)) void avx2_rows(
    const bf16 *a, long lda, int count, const bf16 *b, int inputs, float *c, long ldc, int more) {
  __m256 sum[4][2];
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  for (int r = 0; r < count; r++) {
    sum[r][0] = more ? _mm256_loadu_ps(c + r * ldc) : _mm256_setzero_ps();
    sum[r][1] = more ? _mm256_loadu_ps(c + r * ldc + 8) : _mm256_setzero_ps();
  }
  for (int i = 0; i < inputs; i += 2, b += 2 * LANES) {
    __m256i p = _mm256_loadu_si256((const void *)b), q = _mm256_loadu_si256((const void *)(b + 16));
    __m256 p0 = _mm256_castsi256_ps(_mm256_slli_epi32(p, 16));
    __m256 q0 = _mm256_castsi256_ps(_mm256_slli_epi32(q, 16));
    __m256 p1 = _mm256_castsi256_ps(_mm256_and_si256(p, high));
    __m256 q1 = _mm256_castsi256_ps(_mm256_and_si256(q, high));
    for (int r = 0; r < count; r++) {
      __m256 x0 = _mm256_set1_ps(wide(a[r * lda + i])), x1 = _mm256_set1_ps(wide(a[r * lda + i + 1]));
      sum[r][0] = _mm256_fmadd_ps(x1, p1, _mm256_fmadd_ps(x0, p0, sum[r][0]));
      sum[r][1] = _mm256_fmadd_ps(x1, q1, _mm256_fmadd_ps(x0, q0, sum[r][1]));
    }
  }
  for (int r = 0; r < count; r++) {
    _mm256_storeu_ps(c + r * ldc, sum[r][0]);
    _mm256_storeu_ps(c + r * ldc + 8, sum[r][1]);
  }
}

AVX2 static void avx2(const bf16 *a, long lda, int rows, const bf16 *b, long stride, int panels,
                      int inputs, float *c, long ldc, int more, struct soon *soon) {
  (void)soon;
  for (int panel = 0; panel < panels; panel++)
    for (int row = 0; row < rows; row += 4) {
      const bf16 *from = a + row * lda, *pairs = b + panel * stride;
      float *to = c + row * ldc + panel * LANES;
      if (rows - row >= 4) avx2_rows(from, lda, 4, pairs, inputs, to, ldc, more);
      else if (rows - row == 3) avx2_rows(from, lda, 3, pairs, inputs, to, ldc, more);
      else if (rows - row == 2) avx2_rows(from, lda, 2, pairs, inputs, to, ldc, more);
      else avx2_rows(from, lda, 1, pairs, inputs, to, ldc, more);
    }
}

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
AVX512 static inline __attribute__((always_inline)) void avx512_rows(
    const bf16 *a, long lda, int count, const bf16 *b, long stride, int inputs, float *c, long ldc, int more) {
  __m512 sum[12][GROUP];
  for (int r = 0; r < count; r++)
    for (int p = 0; p < GROUP; p++)
      sum[r][p] = more ? _mm512_loadu_ps(c + r * ldc + p * LANES) : _mm512_setzero_ps();
  for (int i = 0; i < inputs; i += 2, b += 2 * LANES) {
    __m512i pairs[GROUP];
    for (int p = 0; p < GROUP; p++) {
      pairs[p] = _mm512_loadu_si512(b + p * stride);
      _mm_prefetch((const char *)(b + p * stride) + 2048, _MM_HINT_T0);
    }
    for (int r = 0; r < count; r++) {
      int both;
      memcpy(&both, a + r * lda + i, sizeof both);
      __m512i x = _mm512_set1_epi32(both);
      for (int p = 0; p < GROUP; p++)
        sum[r][p] = _mm512_dpbf16_ps(sum[r][p], (__m512bh)x, (__m512bh)pairs[p]);
    }
  }
  for (int r = 0; r < count; r++)
    for (int p = 0; p < GROUP; p++) _mm512_storeu_ps(c + r * ldc + p * LANES, sum[r][p]);
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
VNNI static inline __attribute__((always_inline)) void vnni_rows(
    const int8_t *a, long lda, int count, const int8_t *b, long stride, int inputs,
    const int32_t *sums, int32_t *c, int more) {
  __m512i sum[12][GROUP];
  for (int p = 0; p < GROUP; p++) {
    /* The instruction wants one side without a sign: rows have 128 more, taken away before. */
    __m512i extra = _mm512_slli_epi32(_mm512_loadu_si512(sums + (stride ? p * LANES : 0)), 7);
    for (int r = 0; r < count; r++)
      sum[r][p] = more ? _mm512_loadu_si512(c + r * COLUMNS + p * LANES)
                       : _mm512_sub_epi32(_mm512_setzero_si512(), extra);
  }
  for (int i = 0; i < inputs; i += 4, b += 4 * LANES) {
    __m512i fours[GROUP];
    for (int p = 0; p < GROUP; p++) {
      fours[p] = _mm512_loadu_si512(b + p * stride);
      _mm_prefetch((const char *)(b + p * stride) + 2048, _MM_HINT_T0);
    }
    for (int r = 0; r < count; r++) {
      int four;
      memcpy(&four, a + r * lda + i, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      for (int p = 0; p < GROUP; p++) sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], x, fours[p]);
    }
  }
  for (int r = 0; r < count; r++)
    for (int p = 0; p < GROUP; p++) _mm512_storeu_si512(c + r * COLUMNS + p * LANES, sum[r][p]);
}

/* Rows in blocks of the same height, as far as that goes, up to 12, whose sums fill the registers: a few
   rows alone would wait for their own sums. */
#define BLOCKS(rows, block)                                                                          \
  for (int left = (rows + 11) / 12, row = 0, count; left; left--, row += count) {                    \
    count = (rows - row + left - 1) / left;                                                          \
    switch (count) { /* each a function of its own */                                                \
      case 1: block(1); break;                                                                       \
      case 2: block(2); break;                                                                       \
      case 3: block(3); break;                                                                       \
      case 4: block(4); break;                                                                       \
      case 5: block(5); break;                                                                       \
      case 6: block(6); break;                                                                       \
      case 7: block(7); break;                                                                       \
      case 8: block(8); break;                                                                       \
      case 9: block(9); break;                                                                       \
      case 10: block(10); break;                                                                     \
      case 11: block(11); break;                                                                     \
      case 12: block(12); break;                                                                     \
    }                                                                                                \
  }

AVX512 static void avx512(const bf16 *a, long lda, int rows, const bf16 *b, long stride, int panels,
                          int inputs, float *c, long ldc, int more, struct soon *soon) {
  (void)soon;
  if (panels < GROUP) stride = 0; /* the panel twice: the second result is not used */
#define BLOCK(n) avx512_rows(a + row * lda, lda, n, b, stride, inputs, c + row * ldc, ldc, more)
  BLOCKS(rows, BLOCK)
#undef BLOCK
}

VNNI static void vnni(const int8_t *a, long lda, int rows, const int8_t *b, long stride, int panels,
                      int inputs, const int32_t *sums, int32_t *c, int more, struct soon *soon) {
  (void)soon;
  if (panels < GROUP) stride = 0;
#define BLOCK(n) vnni_rows(a + row * lda, lda, n, b, stride, inputs, sums, c + row * COLUMNS, more)
  BLOCKS(rows, BLOCK)
#undef BLOCK
}

/* AMX: sums in tiles 0 to 3, rows in 4 and 5, panels in 6 and 7. */
#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f")))

struct tiles {
  uint8_t palette, start, zeros[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((packed));

/* Bytes from where a panel is read to where it is fetched. */
enum { AHEAD = 512 };

static __thread int tile_rows = -1;

AMX static void set_rows(int rows) {
  if (rows == tile_rows) return;
  int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 16;
  struct tiles t = {.palette = 1};
  for (int i = 0; i < 8; i++) t.bytes[i] = 64;
  t.rows[0] = t.rows[1] = t.rows[4] = first;
  t.rows[2] = t.rows[3] = t.rows[5] = second;
  t.rows[6] = t.rows[7] = 16;
  __asm__ volatile("" ::"r"(&t) : "memory"); /* gcc 12 believes that only 8 bytes of it are read */
  _tile_loadconfig(&t);
  tile_rows = rows;
}

/* At most 16 rows: the panels come from memory, and that is what takes the time. */
AMX static void amx_few(const bf16 *a, long lda, int rows, const bf16 *b0, const bf16 *b1,
                        int inputs, float *c, long ldc, int more) {
  set_rows(rows);
  if (more) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + LANES, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int i = 0; i < inputs; i += STEP, b0 += STEP * LANES, b1 += STEP * LANES) {
    for (int line = 0; line < 16; line++) {
      _mm_prefetch((const char *)b0 + AHEAD + line * 64, _MM_HINT_T0);
      _mm_prefetch((const char *)b1 + AHEAD + line * 64, _MM_HINT_T0);
    }
    _tile_loadd(4, a + i, lda * 2);
    _tile_loadd(6, b0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + LANES, ldc * 4);
}

static inline __attribute__((always_inline)) void bring(struct soon *soon) {
  if (!soon) return;
  for (int line = 0; line < soon->lines; line++, soon->from += 64) {
    _mm_prefetch(soon->from, _MM_HINT_T0);
    _mm_prefetch(soon->from + soon->apart, _MM_HINT_T0);
  }
}

/* 17 to 32 rows. */
AMX static void amx_many(const bf16 *a, long lda, int rows, const bf16 *b0, const bf16 *b1,
                         int inputs, float *c, long ldc, int more, struct soon *soon) {
  const bf16 *below = a + 16 * lda;
  float *under = c + 16 * ldc;
  set_rows(rows);
  if (more) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + LANES, ldc * 4);
    _tile_loadd(2, under, ldc * 4);
    _tile_loadd(3, under + LANES, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < inputs; i += STEP, b0 += STEP * LANES, b1 += STEP * LANES) {
    bring(soon);
    _tile_loadd(4, a + i, lda * 2);
    _tile_loadd(6, b0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, below + i, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + LANES, ldc * 4);
  _tile_stored(2, under, ldc * 4);
  _tile_stored(3, under + LANES, ldc * 4);
}

AMX static void amx(const bf16 *a, long lda, int rows, const bf16 *b, long stride, int panels,
                    int inputs, float *c, long ldc, int more, struct soon *soon) {
  const bf16 *other = panels > 1 ? b + stride : b;
  for (int row = 0; row < rows; row += 32) {
    const bf16 *x = a + row * lda;
    float *to = c + row * ldc;
    if (rows - row <= 16) amx_few(x, lda, rows - row, b, other, inputs, to, ldc, more);
    else amx_many(x, lda, rows - row < 32 ? rows - row : 32, b, other, inputs, to, ldc, more, soon);
  }
}

/* Where the rows' inputs are two steps they stay in tiles: 2 and 3, of the rows below 4 and 5. Sums in
   0 and 1, panels in 6 and 7. */
AMX static void amx_panels(const bf16 *a, long lda, int rows, const bf16 *b, int panels, int inputs,
                           float *c, long ldc) {
  if (inputs != 2 * STEP || rows != ROWS) {
    by_groups(a, lda, rows, b, panels, inputs, c, ldc);
    return;
  }
  set_rows(ROWS);
  _tile_loadd(2, a, lda * 2);
  _tile_loadd(3, a + STEP, lda * 2);
  _tile_loadd(4, a + 16 * lda, lda * 2);
  _tile_loadd(5, a + 16 * lda + STEP, lda * 2);
  for (int panel = 0; panel < panels; panel++, b += 2 * STEP * LANES, c += LANES) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + STEP * LANES, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_dpbf16ps(0, 2, 6);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(0, 3, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16 * ldc, ldc * 4);
  }
}

AMX static void amx8(const int8_t *a, long lda, int rows, const int8_t *b, long stride, int panels,
                     int inputs, const int32_t *sums, int32_t *c, int more, struct soon *soon) {
  (void)sums;
  const int8_t *other = panels > 1 ? b + stride : b;
  const int8_t *below = a + (rows > 16 ? 16 * lda : 0);
  set_rows(rows);
  if (more) {
    _tile_loadd(0, c, COLUMNS * 4);
    _tile_loadd(1, c + LANES, COLUMNS * 4);
    if (rows > 16) {
      _tile_loadd(2, c + 16 * COLUMNS, COLUMNS * 4);
      _tile_loadd(3, c + 16 * COLUMNS + LANES, COLUMNS * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < inputs; i += STEP8, b += STEP8 * LANES, other += STEP8 * LANES) {
    if (rows > 16) bring(soon);
    else
      for (int line = 0; line < 16; line++) {
        _mm_prefetch((const char *)b + AHEAD + line * 64, _MM_HINT_T0);
        _mm_prefetch((const char *)other + AHEAD + line * 64, _MM_HINT_T0);
      }
    _tile_loadd(4, a + i, lda);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, other, 64);
    _tile_dpbssd(1, 4, 7);
    if (rows > 16) {
      _tile_loadd(5, below + i, lda);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, c, COLUMNS * 4);
  _tile_stored(1, c + LANES, COLUMNS * 4);
  if (rows > 16) {
    _tile_stored(2, c + 16 * COLUMNS, COLUMNS * 4);
    _tile_stored(3, c + 16 * COLUMNS + LANES, COLUMNS * 4);
  }
}

/* Tiles that are in use make every switch of threads dearer. */
AMX static void amx_end(void) {
  _tile_release();
  tile_rows = -1;
}

/* Linux lends a process the tiles when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA). */
static int amx_allowed(void) {
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         !syscall(SYS_arch_prctl, 0x1023, 18);
}
#endif

/* Choose the best of what this processor has: 4 AMX, 3 AVX512-BF16, 2 AVX2, 1 portable; at most
   `most`. Returns the choice. */
long internvl_choose(int most) {
  block_panels = by_groups;
#if defined(__x86_64__)
  block_end = nothing;
  __builtin_cpu_init();
  int avx512bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (most >= 4 && avx512bf16 && amx_allowed()) {
    block_product = amx;
    block_panels = amx_panels;
    block_product8 = amx8;
    block_end = amx_end;
    return block_level = 4;
  }
  if (most >= 3 && avx512bf16) {
    block_product = avx512;
    block_product8 = vnni;
    return block_level = 3;
  }
  if (most >= 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    block_product = avx2;
    block_product8 = portable8;
    return block_level = 2;
  }
#endif
  block_product = portable;
  block_product8 = portable8;
  return block_level = 1;
}
