/* The highest logit of a row: of a greedy row it is the token. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>

/* Numbers of a piece of work, and pieces at once, of all rows. */
enum { MOST = 1 << 14, TOGETHER = 512 };
/* Numbers of which only the highest is known before it is known where the row's highest is. */
enum { STRIDE = 64 * LANES, WIDE = 4 * LANES };

struct highest {
  const float *x;
  long ld, count, size, pieces; /* of a row: numbers, in each piece, pieces */
  long *places;                 /* [rows * pieces] */
};

/* Where the highest of count numbers is: the first of them, or the first NaN. */
CLONES static long highest_of(const float *x, long count) {
  float most = -INFINITY;
  long at = 0, i = 0;
  for (; i + STRIDE <= count; i += STRIDE) {
    float high[WIDE];
    int odd[WIDE] = {0};
    memcpy(high, x + i, sizeof high);
    for (int k = 0; k < STRIDE; k += WIDE)
      for (int j = 0; j < WIDE; j++) {
        float next = x[i + k + j];
        high[j] = next > high[j] ? next : high[j];
        odd[j] |= next != next;
      }
    float here = -INFINITY;
    int any = 0;
    for (int j = 0; j < WIDE; j++) {
      here = high[j] > here ? high[j] : here;
      any |= odd[j];
    }
    if (any) break;
    if (here > most) {
      most = here;
      at = i;
    }
  }
  if (i > 0)
    while (x[at] != most) at++;
  for (; i < count; i++) {
    if (x[i] != x[i]) return i;
    if (x[i] > x[at]) at = i;
  }
  return at;
}

static void part(void *context, long index) {
  const struct highest *h = context;
  long first = index % h->pieces * h->size;
  long count = h->count - first < h->size ? h->count - first : h->size;
  const float *row = h->x + index / h->pieces * h->ld;
  h->places[index] = first + highest_of(row + first, count);
}

/* Of every x[row][count], ld numbers apart: the place of the highest, and that number; the first of
   those that are as high, or the first NaN. */
void internvl_highest(const float *x, long ld, long rows, long count, int64_t *places, float *most) {
  long found[TOGETHER];
  struct highest h = {x, ld, count, MOST, 0, found};
  while ((h.pieces = (count + h.size - 1) / h.size) > TOGETHER) h.size *= 2;
  for (long row = 0, some; row < rows; row += some, h.x += some * ld) {
    some = TOGETHER / h.pieces < rows - row ? TOGETHER / h.pieces : rows - row;
    pool_run(part, &h, some * h.pieces);
    for (long r = 0; r < some; r++) {
      const long *at = found + r * h.pieces;
      long best = at[0];
      for (long i = 1; i < h.pieces; i++) {
        float a = h.x[r * ld + best], b = h.x[r * ld + at[i]];
        if (b > a || (b != b && a == a)) best = at[i];
      }
      places[row + r] = best;
      most[row + r] = h.x[r * ld + best];
    }
  }
}
