/* Kernels for CPUs: the loss of normalized_mse.py, the optimizer of lars.py, the blur of blur.py.

Sums are taken in an order that the number of threads does not change.
*/

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 1024, LANES = 32 }; /* float32 sums of a block, side by side; then float64 */

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t narrow(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded); /* a NaN stays one */
}

static inline float load(const void *x, int64_t i, int low) {
    return low ? widen(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static inline const void *offset(const void *x, int64_t first, int low) {
    return x ? (const char *)x + first * (low ? 2 : 4) : 0;
}

/* What is always inlined is compiled once for each combination of its last arguments, which are constants. */
#define SPECIALISED static inline __attribute__((always_inline))

/* ---- the loss ---------------------------------------------------------------------------------------------------- */

static inline double sum(float lanes[LANES]) {
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

/* The cosine of two rows, and `factor` times its gradient by p; NaN, and nothing is written, where a norm is not from
`shortest` to `longest`: the rules for such rows are the caller's. */
SPECIALISED double row(const void *restrict p, const void *restrict z, void *restrict grad, int64_t n, double shortest,
                       double longest, double factor, int low) {
    double pp = 0.0, zz = 0.0, pz = 0.0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t stop = n - first < BLOCK ? n : first + BLOCK, i = first;
        float p_part[LANES] = {0}, z_part[LANES] = {0}, pz_part[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float x = load(p, i + lane, low), y = load(z, i + lane, low);
                p_part[lane] += x * x;
                z_part[lane] += y * y;
                pz_part[lane] += x * y;
            }
        for (int lane = 0; i < stop; i++, lane++) {
            float x = load(p, i, low), y = load(z, i, low);
            p_part[lane] += x * x;
            z_part[lane] += y * y;
            pz_part[lane] += x * y;
        }
        pp += sum(p_part);
        zz += sum(z_part);
        pz += sum(pz_part);
    }
    double p_norm = sqrt(pp), z_norm = sqrt(zz), cosine = pz / (p_norm * z_norm);
    if (!(p_norm >= shortest && z_norm >= shortest && p_norm <= longest && z_norm <= longest)) return NAN;
    if (grad) {
        float of_z = (float)(factor / (p_norm * z_norm)), of_p = (float)(-factor * cosine / pp);
        for (int64_t i = 0; i < n; i++) {
            float g = of_z * load(z, i, low) + of_p * load(p, i, low);
            if (low) ((uint16_t *)grad)[i] = narrow(g);
            else ((float *)grad)[i] = g;
        }
    }
    return cosine;
}

typedef struct {
    const void *p, *z;
    int64_t p_stride, z_stride; /* of rows, in elements */
    void *grad;                 /* [batch, dim], or 0 */
} Pair;

/* The sum of the cosines of all rows, and the gradients of `row`; NaN if any row is for the caller. */
double normalized_mse(const void *pa, const void *za, int64_t pa_stride, int64_t za_stride, void *grad_a, const void *pb,
                      const void *zb, int64_t pb_stride, int64_t zb_stride, void *grad_b, int64_t batch, int64_t dim,
                      double shortest, double longest, double factor, int low, int threads) {
    Pair pairs[2] = {{pa, za, pa_stride, za_stride, grad_a}, {pb, zb, pb_stride, zb_stride, grad_b}};
    int64_t num_rows = pb ? 2 * batch : batch;
    double total = 0.0, *cosines = malloc(num_rows * sizeof *cosines);
    if (!cosines) return NAN;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < num_rows; i++) {
        const Pair *pair = pairs + (i >= batch);
        int64_t b = i < batch ? i : i - batch;
        const void *p = offset(pair->p, b * pair->p_stride, low), *z = offset(pair->z, b * pair->z_stride, low);
        void *grad = (void *)offset(pair->grad, b * dim, low);
        cosines[i] = low ? row(p, z, grad, dim, shortest, longest, factor, 1)
                         : row(p, z, grad, dim, shortest, longest, factor, 0);
    }
    for (int64_t i = 0; i < num_rows; i++) total += cosines[i];
    free(cosines);
    return total;
}

/* ---- LARS, the target's moving average and bfloat16 copies --------------------------------------------------------

For float32 parameters. The tables are those of a MultiTensorPlan. Tensors are taken in groups whose parameters and
gradients fit into the cache: first all norms of a group, then its update, for which only momentum and target come from
memory.
*/

enum { PARAM, GRAD, MOMENTUM, TARGET, PARAM_COPY, TARGET_COPY, NUM_COLUMNS };
enum { NUMEL, KIND, FIRST_CHUNK, TAG, ROW };                                /* tag = 2 * group + adapt */
enum { GROUP_MOMENTUM, GROUP_DECAY, GROUP_ETA, GROUP_LR, GROUP };
enum { GRAIN = 16, CACHED = (1 << 20) / CHUNK }; /* chunks a thread takes at a time; chunks of a group */

typedef struct {
    float lr, momentum, decay, ratio, scale, weight;
} Rule;

/* out = |p|^2, |scale g + decay p|^2 */
SPECIALISED void squares(const float *p, const void *g, int64_t n, float decay, float scale, double *out, int g_low) {
    double p_sums[LANES] = {0}, d_sums[LANES] = {0};
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t stop = n - first < BLOCK ? n : first + BLOCK, i = first;
        float p_part[LANES] = {0}, d_part[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float x = p[i + lane], d = scale * load(g, i + lane, g_low) + decay * x;
                p_part[lane] += x * x;
                d_part[lane] += d * d;
            }
        for (int lane = 0; i < stop; i++, lane++) {
            float x = p[i], d = scale * load(g, i, g_low) + decay * x;
            p_part[lane] += x * x;
            d_part[lane] += d * d;
        }
        for (int lane = 0; lane < LANES; lane++) {
            p_sums[lane] += p_part[lane];
            d_sums[lane] += d_part[lane];
        }
    }
    out[0] = out[1] = 0.0;
    for (int lane = 0; lane < LANES; lane++) {
        out[0] += p_sums[lane];
        out[1] += d_sums[lane];
    }
}

SPECIALISED void update(float *restrict p, const void *restrict g, float *restrict v, float *restrict t,
                        uint16_t *restrict p_copy, uint16_t *restrict t_copy, int64_t n, Rule r, int g_low, int has_t,
                        int has_copies) {
    for (int64_t i = 0; i < n; i++) {
        v[i] = r.momentum * v[i] + r.ratio * (r.scale * load(g, i, g_low) + r.decay * p[i]);
        p[i] -= r.lr * v[i];
        if (has_t) t[i] = fmaf(r.weight, p[i] - t[i], t[i]);
        if (has_copies) p_copy[i] = narrow(p[i]);
        if (has_copies && has_t) t_copy[i] = narrow(t[i]);
    }
}

/* Exact at both ends, as torch.lerp. */
static void average(float *restrict t, const float *restrict p, int64_t n, float weight) {
    if (weight < 0.5f) for (int64_t i = 0; i < n; i++) t[i] = fmaf(weight, p[i] - t[i], t[i]);
    else for (int64_t i = 0; i < n; i++) t[i] = fmaf(weight - 1.0f, p[i] - t[i], p[i]);
}

static void copy(void *restrict to, const float *restrict from, int64_t n, int low) {
    if (!low) memcpy(to, from, n * sizeof(float));
    else for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = narrow(from[i]);
}

/* All that happens to `n` elements of a row; `at` is where each column has them, 0 where the row lacks it. */
static void apply(void *const at[NUM_COLUMNS], const int64_t *low, int64_t n, Rule rule) {
    float *p = at[PARAM], *v = at[MOMENTUM], *t = at[TARGET];
    const void *g = at[GRAD];
    uint16_t *p_copy = at[PARAM_COPY], *t_copy = at[TARGET_COPY];
    /* What usually goes together is done in one pass; all else follows while the elements are in the cache. */
    int one_t = g && t && rule.weight < 0.5f;
    int one_copy = g && p_copy && low[PARAM_COPY] && (one_t ? t_copy && low[TARGET_COPY] : !t);
    if (g)
        switch (4 * (int)low[GRAD] + 2 * one_t + one_copy) {
#define CASE(G_LOW, HAS_T, HAS_COPIES)                                                                                 \
    case 4 * G_LOW + 2 * HAS_T + HAS_COPIES:                                                                           \
        update(p, g, v, t, p_copy, t_copy, n, rule, G_LOW, HAS_T, HAS_COPIES);                                         \
        break;
            CASE(0, 0, 0) CASE(0, 0, 1) CASE(0, 1, 0) CASE(0, 1, 1)
            CASE(1, 0, 0) CASE(1, 0, 1) CASE(1, 1, 0) CASE(1, 1, 1)
        }
    if (t && !one_t) average(t, p, n, rule.weight);
    if (p_copy && !one_copy) copy(p_copy, p, n, (int)low[PARAM_COPY]);
    if (t && t_copy && !(one_copy && one_t)) copy(t_copy, t, n, (int)low[TARGET_COPY]);
}

void lars_step(const int64_t *addresses, /* [NUM_COLUMNS, num_rows]; 0 where a row lacks it */
               const int64_t *rows,      /* [num_rows, ROW] */
               const int64_t *chunks,    /* [num_chunks, 2]: row, chunk within the row; the adapted rows come first */
               const int64_t *lows,      /* [kinds, NUM_COLUMNS]: 1 for bfloat16, 0 for float32 */
               const double *groups,     /* [groups, GROUP] */
               int64_t num_rows, int64_t num_chunks, int64_t num_adapted, double scale, double weight, int threads,
               double *partials,         /* [num_adapted, 2] */
               double *ratios) {         /* [num_rows] */
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t begin = 0, end; begin < num_chunks; begin = end) {
        end = num_chunks;
        if (begin < num_adapted) {
            for (end = begin; end < num_adapted;) {
                int64_t next = end + (rows[ROW * chunks[2 * end] + NUMEL] + CHUNK - 1) / CHUNK;
                if (end > begin && next - begin > CACHED) break;
                end = next;
            }
#pragma omp for schedule(dynamic, GRAIN)
            for (int64_t c = begin; c < end; c++) {
                int64_t index = chunks[2 * c], first = chunks[2 * c + 1] * CHUNK;
                const int64_t *row = rows + ROW * index, *low = lows + NUM_COLUMNS * row[KIND];
                int64_t n = row[NUMEL] - first < CHUNK ? row[NUMEL] - first : CHUNK;
                const float *p = offset((void *)addresses[index], first, 0);
                const void *g = offset((void *)addresses[num_rows * GRAD + index], first, (int)low[GRAD]);
                double decay = groups[GROUP * (row[TAG] / 2) + GROUP_DECAY];
                if (low[GRAD]) squares(p, g, n, decay, scale, partials + 2 * c, 1);
                else squares(p, g, n, decay, scale, partials + 2 * c, 0);
            }
#pragma omp single
            for (int64_t c = begin; c < end;) {
                int64_t index = chunks[2 * c];
                const int64_t *row = rows + ROW * index;
                double p_square = 0.0, d_square = 0.0;
                for (int64_t next = c + (row[NUMEL] + CHUNK - 1) / CHUNK; c < next; c++) {
                    p_square += partials[2 * c];
                    d_square += partials[2 * c + 1];
                }
                ratios[index] = p_square > 0.0 && d_square > 0.0
                                    ? groups[GROUP * (row[TAG] / 2) + GROUP_ETA] * sqrt(p_square / d_square)
                                    : 1.0;
            }
        }
        /* Backwards, because what the norms read last is still nearest; forwards within a grain, as memory likes it. */
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t grain = (end - begin - 1) / GRAIN; grain >= 0; grain--)
            for (int64_t c = begin + grain * GRAIN; c < end && c < begin + (grain + 1) * GRAIN; c++) {
                int64_t index = chunks[2 * c], first = chunks[2 * c + 1] * CHUNK;
                const int64_t *row = rows + ROW * index, *low = lows + NUM_COLUMNS * row[KIND];
                const double *group = groups + GROUP * (row[TAG] / 2);
                int adapt = row[TAG] % 2;
                Rule rule = {group[GROUP_LR], group[GROUP_MOMENTUM], adapt ? group[GROUP_DECAY] : 0.0,
                             adapt ? ratios[index] : 1.0, scale, weight};
                void *at[NUM_COLUMNS];
                for (int k = 0; k < NUM_COLUMNS; k++)
                    at[k] = (void *)offset((void *)addresses[num_rows * k + index], first, (int)low[k]);
                apply(at, low, row[NUMEL] - first < CHUNK ? row[NUMEL] - first : CHUNK, rule);
            }
    }
}

/* ---- Gaussian blur ------------------------------------------------------------------------------------------------ */

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
enum { WIDTH = sizeof(Vector) / sizeof(float), SUMS = 4 }; /* as many vectors as stay in registers */

/* out[i] = weights[0] before[0][i] + the sum over k of weights[k] (before[k][i] + after[k][i]) */
static void weighted(float *out, const float *const *before, const float *const *after, const float *weights,
                     int64_t radius, int64_t n) {
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH) {
        Vector sums[SUMS];
        for (int s = 0; s < SUMS; s++) sums[s] = weights[0] * *(const Vector *)(before[0] + i + s * WIDTH);
        for (int64_t k = 1; k <= radius; k++)
            for (int s = 0; s < SUMS; s++)
                sums[s] += weights[k] * (*(const Vector *)(before[k] + i + s * WIDTH) +
                                         *(const Vector *)(after[k] + i + s * WIDTH));
        for (int s = 0; s < SUMS; s++) *(Vector *)(out + i + s * WIDTH) = sums[s];
    }
    for (; i + WIDTH <= n; i += WIDTH) {
        Vector sum = weights[0] * *(const Vector *)(before[0] + i);
        for (int64_t k = 1; k <= radius; k++)
            sum += weights[k] * (*(const Vector *)(before[k] + i) + *(const Vector *)(after[k] + i));
        *(Vector *)(out + i) = sum;
    }
    for (; i < n; i++) {
        float sum = weights[0] * before[0][i];
        for (int64_t k = 1; k <= radius; k++) sum += weights[k] * (before[k][i] + after[k][i]);
        out[i] = sum;
    }
}

static int64_t reflect(int64_t index, int64_t length) {
    int64_t period = length > 1 ? 2 * (length - 1) : 1;
    index = (index < 0 ? -index : index) % period;
    return index < period - index ? index : period - index;
}

/* Blurs an image of interleaved pixels; 0 where there is no memory for it, and then nothing is written. */
int gaussian_blur(const float *in, float *out, int64_t height, int64_t width, int64_t channels, int64_t radius,
                  const float *weights, int threads) {
    int64_t row = width * channels, beside = radius * channels;
    size_t each = ((row + 2 * beside) * sizeof(float) + 2 * (radius + 1) * sizeof(float *) + 63) / 64 * 64;
    char *memory = malloc(each * threads);
    if (!memory) return 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *mine = memory + each * omp_get_thread_num();
        const float **before = (const float **)mine, **after = before + radius + 1;
        float *padded = (float *)(after + radius + 1);
#pragma omp for schedule(static)
        for (int64_t y = 0; y < height; y++) {
            for (int64_t k = 0; k <= radius; k++) {
                before[k] = in + reflect(y - k, height) * row;
                after[k] = in + reflect(y + k, height) * row;
            }
            weighted(padded + beside, before, after, weights, radius, row);
            for (int64_t k = 1; k <= radius; k++)
                for (int64_t c = 0; c < channels; c++) {
                    padded[beside - k * channels + c] = padded[beside + reflect(-k, width) * channels + c];
                    padded[beside + (width - 1 + k) * channels + c] =
                        padded[beside + reflect(width - 1 + k, width) * channels + c];
                }
            for (int64_t k = 0; k <= radius; k++) {
                before[k] = padded + beside - k * channels;
                after[k] = padded + beside + k * channels;
            }
            weighted(out + y * row, before, after, weights, radius, row);
        }
    }
    free(memory);
    return 1;
}
