/* The layer, the link and activations on a CPU, float32. on_cpu.py loads and calls them; the mathematics is in layer.py,
   link.py and rules/pointwise.py.

   An activation is (N, C, P) in memory, or (N, P, C) where channels are last. A channel of a statistic group mostly fits
   into the cache, so that its three visits (mean, variance, normalization) read main memory once. Sums are of short runs in
   float32 and of the runs in float64. Work is divided statically, so results depend on the number of threads alone. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define RUN 1024
#define RESTRICT __restrict__
#define INLINE static inline __attribute__((always_inline)) /* a choice that is constant then needs no branch */
#define SMALL 32768 /* elements; below this size a second thread costs more than it saves */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Over n elements or rows in runs of RUN, each from `start` to `end`. */
#define FOR_RUNS(n, start, end) for (int64_t start = 0, end; end = least(start + RUN, n), start < n; start += RUN)

typedef struct {
    const float *prior_mean, *prior_var, *shift, *scale, *gain, *noise, *weight, *bias;
    int64_t prior_groups;
    float gain_slope, gain_offset, noise_scale, eps;
    int32_t spread, relu;
} Inputs;

typedef struct {
    int64_t samples, channels, pixels, groups;
    int32_t channels_last, threads;
} Shape;

static float gain_of(const Inputs *f) {
    if (!f->prior_mean) return 1.0f;
    if (!f->gain) return f->gain_offset;
    if (f->gain_slope == 0.0f) return f->gain[0];
    return 1.0f / (1.0f + expf(-(f->gain_slope * f->gain[0] + f->gain_offset)));
}

/* The process noise of channel c, over the variance without it. */
static float share_of(const Inputs *f, int64_t c) { return f->noise ? f->noise_scale * expf(f->noise[c]) : 0.0f; }

/* The prior of channel c, at p among those that are given: corrected, and with process noise. */
static float prior_mean_of(const Inputs *f, int64_t p, int64_t c) {
    return f->prior_mean[p] + (f->shift ? f->shift[c] : 0.0f);
}

static float scale_of(const Inputs *f, int64_t c) { return f->scale ? f->scale[c] : 1.0f; }

static float prior_var_of(const Inputs *f, int64_t p, int64_t c) {
    return scale_of(f, c) * f->prior_var[p] * (1 + share_of(f, c));
}

static float weight_of(const Inputs *f, int64_t c) { return f->weight ? f->weight[c] : 1.0f; }
static float bias_of(const Inputs *f, int64_t c) { return f->bias ? f->bias[c] : 0.0f; }

/* statistics: (6, S, C), posterior mean and variance, output mean and variance, observed mean and variance. */
static void fuse(const Inputs *f, float q, int64_t size, int64_t channels, int64_t i, double mean, double var,
                 float *statistics) {
    int64_t c = i % channels;
    float m = (float)mean, v = (float)var;
    float posterior_mean = m, posterior_var = v;
    if (f->prior_mean) {
        int64_t p = f->prior_groups == 1 ? c : i;
        float prior_mean = prior_mean_of(f, p, c), prior_var = prior_var_of(f, p, c);
        float innovation = m - prior_mean;
        posterior_mean = prior_mean + q * innovation;
        posterior_var = prior_var + q * (v - prior_var);
        if (f->spread) posterior_var += q * (1 - q) * innovation * innovation;
    }
    float gamma = weight_of(f, c);
    statistics[i] = posterior_mean;
    statistics[size + i] = posterior_var;
    statistics[2 * size + i] = bias_of(f, c);
    statistics[3 * size + i] = gamma * gamma * (posterior_var / (posterior_var + f->eps));
    statistics[4 * size + i] = m;
    statistics[5 * size + i] = v;
}

/* y = scale x + shift */
static void line_of(const Inputs *f, const float *statistics, int64_t size, int64_t channels, int64_t i, float *scale,
                    float *shift) {
    int64_t c = i % channels;
    *scale = weight_of(f, c) / sqrtf(statistics[size + i] + f->eps);
    *shift = bias_of(f, c) - statistics[i] * *scale;
}

/* Not fmax, which would make zero of NaN. */
static double not_negative(double x) { return x < 0 ? 0.0 : x; }

/* Of values, or of their squared deviations from a mean. */
INLINE double sum_run(const float *RESTRICT x, int64_t n, int squared, float mean) {
    double total = 0;
    FOR_RUNS(n, start, end) {
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t j = start; j < end; j++) part += squared ? (x[j] - mean) * (x[j] - mean) : x[j];
        total += part;
    }
    return total;
}

static void apply_run(const float *RESTRICT x, float *RESTRICT y, int64_t n, float scale, float shift, int relu) {
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * scale + shift;
    if (relu) /* not fmaxf, which would make zero of NaN */
        for (int64_t j = 0; j < n; j++) y[j] = y[j] < 0 ? 0.0f : y[j];
}

/* Packed by `_FORWARD` in on_cpu.py; the other arguments below likewise. */
typedef struct {
    Inputs inputs;
    Shape shape;
    const float *x;
    float *y, *statistics, *running_mean, *running_var;
    int64_t *batches, *nonfinite;
    float momentum;
} Forward;

static void forward_channels_first(const Forward *a, float q) {
    const Shape *shape = &a->shape;
    int64_t C = shape->channels, P = shape->pixels, rows = shape->samples / shape->groups, size = shape->groups * C;
#pragma omp parallel for schedule(static) num_threads(shape->threads) if (size * rows * P > SMALL)
    for (int64_t i = 0; i < size; i++) {
        int64_t first = (i / C * rows * C + i % C) * P;
        double n = (double)(rows * P), mean = 0, squares = 0;
        for (int64_t r = 0; r < rows; r++) mean += sum_run(a->x + first + r * C * P, P, 0, 0);
        mean /= n;
        for (int64_t r = 0; r < rows; r++) squares += sum_run(a->x + first + r * C * P, P, 1, (float)mean);
        /* the mean's rounding in float32 */
        double lost = mean - (float)mean;
        fuse(&a->inputs, q, size, C, i, mean, not_negative(squares / n - lost * lost), a->statistics);
        float scale, shift;
        line_of(&a->inputs, a->statistics, size, C, i, &scale, &shift);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = first + r * C * P;
            apply_run(a->x + at, a->y + at, P, scale, shift, a->inputs.relu);
        }
    }
}

/* Sums over rows of C values: of x, or of squared deviations from `mean`. */
static void sum_rows(const float *RESTRICT x, int64_t rows, int64_t C, const float *RESTRICT mean,
                     float *RESTRICT part, double *RESTRICT total) {
    FOR_RUNS(rows, start, end) {
        memset(part, 0, C * sizeof(float));
        for (int64_t r = start; r < end; r++) {
            const float *RESTRICT row = x + r * C;
            if (mean) {
                for (int64_t c = 0; c < C; c++) part[c] += (row[c] - mean[c]) * (row[c] - mean[c]);
            } else {
                for (int64_t c = 0; c < C; c++) part[c] += row[c];
            }
        }
        for (int64_t c = 0; c < C; c++) total[c] += part[c];
    }
}

static void sum_rows_in_threads(const float *x, int64_t rows, int64_t C, const float *mean, int threads, double *total) {
    double *totals = calloc(threads * C, sizeof(double));
    float *parts = malloc(threads * C * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t from = rows * t / threads, to = rows * (t + 1) / threads;
        sum_rows(x + from * C, to - from, C, mean, parts + t * C, totals + t * C);
    }
    for (int64_t c = 0; c < C; c++) {
        total[c] = 0;
        for (int t = 0; t < threads; t++) total[c] += totals[t * C + c];
    }
    free(totals);
    free(parts);
}

static void forward_group_channels_last(const Forward *a, float q, int64_t group, int threads) {
    const Inputs *f = &a->inputs;
    const Shape *shape = &a->shape;
    int64_t C = shape->channels, rows = shape->samples / shape->groups * shape->pixels, size = shape->groups * C;
    int64_t first = group * rows * C;
    double *total = malloc(2 * C * sizeof(double)), *mean = total + C;
    float *line = malloc(2 * C * sizeof(float)), *shift = line + C;
    sum_rows_in_threads(a->x + first, rows, C, NULL, threads, total);
    for (int64_t c = 0; c < C; c++) {
        mean[c] = total[c] / rows;
        line[c] = (float)mean[c];
    }
    sum_rows_in_threads(a->x + first, rows, C, line, threads, total);
    for (int64_t c = 0; c < C; c++) {
        double lost = mean[c] - line[c];
        fuse(f, q, size, C, group * C + c, mean[c], not_negative(total[c] / rows - lost * lost), a->statistics);
        line_of(f, a->statistics, size, C, group * C + c, line + c, shift + c);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *RESTRICT in = a->x + first + r * C;
        float *RESTRICT out = a->y + first + r * C;
        for (int64_t c = 0; c < C; c++) out[c] = in[c] * line[c] + shift[c];
        if (f->relu)
            for (int64_t c = 0; c < C; c++) out[c] = out[c] < 0 ? 0.0f : out[c];
    }
    free(total);
    free(line);
}

static void move_running(const Forward *a, float q) {
    int64_t C = a->shape.channels, S = a->shape.groups, size = S * C;
    int64_t others = a->shape.samples / S * a->shape.pixels - 1;
    const float *statistics = a->statistics;
    float bessel = q / (float)(others > 1 ? others : 1);
    int lost = 0;
    for (int64_t c = 0; c < C; c++) {
        float mean = 0, var = 0;
        for (int64_t s = 0; s < S; s++) {
            int64_t i = s * C + c;
            mean += statistics[i];
            var += statistics[size + i] + bessel * statistics[5 * size + i];
        }
        mean /= S;
        var /= S;
        if (isfinite(mean + var)) {
            a->running_mean[c] += a->momentum * (mean - a->running_mean[c]);
            a->running_var[c] += a->momentum * (var - a->running_var[c]);
        } else {
            lost = 1;
        }
    }
    a->batches[0] += 1;
    a->nonfinite[0] += lost;
}

static int threads_for(const Shape *s) { return s->samples * s->pixels * s->channels > SMALL ? s->threads : 1; }

void layer_forward(const Forward *a) {
    float q = gain_of(&a->inputs);
    int threads = threads_for(&a->shape);
    if (!a->shape.channels_last) {
        forward_channels_first(a, q);
    } else if (a->shape.groups == 1) {
        /* No loop in threads inside of another, even of one turn: its threads would be made anew each time. */
        forward_group_channels_last(a, q, 0, threads);
    } else {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t s = 0; s < a->shape.groups; s++) forward_group_channels_last(a, q, s, 1);
    }
    if (a->running_mean) move_running(a, q);
}

/* ---- backward ---- */

/* Gradients from above, and where those of a group and channel are written: each (S, C), or NULL. */
typedef struct {
    const float *d_posterior_mean, *d_posterior_var, *d_output_mean, *d_output_var;
    float *d_prior_mean, *d_prior_var, *d_gain, *d_noise, *d_weight, *d_bias;
} Gradients;

typedef struct {
    Inputs inputs;
    Shape shape;
    Gradients gradients;
    const float *dy, *x, *statistics;
    float *dx;
} Backward;

/* One group and channel's share of every gradient; `terms` is (5, S, C): prior mean, prior variance, gain, weight, bias. */
static void gradients_of(const Backward *a, float q, int64_t i, double sum_dy, double sum_dyx, float *terms,
                         float *scale, float *slope, float *offset) {
    const Inputs *f = &a->inputs;
    const Gradients *g = &a->gradients;
    const float *statistics = a->statistics;
    int64_t C = a->shape.channels, size = a->shape.groups * C, c = i % C;
    double n = (double)(a->shape.samples / a->shape.groups * a->shape.pixels);
    float gamma = weight_of(f, c), eps = f->eps;
    float v = statistics[size + i], mean = statistics[4 * size + i], var = statistics[5 * size + i];
    float inverse = 1.0f / sqrtf(v + eps);
    *scale = gamma / sqrtf(v + eps); /* as line_of, or the masks of the two passes differ */
    float d_output_var = g->d_output_var ? g->d_output_var[i] : 0.0f;
    float g_mean = (g->d_posterior_mean ? g->d_posterior_mean[i] : 0.0f) - *scale * (float)sum_dy;
    float g_var = (g->d_posterior_var ? g->d_posterior_var[i] : 0.0f) - 0.5f * *scale * inverse * (float)sum_dyx;
    float inverse2 = inverse * inverse;
    g_var += d_output_var * gamma * gamma * eps * inverse2 * inverse2;
    float by_observed = g_mean;
    if (f->prior_mean) {
        int64_t p = f->prior_groups == 1 ? c : i;
        float innovation = mean - prior_mean_of(f, p, c), by_prior_mean = (1 - q) * g_mean;
        float by_gain = var - prior_var_of(f, p, c);
        by_observed = q * g_mean;
        if (f->spread) {
            float through = 2 * q * (1 - q) * innovation * g_var;
            by_observed += through;
            by_prior_mean -= through;
            by_gain += (1 - 2 * q) * innovation * innovation;
        }
        terms[i] = by_prior_mean;
        terms[size + i] = (1 - q) * g_var * scale_of(f, c);
        terms[2 * size + i] = g_mean * innovation + g_var * by_gain;
    }
    terms[3 * size + i] = (float)sum_dyx + 2 * d_output_var * gamma * v * inverse2;
    terms[4 * size + i] = (float)sum_dy + (g->d_output_mean ? g->d_output_mean[i] : 0.0f);
    /* The deviations of a constant channel are nothing but rounding: see moments.slope_by_variance. */
    float rounding = mean * (8 * 1.1920929e-7f);
    *slope = var > rounding * rounding ? (float)(2 * q * g_var / n) : 0.0f;
    *offset = (float)(by_observed / n) - *slope * mean;
}

static void collect(const Backward *a, float q, const float *terms) {
    const Inputs *f = &a->inputs;
    const Gradients *g = &a->gradients;
    int64_t C = a->shape.channels, S = a->shape.groups, size = S * C;
    double by_gain = 0;
    for (int64_t c = 0; c < C; c++) {
        float by_mean = 0, by_var = 0, by_noise = 0, by_weight = 0, by_bias = 0, share = share_of(f, c);
        for (int64_t s = 0; s < S; s++) {
            int64_t i = s * C + c;
            if (f->prior_mean) {
                int64_t p = f->prior_groups == 1 ? c : i;
                by_mean += terms[i];
                by_var += terms[size + i];
                by_noise += terms[size + i] * share * f->prior_var[p];
                by_gain += terms[2 * size + i];
                if (f->prior_groups > 1) {
                    g->d_prior_mean[i] = terms[i];
                    g->d_prior_var[i] = terms[size + i] * (1 + share);
                }
            }
            by_weight += terms[3 * size + i];
            by_bias += terms[4 * size + i];
        }
        if (f->prior_mean && f->prior_groups == 1) {
            g->d_prior_mean[c] = by_mean;
            g->d_prior_var[c] = by_var * (1 + share);
        }
        if (g->d_noise) g->d_noise[c] = by_noise;
        if (g->d_weight) g->d_weight[c] = by_weight;
        if (g->d_bias) g->d_bias[c] = by_bias;
    }
    if (g->d_gain) g->d_gain[0] = (float)(by_gain * (f->gain_slope == 0.0f ? 1.0f : f->gain_slope * q * (1 - q)));
}

/* The gradient in front of a ReLU, whose mask is computed again. */
INLINE float masked(float dy, float x, float scale, float shift, int relu) {
    return !relu || x * scale + shift > 0 ? dy : 0.0f;
}

INLINE void sums_run(const float *RESTRICT dy, const float *RESTRICT x, int64_t n, float mean, float scale, float shift,
                     int relu, double *sum_dy, double *sum_dyx) {
    FOR_RUNS(n, start, end) {
        float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
        for (int64_t j = start; j < end; j++) {
            float d = masked(dy[j], x[j], scale, shift, relu);
            a += d;
            b += d * (x[j] - mean);
        }
        *sum_dy += a;
        *sum_dyx += b;
    }
}

INLINE void input_gradient_run(const float *RESTRICT dy, const float *RESTRICT x, float *RESTRICT dx, int64_t n,
                               float scale, float shift, float slope, float offset, int relu) {
    for (int64_t j = 0; j < n; j++)
        dx[j] = scale * masked(dy[j], x[j], scale, shift, relu) + slope * x[j] + offset;
}

static void backward_channels_first(const Backward *a, float q, float *terms) {
    const Inputs *f = &a->inputs;
    const Shape *shape = &a->shape;
    const float *dy = a->dy, *x = a->x, *statistics = a->statistics;
    int64_t C = shape->channels, P = shape->pixels, rows = shape->samples / shape->groups, size = shape->groups * C;
#pragma omp parallel for schedule(static) num_threads(shape->threads) if (size * rows * P > SMALL)
    for (int64_t i = 0; i < size; i++) {
        int64_t first = (i / C * rows * C + i % C) * P;
        float m = statistics[i], scale, shift, slope, offset;
        line_of(f, statistics, size, C, i, &scale, &shift);
        double sum_dy = 0, sum_dyx = 0;
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = first + r * C * P;
            if (f->relu)
                sums_run(dy + at, x + at, P, m, scale, shift, 1, &sum_dy, &sum_dyx);
            else
                sums_run(dy + at, x + at, P, m, scale, shift, 0, &sum_dy, &sum_dyx);
        }
        sum_dyx /= sqrt(statistics[size + i] + f->eps);
        gradients_of(a, q, i, sum_dy, sum_dyx, terms, &scale, &slope, &offset);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = first + r * C * P;
            if (f->relu)
                input_gradient_run(dy + at, x + at, a->dx + at, P, scale, shift, slope, offset, 1);
            else
                input_gradient_run(dy + at, x + at, a->dx + at, P, scale, shift, slope, offset, 0);
        }
    }
}

static void sum_gradient_rows(const float *RESTRICT dy, const float *RESTRICT x, int64_t rows, int64_t C,
                              const float *RESTRICT mean, const float *RESTRICT scale, const float *RESTRICT shift,
                              int relu, float *RESTRICT part, double *RESTRICT total) {
    FOR_RUNS(rows, start, end) {
        memset(part, 0, 2 * C * sizeof(float));
        float *RESTRICT a = part, *RESTRICT b = part + C;
        for (int64_t r = start; r < end; r++) {
            int64_t at = r * C;
            for (int64_t c = 0; c < C; c++) {
                float d = masked(dy[at + c], x[at + c], scale[c], shift[c], relu);
                a[c] += d;
                b[c] += d * (x[at + c] - mean[c]);
            }
        }
        for (int64_t c = 0; c < 2 * C; c++) total[c] += part[c];
    }
}

static void backward_group_channels_last(const Backward *a, float q, float *terms, int64_t group, int threads) {
    const Inputs *f = &a->inputs;
    const Shape *shape = &a->shape;
    const float *dy = a->dy, *x = a->x, *statistics = a->statistics;
    float *dx = a->dx;
    int64_t C = shape->channels, rows = shape->samples / shape->groups * shape->pixels, size = shape->groups * C;
    int64_t first = group * rows * C;
    float *line = malloc(4 * C * sizeof(float)), *shift = line + C, *slope = line + 2 * C, *offset = line + 3 * C;
    double *totals = calloc(threads * 2 * C, sizeof(double));
    float *parts = malloc(threads * 2 * C * sizeof(float));
    for (int64_t c = 0; c < C; c++) line_of(f, statistics, size, C, group * C + c, line + c, shift + c);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t from = rows * t / threads, to = rows * (t + 1) / threads, at = first + from * C;
        sum_gradient_rows(dy + at, x + at, to - from, C, statistics + group * C, line, shift, f->relu,
                          parts + t * 2 * C, totals + t * 2 * C);
    }
    for (int64_t c = 0; c < C; c++) {
        double sum_dy = 0, sum_dyx = 0;
        for (int t = 0; t < threads; t++) {
            sum_dy += totals[t * 2 * C + c];
            sum_dyx += totals[t * 2 * C + C + c];
        }
        sum_dyx /= sqrt(statistics[size + group * C + c] + f->eps);
        gradients_of(a, q, group * C + c, sum_dy, sum_dyx, terms, line + c, slope + c, offset + c);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = first + r * C;
        for (int64_t c = 0; c < C; c++) {
            float d = masked(dy[at + c], x[at + c], line[c], shift[c], f->relu);
            dx[at + c] = line[c] * d + slope[c] * x[at + c] + offset[c];
        }
    }
    free(line);
    free(totals);
    free(parts);
}

void layer_backward(const Backward *a) {
    float q = gain_of(&a->inputs), *terms = malloc(5 * a->shape.groups * a->shape.channels * sizeof(float));
    int threads = threads_for(&a->shape);
    if (!a->shape.channels_last) {
        backward_channels_first(a, q, terms);
    } else if (a->shape.groups == 1) { /* as above */
        backward_group_channels_last(a, q, terms, 0, threads);
    } else {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t s = 0; s < a->shape.groups; s++) backward_group_channels_last(a, q, terms, s, 1);
    }
    collect(a, q, terms);
    free(terms);
}

/* ---- the link ---- */

typedef struct {
    const float *mean, *var, *weight, *bias;
    float *rectified; /* (2, S, in), moments after the ReLU */
    int64_t groups, in, out, taps;
    int32_t taps_inside; /* the weight is (out, in, taps) in memory, else (out, taps, in) */
    int32_t relu, threads, unused;
} Link;

static void standardize(float mean, float var, float *std, float *a, float *above, float *below, float *density) {
    *std = sqrtf(var > 1.0842022e-19f ? var : 1.0842022e-19f);
    *a = mean / *std;
    *a = *a > 1e3f ? 1e3f : *a < -1e3f ? -1e3f : *a;
    *above = 0.5f * erfcf(*a * -0.70710678f);
    *below = 0.5f * erfcf(*a * 0.70710678f);
    *density = expf(-0.5f * *a * *a) * 0.39894228f;
}

static void rectify(float *mean, float *var) {
    float std, a, above, below, density;
    standardize(*mean, *var, &std, &a, &above, &below, &density);
    float positive = density + a * above, negative = density - a * below;
    *mean = a > 30 ? *mean : std * positive;
    float share = above - positive * negative;
    *var *= share < 0 ? 0.0f : share;
}

/* Where tap k of input channel j is in a row of the weight. */
INLINE int64_t place_of(const Link *l, int64_t in, int64_t j, int64_t k) {
    return l->taps_inside ? j * l->taps + k : k * in + j;
}

/* With one group, *mean and *var of each channel at each of its taps, in the weight's order. Returns memory to free. */
static float *at_taps(const Link *l, const float **mean, const float **var) {
    if (l->groups > 1 || l->taps == 1) return NULL;
    int64_t columns = l->in * l->taps;
    float *each = malloc(2 * columns * sizeof(float));
    for (int64_t j = 0; j < l->in; j++)
        for (int64_t k = 0; k < l->taps; k++) {
            each[place_of(l, l->in, j, k)] = (*mean)[j];
            each[columns + place_of(l, l->in, j, k)] = (*var)[j];
        }
    *mean = each;
    *var = each + columns;
    return each;
}

static void over_taps(const float *each, const Link *l, float *moment) {
    for (int64_t j = 0; j < l->in; j++) {
        float sum = 0;
        for (int64_t k = 0; k < l->taps; k++) sum += each[place_of(l, l->in, j, k)];
        moment[j] = sum;
    }
}

/* Sums of four rows of a weight, and of its square, with the moments; of fewer, which are the first row then. */
static void dot_rows(const float *RESTRICT w, int64_t rows, const float *RESTRICT m, const float *RESTRICT v, int64_t n,
                     float *mean, float *var) {
    const float *RESTRICT w1 = w + (rows > 1 ? n : 0), *RESTRICT w2 = w + (rows > 2 ? 2 * n : 0);
    const float *RESTRICT w3 = w + (rows > 3 ? 3 * n : 0);
    float a = 0, a1 = 0, a2 = 0, a3 = 0, b = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a, a1, a2, a3, b, b1, b2, b3)
    for (int64_t j = 0; j < n; j++) {
        a += w[j] * m[j];
        a1 += w1[j] * m[j];
        a2 += w2[j] * m[j];
        a3 += w3[j] * m[j];
        b += w[j] * w[j] * v[j];
        b1 += w1[j] * w1[j] * v[j];
        b2 += w2[j] * w2[j] * v[j];
        b3 += w3[j] * w3[j] * v[j];
    }
    float means[] = {a, a1, a2, a3}, vars[] = {b, b1, b2, b3};
    memcpy(mean, means, rows * sizeof(float));
    memcpy(var, vars, rows * sizeof(float));
}

static float dot(const float *RESTRICT w, const float *RESTRICT m, int64_t n) {
    float a = 0;
#pragma omp simd reduction(+ : a)
    for (int64_t j = 0; j < n; j++) a += w[j] * m[j];
    return a;
}

/* A filter and its square, each summed over its taps. */
static void fold_row(const float *RESTRICT w, const Link *l, float *RESTRICT sum, float *RESTRICT squares) {
    memset(sum, 0, l->in * sizeof(float));
    memset(squares, 0, l->in * sizeof(float));
    for (int64_t k = 0; k < l->taps; k++)
        for (int64_t j = 0; j < l->in; j++) {
            float x = w[place_of(l, l->in, j, k)];
            sum[j] += x;
            squares[j] += x * x;
        }
}

typedef struct {
    Link link;
    float *out; /* (2, S, out) */
} LinkForward;

void link_forward(const LinkForward *a) {
    const Link *l = &a->link;
    int64_t S = l->groups, in = l->in, columns = in * l->taps;
    const float *weight = l->weight, *bias = l->bias, *m = l->mean, *v = l->var;
    float *rectified = l->rectified, *out = a->out;
    if (l->relu) {
        memcpy(rectified, m, S * in * sizeof(float));
        memcpy(rectified + S * in, v, S * in * sizeof(float));
        for (int64_t j = 0; j < S * in; j++) rectify(rectified + j, rectified + S * in + j);
        m = rectified;
        v = rectified + S * in;
    }
    float *each = at_taps(l, &m, &v), *folded = S > 1 ? malloc(l->threads * 2 * in * sizeof(float)) : NULL;
#pragma omp parallel for schedule(static) num_threads(l->threads) if (S * l->out * columns > SMALL)
    for (int t = 0; t < l->threads; t++) {
        for (int64_t i = l->out * t / l->threads; i < l->out * (t + 1) / l->threads; i++) {
            float *out_mean = out + i, *out_var = out + S * l->out + i, b = bias ? bias[i] : 0.0f;
            if (S == 1) {
                int64_t left = l->out * (t + 1) / l->threads - i, some = least(left, 4);
                dot_rows(weight + i * columns, some, m, v, columns, out_mean, out_var);
                for (int64_t j = 0; bias && j < some; j++) out_mean[j] += bias[i + j];
                i += some - 1;
                continue;
            }
            float *sum = folded + t * 2 * in, *squares = sum + in;
            fold_row(weight + i * columns, l, sum, squares);
            for (int64_t s = 0; s < S; s++) {
                out_mean[s * l->out] = dot(sum, m + s * in, in) + b;
                out_var[s * l->out] = dot(squares, v + s * in, in);
            }
        }
    }
    free(each);
    free(folded);
}

/* S = 1, of one row, or of four, which meet the moments in the processor's registers. below: (2, in * taps), this
   thread's own. */
INLINE void backward_rows(const float *RESTRICT w, float *RESTRICT dw, const int rows, const float *RESTRICT m,
                          const float *RESTRICT v, const float *dm, const float *dv, int64_t n, float *RESTRICT below) {
    float *RESTRICT below_mean = below, *RESTRICT below_var = below + n, a[4], b[4];
    memcpy(a, dm, rows * sizeof(float));
    memcpy(b, dv, rows * sizeof(float));
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float by_mean = 0, by_var = 0, mean = m[j], twice = 2 * v[j];
        for (int k = 0; k < rows; k++) {
            float x = w[k * n + j];
            by_mean += a[k] * x;
            by_var += b[k] * x * x;
            dw[k * n + j] = a[k] * mean + b[k] * x * twice;
        }
        below_mean[j] += by_mean;
        below_var[j] += by_var;
    }
}

/* S > 1. below: (2, S, in), this thread's own; row: (4, in), scratch. */
static void backward_row_of_groups(const float *RESTRICT w, float *RESTRICT dw, const float *m, const float *v,
                                   const float *dm, const float *dv, const Link *l, float *below, float *row) {
    int64_t S = l->groups, in = l->in;
    float *RESTRICT sum = row, *RESTRICT squares = row + in, *RESTRICT by_sum = row + 2 * in, *RESTRICT by_squares = row + 3 * in;
    fold_row(w, l, sum, squares);
    memset(by_sum, 0, 2 * in * sizeof(float));
    for (int64_t s = 0; s < S; s++) {
        float a = dm[s * l->out], b = dv[s * l->out];
        float *RESTRICT below_mean = below + s * in, *RESTRICT below_var = below + (S + s) * in;
        const float *RESTRICT ms = m + s * in, *RESTRICT vs = v + s * in;
        for (int64_t j = 0; j < in; j++) {
            below_mean[j] += a * sum[j];
            below_var[j] += b * squares[j];
            by_sum[j] += a * ms[j];
            by_squares[j] += b * vs[j];
        }
    }
    for (int64_t k = 0; k < l->taps; k++)
        for (int64_t j = 0; j < in; j++) {
            int64_t at = place_of(l, in, j, k);
            dw[at] = by_sum[j] + 2 * w[at] * by_squares[j];
        }
}

typedef struct {
    Link link;
    const float *d_mean, *d_var, *d_rectified_mean, *d_rectified_var;
    float *d_below, *d_weight; /* d_below: (2, S, in), of `mean` and `var` */
} LinkBackward;

void link_backward(const LinkBackward *a) {
    const Link *l = &a->link;
    int64_t S = l->groups, in = l->in, columns = in * l->taps, size = S * in;
    const float *mean = l->mean, *var = l->var, *weight = l->weight, *d_mean = a->d_mean, *d_var = a->d_var;
    const float *d_rectified_mean = a->d_rectified_mean, *d_rectified_var = a->d_rectified_var;
    const float *m = l->relu ? l->rectified : mean, *v = l->relu ? l->rectified + size : var;
    float *d_below = a->d_below, *d_weight = a->d_weight;
    float *each = at_taps(l, &m, &v), *rows = S > 1 ? malloc(l->threads * 4 * in * sizeof(float)) : NULL;
    int64_t wide = S == 1 ? 2 * columns : 2 * size;
    float *below = calloc(l->threads * wide, sizeof(float));
#pragma omp parallel for schedule(static) num_threads(l->threads) if (S * l->out * columns > SMALL)
    for (int t = 0; t < l->threads; t++) {
        float *own = below + t * wide;
        for (int64_t i = l->out * t / l->threads; i < l->out * (t + 1) / l->threads; i++) {
            const float *w = weight + i * columns;
            if (S > 1) {
                backward_row_of_groups(w, d_weight + i * columns, m, v, d_mean + i, d_var + i, l, own, rows + t * 4 * in);
            } else if (i + 4 <= l->out * (t + 1) / l->threads) {
                backward_rows(w, d_weight + i * columns, 4, m, v, d_mean + i, d_var + i, columns, own);
                i += 3;
            } else {
                backward_rows(w, d_weight + i * columns, 1, m, v, d_mean + i, d_var + i, columns, own);
            }
        }
    }
    for (int t = 1; t < l->threads; t++)
        for (int64_t j = 0; j < wide; j++) below[j] += below[t * wide + j];
    if (S == 1) {
        over_taps(below, l, d_below);
        over_taps(below + columns, l, d_below + in);
    } else {
        memcpy(d_below, below, wide * sizeof(float));
    }
    if (l->relu)
        for (int64_t j = 0; j < size; j++) {
            float std, a, above, under, density;
            standardize(mean[j], var[j], &std, &a, &above, &under, &density);
            float positive = density + a * above;
            float dm = d_below[j] + (d_rectified_mean ? d_rectified_mean[j] : 0.0f);
            float dv = d_below[size + j] + (d_rectified_var ? d_rectified_var[j] : 0.0f);
            d_below[j] = dm * above + dv * (2 * std * positive * under);
            d_below[size + j] = dm * (density / (2 * std)) + dv * (above - positive * density);
        }
    free(each);
    free(rows);
    free(below);
}

/* ---- the moments behind an activation ---- */

#define MOST_BREAKS 3
#define LANES 8
#define NODES 65
#define REACH 7.0f

enum { PIECES, SILU, SIGMOID, GELU };

typedef struct {
    const float *mean, *var;       /* (n,) */
    float *after_mean, *after_var; /* (n,) */
    float *slopes;                 /* (4, n): of the mean by mean and variance, then of the variance by both */
    int64_t n;
    int32_t function, breaks; /* for PIECES, which are polynomials between breaks */
    double at[MOST_BREAKS], pieces[MOST_BREAKS + 1][3];
} Activation;

static double std_of(double var) { return sqrt(var < 1.0842022e-19 ? 1.0842022e-19 : var); }

/* The integrals of z^k phi(z) from one edge to another, for k up to 6. */
static void powers_between(double from, double to, double *found) {
    double low = fabs(from) < 40 ? from : 0, high = fabs(to) < 40 ? to : 0;
    double start = fabs(from) < 40 ? 0.3989422804014327 * exp(-0.5 * low * low) : 0;
    double end = fabs(to) < 40 ? 0.3989422804014327 * exp(-0.5 * high * high) : 0;
    /* A difference of two upper or of two lower tail probabilities, whichever is the smaller. */
    double side = from > 0 ? 0.7071067811865476 : -0.7071067811865476;
    found[0] = 0.5 * fabs(erfc(side * from) - erfc(side * to));
    for (int k = 1; k < 7; k++) {
        found[k] = start - end + (k > 1 ? (k - 1) * found[k - 2] : 0);
        start *= low;
        end *= high;
    }
}

static double polynomial(const double *c, double m) { return c[0] + (c[1] ? c[1] * m : 0) + (c[2] ? c[2] * m * m : 0); }

/* By Stein's lemma, with h = f(m + s z) - f(m), in which no large numbers cancel. */
static void by_pieces(const Activation *a, int64_t i) {
    double m = a->mean[i], s = std_of(a->var[i]), from = -INFINITY, first[3] = {0}, second[3] = {0}, z[7];
    int own = 0;
    while (own < a->breaks && m > a->at[own]) own++;
    double centre = polynomial(a->pieces[own], m);
    for (int k = 0; k <= a->breaks; k++) {
        const double *c = a->pieces[k];
        double to = k < a->breaks ? (a->at[k] - m) / s : INFINITY;
        double h[] = {polynomial(c, m) - centre, (c[1] + (c[2] ? 2 * c[2] * m : 0)) * s, c[2] * s * s};
        double square[] = {h[0] * h[0], 2 * h[0] * h[1], h[1] * h[1] + 2 * h[0] * h[2], 2 * h[1] * h[2], h[2] * h[2]};
        powers_between(from, to, z);
        for (int j = 0; j < 3; j++) {
            for (int l = 0; l < 3; l++) first[j] += h[l] * z[j + l];
            for (int l = 0; l < 5; l++) second[j] += square[l] * z[j + l];
        }
        from = to;
    }
    double by_mean = first[1] / s, by_var = (first[2] - first[0]) / (2 * s * s);
    a->after_mean[i] = centre + first[0];
    a->after_var[i] = a->var[i] == 0 ? 0 : not_negative(second[0] - first[0] * first[0]);
    a->slopes[i] = by_mean;
    a->slopes[a->n + i] = by_var;
    a->slopes[2 * a->n + i] = second[1] / s - 2 * first[0] * by_mean;
    a->slopes[3 * a->n + i] = (second[2] - second[0]) / (2 * s * s) - 2 * first[0] * by_var;
}

/* e^x, by a polynomial, so that a compiler computes many at once: expf itself is a call. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = rintf(x * 1.44269504f), r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    float p = 0.5f + r * (0.16666665f + r * (0.041665796f + r * (0.0083334519f + r * (0.0013982f + r * 0.00019875692f))));
    union {
        int32_t bits;
        float power;
    } two = {.bits = ((int32_t)whole + 127) << 23};
    return (1 + r + r * r * p) * two.power;
}

/* A function's value and slope. */
INLINE void evaluate(int function, float t, float *value, float *slope) {
    if (function == GELU) { /* erfc to 1.5e-7: Abramowitz and Stegun, 7.1.26 */
        float e = exponential(-0.5f * t * t), p = 1 / (1 + 0.23164189f * fabsf(t));
        float tail = p * (0.12741480f + p * (-0.14224837f + p * (0.71070687f + p * (-0.72657601f + p * 0.53070271f)))) * e;
        float above = t < 0 ? tail : 1 - tail;
        *value = t * above;
        *slope = above + t * 0.39894228f * e;
        return;
    }
    float e = exponential(-t), g = 1 / (1 + e), down = g * e; /* down: 1 - g */
    *value = function == SILU ? t * g : g;
    *slope = function == SILU ? g + t * g * down : g * down;
}

/* By the trapezoid rule, as in rules/pointwise.py: h, the function less its value at the mean, and d, its slope less that
   at the mean, have no large numbers that cancel. */
INLINE void by_quadrature(const Activation *a, int function) {
    float weights[NODES];
    for (int k = 0; k < NODES; k++) {
        float z = REACH * (2.0f * k / (NODES - 1) - 1);
        weights[k] = 0.39894228f * (2 * REACH / (NODES - 1)) * expf(-0.5f * z * z);
    }
    for (int64_t start = 0; start < a->n; start += LANES) {
        float m[LANES], s[LANES], value[LANES], slope[LANES];
        float h[LANES] = {0}, hh[LANES] = {0}, hz[LANES] = {0}, d[LANES] = {0}, dz[LANES] = {0}, dh[LANES] = {0};
        float dhz[LANES] = {0};
        for (int j = 0; j < LANES; j++) {
            int64_t i = least(start + j, a->n - 1);
            m[j] = a->mean[i];
            s[j] = (float)std_of(a->var[i]);
            evaluate(function, m[j], value + j, slope + j);
        }
        for (int k = 0; k < NODES; k++) {
            float z = REACH * (2.0f * k / (NODES - 1) - 1), w = weights[k];
#pragma omp simd
            for (int j = 0; j < LANES; j++) {
                float y, by;
                evaluate(function, m[j] + s[j] * z, &y, &by);
                float rise = y - value[j], wh = w * rise, wd = w * (by - slope[j]);
                h[j] += wh;
                hh[j] += wh * rise;
                hz[j] += wh * z;
                d[j] += wd;
                dz[j] += wd * z;
                dh[j] += wd * rise;
                dhz[j] += wd * rise * z;
            }
        }
        for (int j = 0; j < LANES && start + j < a->n; j++) {
            int64_t i = start + j;
            a->after_mean[i] = value[j] + h[j];
            a->after_var[i] = (float)not_negative(hh[j] - h[j] * h[j]);
            a->slopes[i] = slope[j] + d[j];
            a->slopes[a->n + i] = dz[j] / (2 * s[j]);
            a->slopes[2 * a->n + i] = 2 * (dh[j] - h[j] * d[j]);
            a->slopes[3 * a->n + i] = (slope[j] * hz[j] + dhz[j] - h[j] * dz[j]) / s[j];
        }
    }
}

void activation(const Activation *a) {
    if (a->function == SILU) by_quadrature(a, SILU);
    if (a->function == SIGMOID) by_quadrature(a, SIGMOID);
    if (a->function == GELU) by_quadrature(a, GELU);
    for (int64_t i = 0; a->function == PIECES && i < a->n; i++) by_pieces(a, i);
}
