/* From RGBX pixels to the uint8 tiles of a picture, equal to Pillow's bicubic bit for bit.
 *
 * What Pillow computes (antialiased bicubic on 8 bits a channel): the weights of an output pixel in
 * double, normalised to a sum of one, rounded to 22 bits behind the point; the rows first, rounded
 * and clipped to bytes, then the columns. Integer sums may be taken in any order, so here
 *
 * - a strip of 16 rows is spread into "quads", four neighbours of one colour in 32 bits, so that
 *   one vector holds the quads of 16 rows: no pixel is looked up one by one, whatever the scale;
 * - its outputs are quads again, of four rows, so one vector holds 16 columns of the second pass;
 * - the second pass follows the first in a ring of rows that stays in the cache, and writes bytes
 *   where they belong in the planes of the tiles.
 *
 * All sizes come from hostile pictures: resize_tiles checks them before anything is computed.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST = 65536,     /* pixels of an edge, before and after */
    MOST_TILES = 4096,
    LANES = 16,       /* rows of a strip, columns of a vector */
    FRACTION = 22,    /* bits of a weight behind the point */
    WORDS = 4,        /* 32-bit words that hold the four weights of a quad, in a kernel's own way */
    COLOURS = 3,
};

typedef int32_t Quads __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

typedef struct {
    const uint8_t *pixels; /* [height][width][4] */
    int width, height;
} Picture;

/* One direction of a resize: quads ``first[i]`` to ``first[i] + count[i]`` make up output i. */
typedef struct {
    int size, most; /* outputs; the largest count */
    int *first, *count;
    int32_t *weights; /* [size][most][WORDS] */
} Axis;

/* One resize of the picture, with the rows that its second pass still needs. */
typedef struct {
    Axis across, down;
    int slots;      /* rows of quads in the ring */
    size_t pitch;   /* quads of one row of the ring */
    int32_t *ring;  /* [COLOURS][slots][pitch] */
    int done;       /* rows of output */
    int turned;     /* along the diagonal: see resize_tiles */
    int tiles_along, step_along, step_down; /* tiles of a row, and from one to the next */
    uint8_t *tiles; /* [tiles][COLOURS][side][side] */
} Resize;

typedef struct {
    int32_t (*pack)(int32_t *words, const int32_t *weights);
    void (*spread)(const Picture *picture, int strip, int32_t *quads, size_t pitch);
    void (*spread_turned)(const Picture *picture, int strip, int32_t *quads, size_t pitch);
    void (*pass_across)(const int32_t *quads, size_t pitch, Resize *resize, int strip);
    void (*pass_down)(const Resize *resize, int y, int side);
} Kernel;

/* Keys' cubic with a = -1/2, at a distance in pixels. */
static double cubic(double x)
{
    const double a = -0.5;
    x = x < 0.0 ? -x : x;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/* The weights of one output: those of inputs ``first`` to ``first + the result``. */
static int weigh(int in, int out, int index, int *first, double *weights)
{
    const double scale = (double)in / out, wide = scale < 1.0 ? 1.0 : scale;
    const double centre = (index + 0.5) * scale, reach = 2.0 * wide, narrow = 1.0 / wide;
    int low = (int)(centre - reach + 0.5), high = (int)(centre + reach + 0.5);
    double sum = 0.0;

    low = low < 0 ? 0 : low;
    high = high > in ? in : high;
    for (int i = low; i < high; i++) {
        weights[i - low] = cubic((i - centre + 0.5) * narrow);
        sum += weights[i - low];
    }
    for (int i = 0; i < high - low && sum != 0.0; i++) weights[i] /= sum;
    *first = low;
    return high - low;
}

static void free_axis(Axis *axis)
{
    free(axis->first);
    free(axis->count);
    free(axis->weights);
}

/* 0, or -1 where there is no memory, or -2 for weights that the kernel cannot hold. */
static int make_axis(Axis *axis, int in, int out, const Kernel *kernel)
{
    const int taps = 4 * (in / out + 1) + 4, most = taps / 4 + 2;
    double *exact = malloc(sizeof *exact * taps);
    int32_t *fixed = malloc(sizeof *fixed * 4 * most);
    int32_t bad = 0;

    axis->size = out;
    axis->most = most;
    axis->first = calloc(out, sizeof *axis->first);
    axis->count = calloc(out, sizeof *axis->count);
    axis->weights = calloc((size_t)out * most, sizeof *axis->weights * WORDS);
    if (!exact || !fixed || !axis->first || !axis->count || !axis->weights) {
        free(exact);
        free(fixed);
        return -1;
    }
    for (int i = 0; i < out; i++) {
        int first;
        const int used = weigh(in, out, i, &first, exact), lead = first % 4;
        axis->first[i] = first / 4;
        axis->count[i] = (lead + used + 3) / 4;
        memset(fixed, 0, sizeof *fixed * 4 * most);
        for (int k = 0; k < used; k++) {
            const double weight = exact[k] * (1 << FRACTION);
            fixed[lead + k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        for (int k = 0; k < axis->count[i]; k++)
            bad |= kernel->pack(axis->weights + ((size_t)i * most + k) * WORDS, fixed + 4 * k);
    }
    free(exact);
    free(fixed);
    return bad ? -2 : 0;
}

/* Every other processor. The first of x86-64 cannot multiply 32 bits, and is left to Pillow. */
#define NAME(name) name##_portable
#if defined(__x86_64__)
#define TARGET __attribute__((target("sse4.1")))
#else
#define TARGET
#endif

typedef struct {
    int32_t lane[LANES];
} Sums_portable;

TARGET static inline void clear_portable(Sums_portable *sums)
{
    for (int i = 0; i < LANES; i++) sums->lane[i] = 1 << (FRACTION - 1);
}

TARGET static inline void add_portable(Sums_portable *sums, const int32_t *quads, const int32_t *w)
{
    const int32_t a = w[0], b = w[1], c = w[2], d = w[3];
    for (int i = 0; i < LANES; i++) {
        const int32_t quad = quads[i];
        sums->lane[i] += (quad & 255) * a + (quad >> 8 & 255) * b + (quad >> 16 & 255) * c +
                         (quad >> 24 & 255) * d;
    }
}

TARGET static inline Quads finish_portable(const Sums_portable *sums)
{
    Bytes bytes = {0};
    for (int i = 0; i < LANES; i++) {
        const int32_t one = sums->lane[i] >> FRACTION;
        bytes[i] = one < 0 ? 0 : one > 255 ? 255 : (uint8_t)one;
    }
    return (Quads)bytes;
}

static int32_t pack_portable(int32_t *words, const int32_t *weights)
{
    memcpy(words, weights, 4 * sizeof *words);
    return 0;
}

#include "passes.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* AVX2: sums of two products of 16 bits. A weight is high * 2^15 + low, 0 <= low < 2^15. */
#undef NAME
#undef TARGET
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2")))

typedef struct {
    __m256i low[2], high[2];
} Sums_avx2;

TARGET static inline void clear_avx2(Sums_avx2 *sums)
{
    sums->low[0] = sums->low[1] = _mm256_set1_epi32(1 << (FRACTION - 1));
    sums->high[0] = sums->high[1] = _mm256_setzero_si256();
}

TARGET static inline void add_avx2(Sums_avx2 *sums, const int32_t *quads, const int32_t *w)
{
    for (int half = 0; half < 2; half++) {
        const __m256i quad = _mm256_loadu_si256((const __m256i *)(quads + 8 * half));
        const __m256i even = _mm256_and_si256(quad, _mm256_set1_epi32(0x00FF00FF));
        const __m256i odd = _mm256_srli_epi16(quad, 8);
        const __m256i low = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(w[0])),
                                             _mm256_madd_epi16(odd, _mm256_set1_epi32(w[1])));
        const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(w[2])),
                                              _mm256_madd_epi16(odd, _mm256_set1_epi32(w[3])));
        sums->low[half] = _mm256_add_epi32(sums->low[half], low);
        sums->high[half] = _mm256_add_epi32(sums->high[half], high);
    }
}

TARGET static inline Quads finish_avx2(const Sums_avx2 *sums)
{
    __m256i sum[2];
    for (int half = 0; half < 2; half++) {
        const __m256i high = _mm256_slli_epi32(sums->high[half], 15);
        sum[half] = _mm256_srai_epi32(_mm256_add_epi32(sums->low[half], high), FRACTION);
    }
    /* Packing works within halves of a vector: put the lanes in order again. */
    const __m256i words = _mm256_packs_epi32(sum[0], sum[1]);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    return (Quads)_mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order));
}

static int32_t pack_avx2(int32_t *words, const int32_t *weights)
{
    int32_t low[4], high[4], bad = 0;
    for (int i = 0; i < 4; i++) {
        low[i] = weights[i] & 0x7FFF;
        high[i] = weights[i] >> 15;
        bad |= high[i] != (int16_t)high[i];
    }
    for (int i = 0; i < 2; i++) {
        words[i] = low[i] | (int32_t)((uint32_t)low[i + 2] << 16);
        words[2 + i] = (int32_t)((uint32_t)high[i] & 0xFFFF) | (int32_t)((uint32_t)high[i + 2] << 16);
    }
    return bad;
}

#include "passes.h"

/* AVX-512 with VNNI: sums of four products of 8 bits. A weight is three digits of a byte each. */
#undef NAME
#undef TARGET
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

typedef struct {
    __m512i digit[3];
} Sums_avx512;

TARGET static inline void clear_avx512(Sums_avx512 *sums)
{
    sums->digit[0] = _mm512_set1_epi32(1 << (FRACTION - 1));
    sums->digit[1] = sums->digit[2] = _mm512_setzero_si512();
}

TARGET static inline void add_avx512(Sums_avx512 *sums, const int32_t *quads, const int32_t *w)
{
    const __m512i quad = _mm512_loadu_si512(quads);
    for (int i = 0; i < 3; i++)
        sums->digit[i] = _mm512_dpbusd_epi32(sums->digit[i], quad, _mm512_set1_epi32(w[i]));
}

TARGET static inline Quads finish_avx512(const Sums_avx512 *sums)
{
    __m512i sum = _mm512_slli_epi32(sums->digit[2], 8);
    sum = _mm512_slli_epi32(_mm512_add_epi32(sum, sums->digit[1]), 8);
    sum = _mm512_srai_epi32(_mm512_add_epi32(sum, sums->digit[0]), FRACTION);
    sum = _mm512_max_epi32(sum, _mm512_setzero_si512());
    return (Quads)_mm512_cvtusepi32_epi8(sum);
}

static int32_t pack_avx512(int32_t *words, const int32_t *weights)
{
    int32_t bad = 0;
    memset(words, 0, WORDS * sizeof *words);
    for (int i = 0; i < 4; i++) {
        int32_t rest = weights[i];
        for (int digit = 0; digit < 3; digit++) {
            const int8_t low = (int8_t)(uint8_t)rest;
            words[digit] |= (int32_t)((uint32_t)(uint8_t)low << (8 * i));
            rest = (rest - low) / 256;
        }
        bad |= rest;
    }
    return bad;
}

#include "passes.h"
#endif

static const Kernel *const KERNELS[] = {
#if defined(__x86_64__)
    &kernel_avx512,
    &kernel_avx2,
#endif
    &kernel_portable,
};
enum { KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS };

/* Number of the first kernel that this processor can run; the later ones it can run too. */
int resize_best_kernel(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 0;
    if (__builtin_cpu_supports("avx2")) return 1;
    return __builtin_cpu_supports("sse4.1") ? 2 : KERNEL_COUNT;
#else
    return 0;
#endif
}

/* VERSION in preprocessing/bicubic.py. */
int internvl_version(void) { return 1; }

int resize_kernel_count(void) { return KERNEL_COUNT; }

/* Pillow 13 takes the columns first where that leaves out much more. */
static int columns_first(int width, int height, int out_width, int out_height)
{
    const int narrower = width > out_width ? width - out_width : 0;
    return height - out_height > 2 * narrower;
}

/* 0, or what make_axis returns. */
static int prepare(Resize *resize, const Picture *picture, int side, int columns, int rows,
                   uint8_t *tiles, const Kernel *kernel)
{
    const int out_width = columns * side, out_height = rows * side;
    int across_in = picture->width, across_out = out_width;
    int down_in = picture->height, down_out = out_height, failed;

    resize->tiles = tiles;
    resize->tiles_along = resize->step_down = columns;
    resize->step_along = 1;
    resize->turned = columns_first(across_in, down_in, out_width, out_height);
    if (resize->turned) {
        across_in = picture->height, across_out = out_height;
        down_in = picture->width, down_out = out_width;
        resize->tiles_along = rows;
        resize->step_along = columns;
        resize->step_down = 1;
    }
    failed = make_axis(&resize->across, across_in, across_out, kernel);
    if (!failed) failed = make_axis(&resize->down, down_in, down_out, kernel);
    if (failed) return failed;
    resize->slots = resize->down.most + LANES / 4;
    resize->pitch = (size_t)across_out + 2 * LANES; /* vectors may end behind the last column */
    resize->ring = calloc(COLOURS * resize->slots * resize->pitch, sizeof *resize->ring);
    return resize->ring ? 0 : -1;
}

static void mirror_planes(uint8_t *planes, size_t count, size_t side)
{
    for (uint8_t *plane = planes; plane < planes + count * side * side; plane += side * side)
        for (size_t block = 0; block < side; block += 32)
            for (size_t y = 0; y < side; y++)
                for (size_t x = block; x < block + 32 && x < y; x++) {
                    const uint8_t moved = plane[y * side + x];
                    plane[y * side + x] = plane[x * side + y];
                    plane[x * side + y] = moved;
                }
}

/* Do those of the resizes that are turned, or those that are not. 0, or -1 without memory. */
static int run(const Picture *picture, int side, Resize *resizes, int count, int turned,
               const Kernel *kernel)
{
    const int along = turned ? picture->height : picture->width;
    const int strips = ((turned ? picture->width : picture->height) + LANES - 1) / LANES;
    const size_t pitch = ((size_t)along + 3) / 4 * LANES;
    int32_t *quads = calloc(COLOURS * pitch, sizeof *quads);

    if (!quads) return -1;
    for (int strip = 0; strip < strips; strip++) {
        (turned ? kernel->spread_turned : kernel->spread)(picture, strip, quads, pitch);
        for (Resize *resize = resizes; resize < resizes + count; resize++) {
            const Axis *down = &resize->down;
            if (resize->turned != turned) continue;
            kernel->pass_across(quads, pitch, resize, strip);
            while (resize->done < down->size &&
                   down->first[resize->done] + down->count[resize->done] <= (strip + 1) * LANES / 4)
                kernel->pass_down(resize, resize->done++, side);
        }
    }
    free(quads);
    return 0;
}

/* Cut a picture into columns * rows tiles, and after them one of the whole if ``thumbnail``.
 *
 * ``pixels`` is uint8 [height][width][4], red, green, blue and a byte that is not read; ``tiles``
 * is uint8 [count][3][side][side]. A resize that takes the columns first is done as one that does
 * not, on a picture mirrored along its diagonal, and its tiles are mirrored back. Returns 0; -1
 * where there is no memory; -2 for sizes or a kernel that this code does not do.
 */
int resize_tiles(const uint8_t *pixels, int width, int height, int side, int columns, int rows,
                 int thumbnail, int number, uint8_t *tiles)
{
    const Picture picture = {pixels, width, height};
    const int count = thumbnail ? 2 : 1;
    Resize resizes[2] = {0};
    int failed;

    if (width < 1 || width > MOST || height < 1 || height > MOST || side < 1 || columns < 1 ||
        rows < 1 || columns > MOST_TILES || rows > MOST_TILES / columns ||
        side > MOST / columns || side > MOST / rows || number < resize_best_kernel() ||
        number >= KERNEL_COUNT)
        return -2;
    const Kernel *kernel = KERNELS[number];
    const size_t grid = (size_t)columns * rows, planes = COLOURS * (size_t)side * side;

    failed = prepare(&resizes[0], &picture, side, columns, rows, tiles, kernel);
    if (!failed && thumbnail)
        failed = prepare(&resizes[1], &picture, side, 1, 1, tiles + grid * planes, kernel);
    for (int turned = 0; turned < 2 && !failed; turned++)
        if (resizes[0].turned == turned || (thumbnail && resizes[1].turned == turned))
            failed = run(&picture, side, resizes, count, turned, kernel);
    for (int i = 0; i < count; i++) {
        if (!failed && resizes[i].turned)
            mirror_planes(resizes[i].tiles, COLOURS * (i ? 1 : grid), side);
        free_axis(&resizes[i].across);
        free_axis(&resizes[i].down);
        free(resizes[i].ring);
    }
    return failed;
}
