/* The one product everything is made of: a few rows times a group of packed panels.

   A matrix of outputs x inputs is packed into panels of 16 outputs. In a panel the inputs stand in
   pairs: [inputs / 2][16 outputs][2], zeros where the sizes are no multiples. It is the order in
   which AMX and AVX512-BF16 want the right side of a product, and a panel is read from its first
   byte to its last.

   Every output is summed in the order of its inputs, whatever is computed beside it: a row's result
   does not depend on the rows around it, nor on how many there are. */
#pragma once
#include <stdint.h>

typedef uint16_t bf16;

static inline float wide(bf16 x) {
  union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
  return u.value;
}

enum {
  LANES = 16,        /* outputs of a panel */
  STEP = 32,         /* inputs are padded to a multiple of this */
  GROUP = 2,         /* panels of a block */
  ROWS = 32,         /* rows of a block */
  HIGH = 36,         /* with AVX512 */
  COLUMNS = 32,      /* LANES * GROUP */
};

/* What is brought near meanwhile: so many lines of 64 bytes per step from here, and as many from so
   many bytes further on. */
struct soon {
  const char *from;
  long apart;
  int lines;
};

/* c[rows][panels * LANES] = a[rows][inputs] * panels, or with `more` what was there plus that. Panel p
   begins at b + p * stride. rows <= ROWS, panels <= GROUP, inputs a multiple of STEP; where there is
   one panel alone, GROUP panels of c are overwritten. lda, ldc and stride count elements. */
typedef void (*block_fn)(const bf16 *a, long lda, int rows, const bf16 *b, long stride, int panels,
                         int inputs, float *c, long ldc, int more, struct soon *soon);

extern block_fn block_product;

/* c[rows][panels * LANES] likewise for few inputs and many panels, which lie one behind the other. rows
   <= ROWS; panels is even. */
typedef void (*panels_fn)(const bf16 *a, long lda, int rows, const bf16 *b, int panels, int inputs,
                          float *c, long ldc);

extern panels_fn block_panels;

/* The same in whole numbers: a panel is [inputs / 4][16 outputs][4], inputs a multiple of STEP8, and
   sums[panels * LANES] are those of each output's weights. */
enum { STEP8 = 64 };
typedef void (*block8_fn)(const int8_t *a, long lda, int rows, const int8_t *b, long stride,
                          int panels, int inputs, const int32_t *sums, int32_t *c, int more,
                          struct soon *soon);

extern block8_fn block_product8;
extern int block_level; /* what internvl_choose chose */

/* Called by every thread after its last block_product of a piece of work. */
extern void (*block_end)(void);
