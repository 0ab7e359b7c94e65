/* The two passes over a strip, for one kind of processor: resize.c includes this once for each,
 * after it has defined NAME, TARGET, and NAME(Sums) with clear, add, finish and pack. */

/* One vector of outputs in each colour, from ``count`` rows of quads, the first in ``slot`` of a
 * ring of ``slots`` that lie ``step`` apart; colours lie ``colour`` apart. */
TARGET static inline __attribute__((always_inline)) void NAME(weighted)(
    const int32_t *quads, size_t colour, int slot, int slots, size_t step, int count,
    const int32_t *weights, Quads *out)
{
    NAME(Sums) sums[COLOURS];

    for (int c = 0; c < COLOURS; c++) NAME(clear)(&sums[c]);
    for (int k = 0; k < count; k++) {
        for (int c = 0; c < COLOURS; c++)
            NAME(add)(&sums[c], quads + c * colour + slot * step, weights + (size_t)k * WORDS);
        if (++slot == slots) slot = 0;
    }
    for (int c = 0; c < COLOURS; c++) out[c] = NAME(finish)(&sums[c]);
}

/* out[i][j] = in[j][i] */
TARGET static inline void NAME(transpose)(const Quads *in, Quads *out)
{
    const Quads low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, last = {2, 3, 6, 7};
    const Quads a = __builtin_shuffle(in[0], in[1], low), b = __builtin_shuffle(in[2], in[3], low);
    const Quads c = __builtin_shuffle(in[0], in[1], high), d = __builtin_shuffle(in[2], in[3], high);
    out[0] = __builtin_shuffle(a, b, first);
    out[1] = __builtin_shuffle(a, b, last);
    out[2] = __builtin_shuffle(c, d, first);
    out[3] = __builtin_shuffle(c, d, last);
}

/* Four pixels, or as many as there are. */
TARGET static inline Quads NAME(four)(const uint8_t *pixels, int count)
{
    Bytes four = {0};

    if (count >= 4)
        memcpy(&four, pixels, sizeof four);
    else
        memcpy(&four, pixels, 4 * (size_t)count);
    return (Quads)four;
}

/* 4 x 4 bytes mirrored along their diagonal */
TARGET static inline Quads NAME(mirrored)(Quads bytes)
{
    const Bytes order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return (Quads)__builtin_shuffle((Bytes)bytes, order);
}

/* LANES rows of pixels to quads of neighbours in a row: [COLOURS][width / 4][LANES]. What stands
 * for rows below the last has no weight. */
TARGET static void NAME(spread)(const Picture *picture, int strip, int32_t *quads, size_t pitch)
{
    const int width = picture->width, last = picture->height - 1;
    const uint8_t *rows[LANES];

    for (int i = 0; i < LANES; i++) {
        const int y = strip * LANES + i < last ? strip * LANES + i : last;
        rows[i] = picture->pixels + (size_t)y * width * 4;
    }
    for (int x = 0; x < width; x += 4) {
        for (int top = 0; top < LANES; top += 4) {
            Quads in[4], out[4];
            for (int i = 0; i < 4; i++)
                in[i] = NAME(mirrored)(NAME(four)(rows[top + i] + 4 * (size_t)x, width - x));
            NAME(transpose)(in, out);
            for (int c = 0; c < COLOURS; c++)
                memcpy(quads + c * pitch + (size_t)x / 4 * LANES + top, &out[c], sizeof out[c]);
        }
    }
}

/* LANES columns of pixels to quads of neighbours in a column: [COLOURS][height / 4][LANES]. */
TARGET static void NAME(spread_turned)(const Picture *picture, int strip, int32_t *quads,
                                       size_t pitch)
{
    const int last = picture->height - 1, left = strip * LANES;

    for (int y = 0; y <= last; y += 4) {
        for (int x = left; x < left + LANES && x < picture->width; x += 4) {
            Quads in[4], out[4];
            for (int i = 0; i < 4; i++) {
                const size_t row = y + i < last ? y + i : last;
                const uint8_t *pixels = picture->pixels + (row * picture->width + x) * 4;
                in[i] = NAME(four)(pixels, picture->width - x);
            }
            NAME(transpose)(in, out);
            for (int i = 0; i < 4; i++) in[i] = NAME(mirrored)(out[i]);
            NAME(transpose)(in, out);
            for (int c = 0; c < COLOURS; c++)
                memcpy(quads + c * pitch + (size_t)y / 4 * LANES + x - left, &out[c], sizeof out[c]);
        }
    }
}

/* One strip of the picture to as many rows of the ring as it has. */
TARGET static void NAME(pass_across)(const int32_t *quads, size_t pitch, Resize *resize, int strip)
{
    const Axis *axis = &resize->across;
    const int quad_rows = LANES / 4;

    for (int x = 0; x < axis->size; x += 4) {
        Quads columns[4][COLOURS] = {0};
        for (int i = 0; i < 4 && x + i < axis->size; i++)
            NAME(weighted)(quads + (size_t)axis->first[x + i] * LANES, pitch, 0, -1, LANES,
                           axis->count[x + i],
                           axis->weights + (size_t)(x + i) * axis->most * WORDS, columns[i]);
        for (int c = 0; c < COLOURS; c++) {
            Quads in[4], out[4];
            for (int i = 0; i < 4; i++) in[i] = columns[i][c];
            NAME(transpose)(in, out);
            for (int i = 0; i < quad_rows; i++) {
                const size_t slot = (size_t)c * resize->slots + (strip * quad_rows + i) % resize->slots;
                memcpy(resize->ring + slot * resize->pitch + x, &out[i], sizeof out[i]);
            }
        }
    }
}

/* One row of output, from the ring into the planes of its tiles. */
TARGET static void NAME(pass_down)(const Resize *resize, int y, int side)
{
    const Axis *axis = &resize->down;
    const size_t plane = (size_t)side * side, colour = resize->slots * resize->pitch;
    const int32_t *weights = axis->weights + (size_t)y * axis->most * WORDS;
    const int slot = axis->first[y] % resize->slots;

    for (int column = 0; column < resize->tiles_along; column++) {
        const size_t tile = (size_t)(y / side) * resize->step_down + column * resize->step_along;
        uint8_t *to = resize->tiles + tile * COLOURS * plane + (size_t)(y % side) * side;
        for (int x = 0; x < side; x += LANES) {
            Quads out[COLOURS];
            NAME(weighted)(resize->ring + (size_t)column * side + x, colour, slot, resize->slots,
                           resize->pitch, axis->count[y], weights, out);
            for (int c = 0; c < COLOURS; c++) {
                if (side - x >= LANES)
                    memcpy(to + c * plane + x, &out[c], LANES);
                else
                    memcpy(to + c * plane + x, &out[c], side - x);
            }
        }
    }
}

static const Kernel NAME(kernel) = {
    NAME(pack), NAME(spread), NAME(spread_turned), NAME(pass_across), NAME(pass_down),
};
