/*
 * Loss functions and the validation of their inputs; see loss.h.
 *
 * Owner: nothing. Thread: any.
 */
#include "model/loss.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "util/buf.h"
#include "util/limits.h"
#include "util/mem.h"

/* Sums run in double; the derivative is rounded once to float32. */
static bool store(double loss_i, double g_i, double *loss, float *g)
{
    *loss += loss_i;
    *g = (float)g_i;
    return isfinite(loss_i) && isfinite(*g);
}

static double lo_of(const struct tb_loss_inputs *in, int i)
{
    return in->lo_at ? (double)in->lo_at[i] : in->lo;
}
static double hi_of(const struct tb_loss_inputs *in, int i)
{
    return in->hi_at ? (double)in->hi_at[i] : in->hi;
}
static double clip(double r, double lo, double hi)
{
    return r < lo ? lo : r > hi ? hi : r;
}

static int eval_cross_entropy(const struct tb_loss_inputs *in, int i0, int i1, const float *lp,
                              float *g, double *loss)
{
    for (int i = i0; i < i1; i++)
        for (int j = 0; j < in->k; j++) {
            size_t at = (size_t)i * (size_t)in->k + (size_t)j;
            double w = in->weights ? (double)in->weights[at] : 1;
            double l = w == 0 ? 0 : -w * (double)lp[at];
            if (!store(l, w == 0 ? 0 : -w, loss, &g[at])) return i;
        }
    return -1;
}

/* Calls one formula for each position whose advantage is not zero; a huge ratio times zero is zero.
 */
#define EACH_POSITION(...)                                                                         \
    for (int i = i0; i < i1; i++) {                                                                \
        double l = (double)lp[i], q = (double)in->logprobs[i], A = (double)in->advantages[i];      \
        g[i] = 0;                                                                                  \
        if (A == 0) continue;                                                                      \
        double li, gi;                                                                             \
        __VA_ARGS__                                                                                \
        if (!store(li, gi, loss, &g[i])) return i;                                                 \
    }                                                                                              \
    return -1

static int eval_importance_sampling(const struct tb_loss_inputs *in, int i0, int i1,
                                    const float *lp, float *g, double *loss)
{
    EACH_POSITION(li = gi = -exp(l - q) * A;);
}

/* -min(rA, clip(r)A) and its derivative for d r / d l = r. */
static void clipped(double r, double A, double lo, double hi, double *li, double *gi)
{
    bool off = (A > 0 && r > hi) || (A < 0 && r < lo);
    double c = clip(r, lo, hi) * A;
    *li = -(off || c < r * A ? c : r * A);
    *gi = off ? 0 : -r * A;
}

static int eval_ppo(const struct tb_loss_inputs *in, int i0, int i1, const float *lp, float *g,
                    double *loss)
{
    EACH_POSITION(clipped(exp(l - q), A, lo_of(in, i), hi_of(in, i), &li, &gi););
}

static int eval_cispo(const struct tb_loss_inputs *in, int i0, int i1, const float *lp, float *g,
                      double *loss)
{
    EACH_POSITION(gi = -clip(exp(l - q), lo_of(in, i), hi_of(in, i)) * A; li = gi * l;);
}

/* With A = 0 the quadratic term is still there: no short cut. */
static int eval_dro(const struct tb_loss_inputs *in, int i0, int i1, const float *lp, float *g,
                    double *loss)
{
    for (int i = i0; i < i1; i++) {
        double l = (double)lp[i], d = l - (double)in->logprobs[i], A = (double)in->advantages[i];
        if (!store(-(l * A - 0.5 * in->beta * d * d), -A + in->beta * d, loss, &g[i])) return i;
    }
    return -1;
}

/* Token variant: every position carries the sequence's ratio s, with derivative s. */
static int eval_gspo(const struct tb_loss_inputs *in, int i0, int i1, const float *lp, float *g,
                     double *loss)
{
    double sum = 0;
    int n = 0;
    for (int i = 0; i < in->n; i++)
        if (in->mask[i] != 0) {
            sum += (double)lp[i] - (double)in->logprobs[i];
            n++;
        }
    double s = exp(sum / n);
    EACH_POSITION((void)(l - q); clipped(s, A, lo_of(in, i), hi_of(in, i), &li, &gi););
}

#define RATIO_IN (TB_IN_LOGPROBS | TB_IN_ADVANTAGES)
#define CLIP_SET (TB_SET_LO | TB_SET_HI)
#define CLIP_IN  (TB_IN_LO | TB_IN_HI)

static const struct tb_loss losses[] = {
    {.name = "cross_entropy", .two_d = true, .optional = TB_IN_WEIGHTS, .eval = eval_cross_entropy},
    {.name = "importance_sampling", .required = RATIO_IN, .eval = eval_importance_sampling},
    {.name = "ppo",
     .required = RATIO_IN,
     .optional = CLIP_IN,
     .settings = CLIP_SET,
     .lo = 0.8,
     .hi = 1.2,
     .eval = eval_ppo},
    {.name = "cispo",
     .required = RATIO_IN,
     .optional = CLIP_IN,
     .settings = CLIP_SET,
     .lo = 0.0,
     .hi = 4.0,
     .eval = eval_cispo},
    {.name = "dro", .required = RATIO_IN, .settings = TB_SET_BETA, .beta = 0.05, .eval = eval_dro},
    {.name = "gspo",
     .required = RATIO_IN | TB_IN_MASK,
     .optional = CLIP_IN,
     .settings = CLIP_SET,
     .lo = 0.8,
     .hi = 1.2,
     .whole = true,
     .eval = eval_gspo},
    {.name = "stable_reinforce", .unsupported = true},
    {.name = "custom", .custom = true, .two_d = true, .whole = true},
};

static const struct {
    unsigned bit;
    const char *key;
} setting_keys[] = {
    {TB_SET_LO, "clip_low_threshold"}, {TB_SET_HI, "clip_high_threshold"}, {TB_SET_BETA, "beta"}};

static const struct {
    unsigned bit;
    const char *key;
} input_keys[] = {
    {TB_IN_WEIGHTS, "weights"},       {TB_IN_LOGPROBS, "logprobs"},
    {TB_IN_ADVANTAGES, "advantages"}, {TB_IN_MASK, "sequence_ratio_mask"},
    {TB_IN_LO, "clip_low_threshold"}, {TB_IN_HI, "clip_high_threshold"},
};

int tb_loss_find(const char *name, const struct tb_loss **out, struct tb_error *err)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(losses); i++) {
        if (!name || strcmp(name, losses[i].name)) continue;
        if (losses[i].unsupported)
            return tb_error_set(err, TB_EUNSUPPORTED, "loss_fn %s is not supported by this server",
                                name);
        *out = &losses[i];
        return 0;
    }
    char known[256];
    size_t n = 0;
    known[0] = 0;
    for (size_t i = 0; i < TB_ARRAY_LEN(losses); i++)
        if (!losses[i].unsupported && n < sizeof(known))
            n += (size_t)snprintf(known + n, sizeof(known) - n, "%s%s", n ? ", " : "",
                                  losses[i].name);
    return tb_error_set(err, TB_EINVAL, "loss_fn %.64s is unknown; there are %s",
                        name ? name : "(none)", known);
}

/* ---- settings */

struct settings {
    double lo, hi, beta;
};

/* What the id stands for is not known here; that it is there, and nothing else, is checked. */
static int check_loss_id(const struct tb_forward_backward *fb, struct tb_error *err)
{
    if (fb->n_config == 1 && !strcmp(fb->config[0].key, "loss_id") && fb->config[0].is_text)
        return 0;
    return tb_error_set(err, TB_EINVAL, "loss_fn_config of custom must be loss_id, a text");
}

static int read_settings(const struct tb_loss *loss, const struct tb_forward_backward *fb,
                         struct settings *s, struct tb_error *err)
{
    *s = (struct settings){loss->lo, loss->hi, loss->beta};
    if (loss->custom) return check_loss_id(fb, err);
    double *const at[] = {&s->lo, &s->hi, &s->beta};
    for (int c = 0; c < fb->n_config; c++) {
        const struct tb_config_value *v = &fb->config[c];
        size_t i = 0;
        while (i < TB_ARRAY_LEN(setting_keys) &&
               (!(loss->settings & setting_keys[i].bit) || strcmp(v->key, setting_keys[i].key)))
            i++;
        if (i == TB_ARRAY_LEN(setting_keys)) {
            char allowed[128];
            size_t n = 0;
            allowed[0] = 0;
            for (size_t k = 0; k < TB_ARRAY_LEN(setting_keys); k++)
                if (loss->settings & setting_keys[k].bit)
                    n += (size_t)snprintf(allowed + n, sizeof(allowed) - n, "%s%s", n ? ", " : "",
                                          setting_keys[k].key);
            return tb_error_set(err, TB_EINVAL,
                                "loss_fn_config: %.64s is not a key of %s; allowed: %s", v->key,
                                loss->name, n ? allowed : "none");
        }
        if (v->is_text || !isfinite(v->number) || v->number < 0)
            return tb_error_set(err, TB_EINVAL,
                                "loss_fn_config: %s must be a finite number that is not negative",
                                v->key);
        *at[i] = v->number;
    }
    if ((loss->settings & CLIP_SET) && s->lo > s->hi)
        return tb_error_set(err, TB_EINVAL,
                            "loss_fn_config: clip_low_threshold %g is above clip_high_threshold %g",
                            s->lo, s->hi);
    return 0;
}

/* ---- inputs */

struct place { /* for messages */
    int datum;
    const char *key;
};

static const struct tb_tensor *find_input(const struct tb_datum *d, const char *key)
{
    for (int i = 0; i < d->n_inputs; i++)
        if (!strcmp(d->inputs[i].name, key)) return &d->inputs[i];
    return NULL;
}

static int wrong_shape(const struct tb_tensor *t, struct place w, int n, int k, bool two_d,
                       struct tb_error *err)
{
    char want[48], got[64];
    snprintf(want, sizeof(want), two_d ? "[%d, %d]" : "[%d]", n, k);
    if (t->n_dims == 2)
        snprintf(got, sizeof(got), "[%lld, %lld]", (long long)t->shape[0], (long long)t->shape[1]);
    else
        snprintf(got, sizeof(got), "[%lld]", (long long)t->n);
    return tb_error_set(err, TB_EINVAL, "datum %d: %s has shape %s, expected %s", w.datum, w.key,
                        got, want);
}

/* A float input of exactly the given shape (one_ok: a single element is spread over all positions).
 */
static int read_floats(const struct tb_datum *d, struct place w, int n, int k, bool two_d,
                       bool one_ok, struct tb_arena *arena, const float **out, struct tb_error *err)
{
    const struct tb_tensor *t = find_input(d, w.key);
    int64_t count = (int64_t)n * k;
    *out = NULL;
    if (!t) return 0;
    bool spread = one_ok && t->n == 1 && count != 1;
    bool shape_ok = two_d ? t->n_dims == 2 && t->shape[0] == n && t->shape[1] == k
                          : t->n_dims < 2 && t->n == count;
    if (!spread && (!shape_ok || t->n != count)) return wrong_shape(t, w, n, k, two_d, err);
    const float *p = t->data.f32;
    if (t->type == TB_TENSOR_I64 || spread) {
        float *c = tb_arena_try_array(arena, (size_t)count, sizeof(*c));
        if (!c) return tb_error_set(err, TB_ENOMEM, "no memory for datum %d", w.datum);
        for (int64_t i = 0; i < count; i++) {
            int64_t from = spread ? 0 : i;
            c[i] = t->type == TB_TENSOR_I64 ? (float)t->data.i64[from] : t->data.f32[from];
        }
        p = c;
    }
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(p[i]))
            return tb_error_set(err, TB_ENONFINITE, "datum %d: %s is not finite at position %lld",
                                w.datum, w.key, (long long)(i / k));
    *out = p;
    return 0;
}

static int read_targets(const struct tb_loss *loss, const struct tb_datum *d, int at, int vocab,
                        struct tb_arena *arena, struct tb_loss_inputs *in, struct tb_error *err)
{
    struct place w = {at, "target_tokens"};
    const struct tb_tensor *t = find_input(d, w.key);
    if (!t)
        return tb_error_set(err, TB_EINVAL, "datum %d: loss_fn_inputs has no target_tokens", at);
    if (t->type != TB_TENSOR_I64)
        return tb_error_set(err, TB_EINVAL, "datum %d: target_tokens must be int64", at);
    in->n = d->n_tokens;
    in->two_d = t->n_dims == 2;
    in->k = 1;
    if (in->two_d) {
        if (!loss->two_d)
            return tb_error_set(err, TB_EINVAL,
                                "datum %d: target_tokens has two dimensions; %s takes one", at,
                                loss->name);
        if (t->shape[1] < 1 || t->shape[1] > TB_MAX_TARGETS_K)
            return tb_error_set(
                err, TB_EINVAL,
                "datum %d: target_tokens has %lld targets a position; 1 to %d are allowed", at,
                (long long)t->shape[1], TB_MAX_TARGETS_K);
        in->k = (int)t->shape[1];
    }
    int64_t count = (int64_t)in->n * in->k;
    if (t->n != count || (in->two_d && t->shape[0] != in->n))
        return wrong_shape(t, w, in->n, in->k, in->two_d, err);
    int32_t *ids = tb_arena_try_array(arena, (size_t)count, sizeof(*ids));
    if (!ids) return tb_error_set(err, TB_ENOMEM, "no memory for datum %d", at);
    for (int64_t i = 0; i < count; i++) {
        int64_t id = t->data.i64[i];
        if (id < 0 || id >= vocab)
            return tb_error_set(
                err, TB_EINVAL,
                "datum %d: target_tokens at position %lld is %lld; token ids are from 0 to "
                "%d",
                at, (long long)(i / in->k), (long long)id, vocab - 1);
        ids[i] = (int32_t)id;
    }
    in->targets = ids;
    return 0;
}

static int check_tokens(const struct tb_datum *d, int at, int vocab, int max_context,
                        struct tb_error *err)
{
    if (d->n_tokens < 1) return tb_error_set(err, TB_EINVAL, "datum %d: model_input is empty", at);
    if (d->n_tokens > max_context)
        return tb_error_set(err, TB_EINVAL,
                            "datum %d: model_input has %d tokens; the model's context window is %d",
                            at, d->n_tokens, max_context);
    for (int i = 0; i < d->n_tokens; i++)
        if (d->tokens[i] < 0 || d->tokens[i] >= vocab)
            return tb_error_set(
                err, TB_EINVAL,
                "datum %d: model_input at position %d is %d; token ids are from 0 to %d", at, i,
                d->tokens[i], vocab - 1);
    return 0;
}

static int check_thresholds(const struct tb_loss_inputs *in, int at, struct tb_error *err)
{
    for (int i = 0; i < in->n && (in->lo_at || in->hi_at); i++)
        if (lo_of(in, i) < 0 || lo_of(in, i) > hi_of(in, i))
            return tb_error_set(
                err, TB_EINVAL,
                "datum %d: clip thresholds %g and %g at position %d are not in order", at,
                lo_of(in, i), hi_of(in, i), i);
    return 0;
}

static int read_datum(const struct tb_loss *loss, const struct tb_datum *d, int at, int vocab,
                      int max_context, struct tb_arena *arena, struct tb_loss_inputs *in,
                      struct tb_error *err)
{
    int rc = check_tokens(d, at, vocab, max_context, err);
    if (!rc) rc = read_targets(loss, d, at, vocab, arena, in, err);
    const float **const to[] = {&in->weights, &in->logprobs, &in->advantages,
                                &in->mask,    &in->lo_at,    &in->hi_at};
    for (size_t i = 0; i < TB_ARRAY_LEN(input_keys) && !rc; i++) {
        unsigned bit = input_keys[i].bit;
        struct place w = {at, input_keys[i].key};
        if (!((loss->required | loss->optional) & bit)) continue;
        rc = read_floats(d, w, in->n, in->k, in->two_d, (bit & CLIP_IN) != 0, arena, to[i], err);
        if (!rc && (loss->required & bit) && !*to[i])
            rc = tb_error_set(err, TB_EINVAL, "datum %d: loss_fn_inputs has no %s, which %s needs",
                              at, w.key, loss->name);
    }
    if (!rc) rc = check_thresholds(in, at, err);
    if (!rc && in->mask) {
        bool any = false;
        for (int i = 0; i < in->n; i++)
            any |= in->mask[i] != 0;
        if (!any)
            rc = tb_error_set(err, TB_EINVAL, "datum %d: sequence_ratio_mask is zero everywhere",
                              at);
    }
    return rc;
}

int tb_loss_prepare(const struct tb_loss *loss, const struct tb_forward_backward *fb, int vocab,
                    int max_context, struct tb_arena *arena, struct tb_loss_inputs *out,
                    struct tb_error *err)
{
    struct settings s;
    int rc = read_settings(loss, fb, &s, err);
    if (rc) return rc;
    if (fb->n_data < 1) return tb_error_set(err, TB_EINVAL, "data is empty");
    for (int i = 0; i < fb->n_data && !rc; i++) {
        out[i] = (struct tb_loss_inputs){.lo = s.lo, .hi = s.hi, .beta = s.beta};
        rc = read_datum(loss, &fb->data[i], i, vocab, max_context, arena, &out[i], err);
    }
    return rc;
}
