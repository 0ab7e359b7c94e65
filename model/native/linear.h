/* A product under way: what linear.c offers those who make something else of its sums. */
#pragma once
#include "kernels.h"

struct linear {
  const struct matrix *m;
  const bf16 *x;
  void *y;
  long rows, ldx, ldy;
  int kind;
  /* In place of what `kind` says: with the sums of some rows and a group of panels, c[rows][COLUMNS]. */
  void (*then)(const struct linear *w, float *c, long row, int rows, long column);
  const int32_t *chosen; /* [count]: the only groups of panels, or NULL */
  long count;
  /* What linear.c knows. */
  const int8_t *x8; /* x, if the matrix is quantised */
  float *heats;     /* what a whole number of each row stands for */
  int32_t *starts;  /* with wide.c, what the sums of its whole numbers begin with */
  long ld8, tall, groups, chunks;
  int fits;
};

/* scratch: as internvl_linear_scratch says. */
void linear_run(struct linear *w, void *scratch);
