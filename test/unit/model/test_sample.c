/* Sampling: equality with training to the bit, seeds, stops, pages, validation. */
#include "helper.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/sampling.h"
#include "util/mem.h"

static void same_sequences(const struct tb_op *x, const struct tb_op *y)
{
    assert_int_equal(x->result.n_sequences, y->result.n_sequences);
    for (int i = 0; i < x->result.n_sequences; i++) {
        const struct tb_sequence *a = &x->result.sequences[i], *b = &y->result.sequences[i];
        assert_int_equal(a->n, b->n);
        assert_int_equal(a->stopped, b->stopped);
        assert_memory_equal(a->tokens, b->tokens, (size_t)a->n * 4);
        assert_memory_equal(a->logprobs, b->logprobs, (size_t)a->n * 4);
        size_t cells = (size_t)a->n * (size_t)x->u.sample.topk_sample_logprobs;
        if (cells == 0) continue;
        assert_memory_equal(a->topk_ids, b->topk_ids, cells * 4);
        assert_memory_equal(a->topk_logprobs, b->topk_logprobs, cells * 4);
    }
}

/* Sampled in company, prefilled in odd chunks; forward() of prompt + sample gives the same bits. */
static void agreement(struct tb_backend *be, const struct shape *s)
{
    struct tb_model *m = open_model(be, s, NULL);
    enum { N = 5, GEN = 90 };
    static const int lens[N] = {37, 1, 90, 16, 3};
    struct tb_adapter *as[N] = {NULL};
    struct tb_adapter_version *vs[N] = {NULL}; /* the last is the base model */
    for (int i = 0; i < N - 1; i++) {
        as[i] = random_adapter(m, 3 + 3 * i, (uint64_t)i, 0.1f);
        CHECK_OK(tb_adapter_publish(as[i], &vs[i], &check_err));
    }
    struct tb_op *ops[N], *again[N];
    int32_t prompt[N][100];
    for (int i = 0; i < N; i++) {
        random_tokens(prompt[i], lens[i], s->vocab, 100 + (uint64_t)i);
        for (int k = 0; k < 2; k++) {
            struct tb_op *op = op_sample(prompt[i], lens[i], GEN, 7);
            op->u.sample.n_samples = i == 0 ? 3 : 1;
            op->u.sample.prompt_logprobs = true;
            *(k ? &again[i] : &ops[i]) = op;
        }
    }
    run_samples(m, vs, ops, N, 23);
    run_samples(m, vs, again, N, 1000); /* all prompts in one step */
    for (int i = 0; i < N; i++) {
        same_sequences(ops[i], again[i]);
        tb_op_destroy(again[i]);
    }
    int different = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < ops[i]->result.n_sequences; j++) {
            const struct tb_sequence *q = &ops[i]->result.sequences[j];
            int32_t all[200];
            assert_int_equal(q->n, GEN);
            assert_false(q->stopped);
            memcpy(all, prompt[i], (size_t)lens[i] * 4);
            memcpy(all + lens[i], q->tokens, GEN * 4);
            struct tb_op *f = op_cross_entropy(all, lens[i] + GEN, false);
            struct tb_adapter *zero = NULL;
            if (!vs[i]) { /* the base model: a fresh adapter adds nothing */
                struct tb_lora_config c = {1, 32, true, 1, true, true, true};
                CHECK_OK(tb_adapter_create(&zero, m, &c, &check_err));
            }
            run_train(m, zero ? zero : as[i], f);
            const float *lp = f->result.outputs[0].logprobs;
            assert_memory_equal(lp + lens[i] - 1, q->logprobs, GEN * 4);
            assert_memory_equal(lp, ops[i]->result.prompt_logprobs + 1, (size_t)(lens[i] - 1) * 4);
            tb_op_destroy(f);
            tb_adapter_free(zero);
            different +=
                j > 0 && memcmp(q->tokens, ops[i]->result.sequences[0].tokens, GEN * 4) != 0;
        }
    assert_int_equal(different, 2); /* samples of one prompt have streams of their own */
    for (int i = 0; i < N; i++) {
        tb_op_destroy(ops[i]);
        tb_version_unref(vs[i]);
        tb_adapter_free(as[i]);
    }
    tb_model_free(m);
}

static void test_agreement(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        agreement(backend_f32(), &shapes[k]);
        if (backend_bf16()) agreement(backend_bf16(), &shapes[k]);
    }
}

static struct tb_op *filtered(const int32_t *prompt, int n, int max, uint64_t seed, int n_samples)
{
    struct tb_op *op = op_sample(prompt, n, max, seed);
    op->u.sample.temperature = 0.8f;
    op->u.sample.top_k = 20;
    op->u.sample.top_p = 0.9f;
    op->u.sample.n_samples = n_samples;
    op->u.sample.topk_sample_logprobs = 3;
    return op;
}

/* The same request gives the same samples alone, under load and when pages run out. */
static void test_seeds_and_preemption(void **state)
{
    (void)state;
    struct tb_backend *bes[2] = {backend_f32(), backend_bf16()};
    for (int t = 0; t < 2 && bes[t]; t++) {
        const struct shape *s = &shapes[0];
        struct tb_model *big = open_model(bes[t], s, NULL);
        size_t page = big->kv.bytes / (size_t)big->kv.n_pages;
        /* 13 pages are what the longest sequence needs; five requests want about sixty. */
        struct tb_model_options o = {.kv_bytes = 13 * page + page / 2};
        struct tb_model *tight = open_model(bes[t], s, &o);
        assert_int_equal(tight->kv.n_pages, 13);
        enum { N = 5 };
        struct tb_op *alone[N], *load[N], *pressed[N];
        for (int i = 0; i < N; i++) {
            int32_t prompt[100];
            int n = 5 + 20 * i, max = i == 4 ? 115 : 40;
            random_tokens(prompt, n, s->vocab, 300 + (uint64_t)i);
            alone[i] = filtered(prompt, n, max, 9 + (uint64_t)i, 3);
            load[i] = filtered(prompt, n, max, 9 + (uint64_t)i, 3);
            pressed[i] = filtered(prompt, n, max, 9 + (uint64_t)i, 3);
            run_samples(big, NULL, &alone[i], 1, 1000);
        }
        run_samples(big, NULL, load, N, 11);
        run_samples(tight, NULL, pressed, N, 50);
        assert_true(big->kv.n_preempted == 0 && tight->kv.n_preempted > 0);
        for (int i = 0; i < N; i++) {
            same_sequences(alone[i], load[i]);
            same_sequences(alone[i], pressed[i]);
            const struct tb_sequence *q = &alone[i]->result.sequences[1];
            for (int j = 0; j < q->n;
                 j++) { /* raw logprobs: the sampled one is among or below the top */
                assert_true(q->topk_logprobs[j * 3] >= q->topk_logprobs[j * 3 + 1]);
                for (int k = 0; k < 3; k++)
                    if (q->topk_ids[j * 3 + k] == q->tokens[j])
                        assert_true(q->topk_logprobs[j * 3 + k] == q->logprobs[j]);
                assert_true(q->logprobs[j] <= q->topk_logprobs[j * 3]);
            }
        }
        /* Another seed, another text. */
        int32_t prompt[5];
        random_tokens(prompt, 5, s->vocab, 300);
        struct tb_op *x = filtered(prompt, 5, 40, 1234567, 1);
        run_samples(big, NULL, &x, 1, 1000);
        assert_memory_not_equal(x->result.sequences[0].tokens, alone[0]->result.sequences[0].tokens,
                                160);
        tb_op_destroy(x);
        for (int i = 0; i < N; i++) {
            tb_op_destroy(alone[i]);
            tb_op_destroy(load[i]);
            tb_op_destroy(pressed[i]);
        }
        tb_model_free(big);
        tb_model_free(tight);
    }
}

static struct tb_op *changed(const struct shape *s, int i)
{
    int32_t prompt[30];
    int n = 3 + 2 * i;
    random_tokens(prompt, n, s->vocab, 70 + (uint64_t)i);
    struct tb_op *op = filtered(prompt, n, 12, 5 + (uint64_t)i, i % 5 ? 1 : 3);
    struct tb_sample *q = &op->u.sample;
    q->topk_sample_logprobs = i % 4 * 2;
    q->topk_prompt_logprobs = i % 3;
    if (i % 3 != 1) q->repetition_penalty = 1.3f;
    if (i % 6 == 2) q->presence_penalty = 0.7f;
    return op;
}

/* Samples that draw from changed rows beside others that do not, with lists of different length of
 * the best tokens: each as alone, whatever the blocks of logits hold beside them. */
static void test_changed_rows(void **state)
{
    (void)state;
    enum { N = 12 };
    const struct shape *s = &shapes[0];
    const size_t row = (size_t)s->vocab * 4;
    const struct tb_model_options o[3] = {{0}, {.logits_bytes = 5 * row}, {.logits_bytes = row}};
    struct tb_op *alone[N], *load[N];
    for (int k = 0; k < 3; k++) {
        struct tb_model *m = open_model(backend_f32(), s, &o[k]);
        for (int i = 0; i < N; i++) {
            load[i] = changed(s, i);
            if (k) continue;
            alone[i] = changed(s, i);
            run_samples(m, NULL, &alone[i], 1, 1000);
        }
        run_samples(m, NULL, load, N, 40);
        for (int i = 0; i < N; i++) {
            size_t cells = (size_t)(3 + 2 * i) * (size_t)(i % 3);
            const struct tb_result *x = &alone[i]->result, *y = &load[i]->result;
            same_sequences(alone[i], load[i]);
            if (cells) {
                assert_memory_equal(x->topk_prompt_ids, y->topk_prompt_ids, cells * 4);
                assert_memory_equal(x->topk_prompt_logprobs, y->topk_prompt_logprobs, cells * 4);
            }
            tb_op_destroy(load[i]);
        }
        tb_model_free(m);
    }
    for (int i = 0; i < N; i++)
        tb_op_destroy(alone[i]);
}

/* The draws follow the filtered distribution: top_k 1 and T 0 are greedy, top_k 2 draws from two.
 */
static void test_filters(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int32_t prompt[6];
    random_tokens(prompt, 6, 61, 1);
    struct tb_op *op[3];
    for (int i = 0; i < 3; i++) {
        op[i] = op_sample(prompt, 6, i == 2 ? 1 : 20, 5);
        op[i]->u.sample.topk_sample_logprobs = 2;
    }
    op[0]->u.sample.temperature = 0;
    op[1]->u.sample.top_k = 1;
    op[2]->u.sample.top_k = 2;
    op[2]->u.sample.n_samples = 400;
    run_samples(m, NULL, op, 3, 100);
    same_sequences(op[0], op[1]);
    int first = 0;
    const struct tb_sequence *q = op[2]->result.sequences;
    for (int i = 0; i < 400; i++) {
        assert_true(q[i].tokens[0] == q[i].topk_ids[0] || q[i].tokens[0] == q[i].topk_ids[1]);
        first += q[i].tokens[0] == q[i].topk_ids[0];
    }
    double p0 = exp((double)q[0].topk_logprobs[0]), p1 = exp((double)q[0].topk_logprobs[1]);
    double p = p0 / (p0 + p1), sd = sqrt(p * (1 - p) * 400);
    assert_true(fabs(first - 400 * p) < 5 * sd);
    for (int i = 0; i < 3; i++)
        tb_op_destroy(op[i]);
    tb_model_free(m);
}

/* ---- stops, with the oracle's tokenizer */

static struct tb_op *greedy(const int32_t *prompt, int n, int max)
{
    struct tb_op *op = op_sample(prompt, n, max, 1);
    op->u.sample.temperature = 0;
    return op;
}

static void test_stops(void **state)
{
    (void)state;
    struct tb_model *m = load_oracle(backend_f32(), "qwen3");
    const struct tb_model_info *info = tb_model_info(m);
    assert_int_equal(info->n_eos, 2);
    assert_int_equal(info->eos[0], 317);
    assert_int_equal(info->eos[1], 315);
    assert_non_null(info->tokenizer);
    /* Greedy on from this prompt: 116 277 46 315 114 315 114 ... */
    static const int32_t prompt[6] = {314, 220, 80, 84, 280, 74}, stop114[] = {9999, 114};
    static const char *strings[] = {"zzz", "O"}; /* 46 is "O" */
    static const char *across[] = {"deO"};       /* 277 and 46 */
    static const char *eos_text[] = {"<|endoftext|>"};
    const struct {
        bool given;
        int n_ids, n_strings, max;
        const char *const *s;
        int n;
        bool stopped;
    } cases[] = {
        {false, 0, 0, 24, NULL, 4, true},    /* no stop: EOS stops and is kept */
        {true, 0, 0, 24, NULL, 24, false},   /* stop = []: nothing does */
        {true, 2, 0, 24, NULL, 4, true},     /* EOS still stops */
        {true, 0, 2, 24, strings, 3, true},  /* a string, kept */
        {true, 0, 1, 24, across, 3, true},   /* over two tokens */
        {true, 2, 2, 24, strings, 3, true},  /* mixed lists */
        {false, 0, 0, 4, NULL, 4, true},     /* limit and stop on one token: stop */
        {true, 0, 2, 3, strings, 3, true},   /* the same with a string */
        {true, 0, 1, 24, eos_text, 4, true}, /* special tokens are rendered */
        {false, 0, 0, 3, NULL, 3, false},    /* limit before the stop */
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_op *op = greedy(prompt, 6, cases[i].max);
        op->u.sample.stop_given = cases[i].given;
        op->u.sample.stop_tokens = stop114;
        op->u.sample.n_stop_tokens = cases[i].n_ids;
        op->u.sample.stop_strings = cases[i].s;
        op->u.sample.n_stop_strings = cases[i].n_strings;
        run_samples(m, NULL, &op, 1, 100);
        const struct tb_sequence *q = op->result.sequences;
        if (q->n != cases[i].n || q->stopped != cases[i].stopped)
            fail_msg("case %zu: %d tokens, stopped %d", i, q->n, q->stopped);
        tb_op_destroy(op);
    }
    tb_model_free(m);
}

/* ---- what a prompt can be asked for */

static void test_prompt_outputs(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int32_t prompt[30];
    random_tokens(prompt, 30, 61, 1);
    enum { P = 30, K = 5, ALT = 4 };
    struct tb_op *full = op_sample(prompt, P, 3, 1), *op = op_sample(prompt, P, 3, 1);
    full->u.sample.prompt_logprobs = op->u.sample.prompt_logprobs = true;
    op->u.sample.n_samples = 2; /* the prompt's end is shared */
    op->u.sample.prompt_logprobs_last_n = 4;
    op->u.sample.topk_prompt_logprobs = 70; /* more than the vocabulary */
    op->u.sample.prompt_alt_tokens_k = ALT;
    int64_t t[(P - 1) * K];
    for (int i = 0; i < (P - 1) * K; i++)
        t[i] = i % 7 == 0 ? -1 : i % 61;
    op->u.sample.has_target_prompt_logprobs = true;
    op->u.sample.target_prompt_logprobs = (struct tb_tensor){
        .type = TB_TENSOR_I64, .n_dims = 2, .shape = {P - 1, K}, .n = (P - 1) * K, .data.i64 = t};
    run_samples(m, NULL, &full, 1, 7);
    run_samples(m, NULL, &op, 1, 7);
    const struct tb_result *r = &op->result;
    float table[61];
    for (int i = 0; i < P; i++) {
        assert_true(i < P - 4 ? isnan(r->prompt_logprobs[i])
                              : r->prompt_logprobs[i] == full->result.prompt_logprobs[i]);
        const int32_t *ids = r->topk_prompt_ids + i * 70;
        const float *lps = r->topk_prompt_logprobs + i * 70;
        for (int j = i ? 61 : 0; j < 70; j++)
            assert_true(ids[j] == 0 && lps[j] == -99999.0f);
        if (i == 0) continue;
        double sum = 0;
        for (int j = 0; j < 61; j++) {
            sum += exp((double)lps[j]);
            assert_true(j == 0 || lps[j] <= lps[j - 1]);
            table[ids[j]] = lps[j];
        }
        assert_true(fabs(sum - 1) < 1e-5);
        assert_true(table[prompt[i]] == full->result.prompt_logprobs[i]);
        for (int j = 0; j < K; j++) {
            int64_t id = t[(i - 1) * K + j];
            assert_true(r->target_prompt_logprobs[(i - 1) * K + j] == (id < 0 ? 0 : table[id]));
        }
        for (int j = 0; j < ALT; j++)
            assert_true(r->alt_logprobs[(i - 1) * ALT + j] ==
                        table[r->alt_tokens[(i - 1) * ALT + j]]);
    }
    int different = 0;
    for (int i = 0; i < (P - 1) * ALT; i += ALT)
        different += r->alt_tokens[i] != r->alt_tokens[i + 1];
    assert_true(different > 5);
    tb_op_destroy(full);
    tb_op_destroy(op);
    tb_model_free(m);
}

/* ---- validation and room */

static void test_validation(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL); /* no tokenizer */
    int32_t prompt[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    static const char *strings[] = {""};
    static const char *text[] = {"x"};
    static const struct {
        const char *what, *msg;
        int code;
    } cases[] = {
        {"empty", "prompt is empty", TB_EINVAL},
        {"token", "prompt at position 3 is 61; token ids are from 0 to 60", TB_EINVAL},
        {"token<0", "prompt at position 3 is -5", TB_EINVAL},
        {"T", "temperature is -0.5", TB_EINVAL},
        {"T nan", "temperature is", TB_EINVAL},
        {"top_p 0", "top_p is 0; it must be above 0 and at most 1", TB_EINVAL},
        {"top_p 1.1", "top_p is 1.1", TB_EINVAL},
        {"top_k 0", "top_k is 0; it must be -1 (off) or at least 1", TB_EINVAL},
        {"top_k -2", "top_k is -2", TB_EINVAL},
        {"max 0", "max_tokens is 0; it must be at least 1", TB_EINVAL},
        {"max -2", "max_tokens is -2", TB_EINVAL},
        {"n 0", "num_samples is 0; it must be from 1 to", TB_EINVAL},
        {"context",
         "Prompt length plus max_tokens exceeds the model's context window: 10 + 191 > 200",
         TB_EINVAL},
        {"last_n", "prompt_logprobs_last_n is 10; it must be from 1 to 9", TB_EINVAL},
        {"last_n alone", "prompt_logprobs_last_n needs prompt_logprobs", TB_EINVAL},
        {"topk", "topk_prompt_logprobs is -1", TB_EINVAL},
        {"targets", "target_prompt_logprobs must be int64 of shape [9, K]", TB_EINVAL},
        {"min_p", "min_p is 1.5; it must be from 0 to 1", TB_EINVAL},
        {"bias token", "logit_bias names token 61; ids are from 0 to 60", TB_EINVAL},
        {"bias nan", "logit_bias of token 60 is", TB_EINVAL},
        {"many biases", "logit_bias has 1025 tokens; at most 1024 are allowed", TB_EINVAL},
        {"presence", "presence_penalty is inf; it must be finite", TB_EINVAL},
        {"repetition", "repetition_penalty is -1; it must be above 0", TB_EINVAL},
        {"window", "repetition_last_n is -1; it must not be negative", TB_EINVAL},
        {"stop", "", TB_EINVAL},
        {"stop text", "", TB_EINVAL}, /* there is no tokenizer */
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        const char *w = cases[i].what;
        struct tb_op *op = op_sample(prompt, 10, 5, 1);
        struct tb_sample *s = &op->u.sample;
        if (!strcmp(w, "empty")) s->n_prompt = 0;
        if (!strcmp(w, "token")) ((int32_t *)(uintptr_t)s->prompt)[3] = 61;
        if (!strcmp(w, "token<0")) ((int32_t *)(uintptr_t)s->prompt)[3] = -5;
        if (!strcmp(w, "T")) s->temperature = -0.5f;
        if (!strcmp(w, "T nan")) s->temperature = NAN;
        if (!strcmp(w, "top_p 0")) s->top_p = 0;
        if (!strcmp(w, "top_p 1.1")) s->top_p = 1.1f;
        if (!strcmp(w, "top_k 0")) s->top_k = 0;
        if (!strcmp(w, "top_k -2")) s->top_k = -2;
        if (!strcmp(w, "max 0")) s->max_tokens = 0;
        if (!strcmp(w, "max -2")) s->max_tokens = -2;
        if (!strcmp(w, "n 0")) s->n_samples = 0;
        if (!strcmp(w, "context")) s->max_tokens = 191;
        if (!strncmp(w, "last_n", 6)) s->prompt_logprobs_last_n = 10;
        if (!strcmp(w, "last_n")) s->prompt_logprobs = true;
        if (!strcmp(w, "topk")) s->topk_prompt_logprobs = -1;
        if (!strcmp(w, "targets")) s->has_target_prompt_logprobs = true;
        int32_t bias_token = !strcmp(w, "bias token") ? 61 : 60;
        float bias = !strcmp(w, "bias nan") ? NAN : 1;
        if (!strncmp(w, "bias", 4)) s->n_logit_bias = 1;
        if (!strcmp(w, "many biases")) s->n_logit_bias = 1025;
        s->logit_bias_tokens = &bias_token;
        s->logit_bias = &bias;
        if (!strcmp(w, "min_p")) s->min_p = 1.5f;
        if (!strcmp(w, "presence")) s->presence_penalty = INFINITY;
        if (!strcmp(w, "repetition")) s->repetition_penalty = -1;
        if (!strcmp(w, "window")) s->repetition_last_n = -1;
        if (!strncmp(w, "stop", 4)) {
            s->n_stop_strings = 1;
            s->stop_strings = !strcmp(w, "stop") ? strings : text;
        }
        struct tb_sampling *out = NULL;
        int rc = tb_sampling_create(&out, m, NULL, op);
        if (rc != cases[i].code || op->error.code != rc || !strstr(op->error.msg, cases[i].msg))
            fail_msg("%s: %d %s", w, rc, op->error.msg);
        assert_null(out);
        tb_op_destroy(op);
    }
    assert_true(tb_list_empty(&m->samplings));
    tb_model_free(m);
}

static void test_room(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    size_t page = m->kv.bytes / (size_t)m->kv.n_pages;
    struct tb_model_options o = {.kv_bytes = 4 * page};
    struct tb_model *small = open_model(backend_f32(), &shapes[0], &o);
    int32_t prompt[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    struct tb_op *fits = op_sample(prompt, 10, 55, 1), *over = op_sample(prompt, 10, 56, 1);
    struct tb_op *fill = op_sample(prompt, 10, -1, 1), *fill_small = op_sample(prompt, 10, -1, 1);
    struct tb_sampling *s = NULL;
    assert_int_equal(tb_sampling_create(&s, small, NULL, over), TB_ENOMEM);
    assert_non_null(strstr(over->error.msg, "65 tokens need 5 KV pages"));
    run_samples(small, NULL, &fits, 1, 100);
    assert_int_equal(fits->result.sequences[0].n, 55);
    run_samples(m, NULL, &fill, 1, 100); /* to the context's end */
    assert_int_equal(fill->result.sequences[0].n, 190);
    run_samples(small, NULL, &fill_small, 1, 100); /* to the pool's end */
    assert_int_equal(fill_small->result.sequences[0].n, 55);
    /* Destroyed midway, a sampling gives everything back; a budget of zero rows prefills nothing.
     */
    struct tb_op *half = op_sample(prompt, 10, 55, 1);
    CHECK_OK((half->u.sample.n_samples = 3, tb_sampling_create(&s, small, NULL, half)));
    int rows;
    CHECK_OK(tb_model_sample_step(small, &s, 1, 0, &rows, &check_err));
    assert_int_equal(rows, 0);
    for (int i = 0; i < 4; i++) {
        CHECK_OK(tb_model_sample_step(small, &s, 1, 10, &rows, &check_err));
        assert_int_equal(rows, i == 0 ? 10 : 3);
    }
    assert_false(tb_sampling_done(s));
    assert_true(tb_kv_room(&small->kv) < 4);
    tb_sampling_destroy(s);
    assert_int_equal(tb_kv_room(&small->kv), 4);
    struct tb_op *all[] = {fits, over, fill, fill_small, half};
    for (size_t i = 0; i < TB_ARRAY_LEN(all); i++)
        tb_op_destroy(all[i]);
    tb_model_free(m);
    tb_model_free(small);
}

/* Every allocation in turn fails: the op fails with a word about memory, or comes out right. */
static void test_out_of_memory(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int32_t prompt[20];
    random_tokens(prompt, 20, 61, 1);
    struct tb_op *want = filtered(prompt, 20, 6, 1, 2);
    want->u.sample.prompt_logprobs = true;
    run_samples(m, NULL, &want, 1, 8);
    int failed = 0;
    for (long n = 1; n < 400; n++) {
        struct tb_op *op = filtered(prompt, 20, 6, 1, 2);
        op->u.sample.prompt_logprobs = true;
        struct tb_sampling *s = NULL;
        tb_mem_fail_after(n);
        int rc = tb_sampling_create(&s, m, NULL, op);
        for (int i = 0; !rc && i < 100 && !tb_sampling_done(s); i++) {
            int rows;
            struct tb_error err;
            rc = tb_model_sample_step(m, &s, 1, 8, &rows, &err);
        }
        tb_mem_fail_after(0);
        if (op->error.code) {
            assert_int_equal(op->error.code, TB_ENOMEM);
            failed++;
        } else {
            assert_true(tb_sampling_done(s));
            same_sequences(want, op);
        }
        tb_sampling_destroy(s);
        tb_op_destroy(op);
        assert_int_equal(tb_kv_room(&m->kv), m->kv.n_pages);
    }
    assert_true(failed > 20 && failed < 399);
    tb_op_destroy(want);
    tb_model_free(m);
}

static int teardown(void **state)
{
    (void)state;
    backends_fini();
    return 0;
}

/* A filter that allows the three tokens (state + 1) * 5 + {0, 1, 2}, ends after `end` tokens and
 * may end after one. */
struct steps {
    struct tb_token_filter f;
    uint64_t mask[8];
    uint64_t end;
    int *destroyed;
    bool nothing, no_memory;
};

static const uint64_t *steps_mask(struct tb_token_filter *f, uint64_t state, int32_t left,
                                  bool *may_end)
{
    struct steps *s = (struct steps *)f;
    assert_int_equal(left, 20 - (int)state);
    *may_end = state > 0;
    memset(s->mask, 0, sizeof(s->mask));
    for (uint64_t id = (state + 1) * 5; !s->nothing && id < (state + 1) * 5 + 3; id++)
        s->mask[id / 64] |= (uint64_t)1 << id % 64;
    *may_end &= !s->nothing;
    return s->no_memory ? NULL : s->mask;
}

static uint64_t steps_accept(struct tb_token_filter *f, uint64_t state, int32_t token, bool *over)
{
    uint64_t first = (state + 1) * 5;
    assert_in_range(token, first, first + 2);
    *over = state + 1 == ((struct steps *)f)->end;
    return state + 1;
}

static void steps_destroy(struct tb_token_filter *f)
{
    ++*((struct steps *)f)->destroyed;
    tb_free(f);
}

static struct steps *put_steps(struct tb_op *op, uint64_t end, int *destroyed)
{
    struct steps *s = tb_calloc(1, sizeof(*s));
    s->f = (struct tb_token_filter){0, steps_mask, steps_accept, steps_destroy};
    s->end = end;
    s->destroyed = destroyed;
    op->u.sample.filter = &s->f;
    op->u.sample.max_tokens = 20;
    return s;
}

static void run_failing(struct tb_model *m, struct tb_op *op, int code)
{
    struct tb_sampling *s;
    struct tb_error err;
    int rows;
    assert_int_equal(tb_sampling_create(&s, m, NULL, op), 0);
    for (int i = 0; i < 10 && !tb_sampling_done(s); i++)
        assert_int_equal(tb_model_sample_step(m, &s, 1, 100, &rows, &err), 0);
    assert_true(tb_sampling_done(s));
    assert_int_equal(op->error.code, code);
    tb_sampling_destroy(s);
    tb_op_destroy(op);
}

static void test_token_filter(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int32_t prompt[30];
    int destroyed = 0, freed = 0;
    random_tokens(prompt, 30, shapes[0].vocab, 1);
    for (int n = 1; n <= 4; n += 3) {
        struct tb_op *op = op_sample(prompt, 30, 20, 3);
        op->u.sample.n_samples = n;
        put_steps(op, 9, &freed);
        run_samples(m, NULL, &op, 1, 100);
        for (int i = 0; i < n; i++) {
            const struct tb_sequence *q = &op->result.sequences[i];
            assert_true(q->stopped && q->n == 9); /* nothing ends it: stop is given and empty */
        }
        /* Logprobs are those of all tokens: equal to forward's. */
        int32_t all[64];
        memcpy(all, prompt, sizeof(prompt));
        memcpy(all + 30, op->result.sequences[n - 1].tokens, 9 * 4);
        struct tb_lora_config c = {1, 32, true, 1, true, true, true};
        struct tb_adapter *zero;
        CHECK_OK(tb_adapter_create(&zero, m, &c, &check_err));
        struct tb_op *f = op_cross_entropy(all, 39, false);
        run_train(m, zero, f);
        assert_memory_equal(f->result.outputs[0].logprobs + 29,
                            op->result.sequences[n - 1].logprobs, 9 * 4);
        tb_op_destroy(f);
        tb_adapter_free(zero);
        tb_op_destroy(op);
        assert_int_equal(freed, ++destroyed);
    }
    /* Where the text may end, the model's end tokens come too. */
    struct tb_op *op = op_sample(prompt, 30, 20, 3);
    int32_t bias_token = 3;
    float bias = 100;
    m->eos[0] = 3;
    m->info.n_eos = 1;
    op->u.sample.stop_given = false;
    op->u.sample.n_logit_bias = 1;
    op->u.sample.logit_bias_tokens = &bias_token;
    op->u.sample.logit_bias = &bias;
    put_steps(op, 9, &freed);
    run_samples(m, NULL, &op, 1, 100);
    assert_int_equal(op->result.sequences[0].n, 2);
    assert_true(op->result.sequences[0].stopped);
    assert_int_equal(op->result.sequences[0].tokens[1], 3);
    tb_op_destroy(op);
    op = op_sample(prompt, 30, 20, 3);
    put_steps(op, 9, &freed)->nothing = true;
    run_failing(m, op, TB_EINVAL);
    op = op_sample(prompt, 30, 20, 3);
    op->u.sample.n_samples = 3;
    put_steps(op, 9, &freed)->no_memory = true;
    run_failing(m, op, TB_ENOMEM);
    assert_int_equal(freed, 5);
    assert_int_equal(tb_kv_room(&m->kv), m->kv.n_pages);
    tb_model_free(m);
}

/* Each penalty against its formula, over the logprobs of a greedy sample's own rows: greedy takes
 * the largest changed logit, and logits and logprobs differ by one number in a row. */
static void test_penalties(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int V = shapes[0].vocab, n_changed = 0;
    int32_t prompt[30];
    random_tokens(prompt, 30, V, 1);
    int32_t bias_ids[2] = {prompt[3], 5};
    float bias[2] = {0.7f, 1.5f};
    for (int kind = 0; kind < 3; kind++) {
        struct tb_op *op = op_sample(prompt, 30, 40, 3);
        struct tb_sample *r = &op->u.sample;
        r->temperature = 0;
        r->topk_sample_logprobs = TB_MIN(V, 1024);
        int k = r->topk_sample_logprobs;
        if (kind == 0) {
            r->presence_penalty = 0.5f;
            r->frequency_penalty = 0.25f;
        } else if (kind == 1) {
            r->n_logit_bias = 2;
            r->logit_bias_tokens = bias_ids;
            r->logit_bias = bias;
            r->frequency_penalty = -0.125f;
        } else {
            r->min_p = 0.999f; /* with this the likeliest alone, so as greedy as T = 0 */
            r->temperature = 1;
            r->presence_penalty = 2;
        }
        run_samples(m, NULL, &op, 1, 100);
        const struct tb_sequence *q = &op->result.sequences[0];
        for (int at = 0; at < q->n; at++) {
            int32_t best = -1;
            float top = -INFINITY;
            for (int j = 0; j < k; j++) {
                int32_t id = q->topk_ids[at * k + j];
                float z = q->topk_logprobs[at * k + j], times = 0;
                for (int i = 0; i < at; i++)
                    times += q->tokens[i] == id;
                for (int i = 0; i < r->n_logit_bias; i++)
                    z += bias_ids[i] == id ? bias[i] : 0;
                if (times > 0) z -= r->presence_penalty + r->frequency_penalty * times;
                if (z > top) {
                    top = z;
                    best = id;
                }
            }
            assert_int_equal(q->tokens[at], best);
            n_changed += best != q->topk_ids[at * k];
        }
        tb_op_destroy(op);
    }
    assert_true(n_changed > 10);
    /* A repetition penalty over the last tokens of prompt and sample: a window of one token makes
     * the last one alone unlikely, no window all of them (61 tokens for 70 places: some repeat). */
    int repeats[2] = {0};
    for (int kind = 0; kind < 2; kind++) {
        struct tb_op *op = op_sample(prompt, 30, 40, 3);
        op->u.sample.temperature = 0;
        op->u.sample.repetition_penalty = 1e9f;
        op->u.sample.repetition_last_n = kind;
        run_samples(m, NULL, &op, 1, 100);
        const struct tb_sequence *q = &op->result.sequences[0];
        for (int at = 0; at < q->n; at++) {
            if (kind == 1) assert_int_not_equal(q->tokens[at], at ? q->tokens[at - 1] : prompt[29]);
            for (int i = 0; i < 30 + at; i++)
                repeats[kind] += (i < 30 ? prompt[i] : q->tokens[i - 30]) == q->tokens[at];
        }
        tb_op_destroy(op);
    }
    assert_true(repeats[0] < repeats[1]);
    tb_model_free(m);
}

/* Edited draws give the same bits alone and in company, whatever the order of the rows. */
static void test_edits_in_company(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[1], NULL);
    enum { N = 6 };
    struct tb_op *alone[N], *load[N];
    for (int i = 0; i < N; i++) {
        int32_t prompt[60];
        random_tokens(prompt, 10 * i + 3, shapes[1].vocab, (uint64_t)i);
        for (int k = 0; k < 2; k++) {
            struct tb_op *op = op_sample(prompt, 10 * i + 3, 30, 5);
            op->u.sample.n_samples = 1 + i % 3;
            if (i % 2) op->u.sample.frequency_penalty = 0.3f * (float)i;
            if (i > 3) op->u.sample.repetition_penalty = 1.3f;
            if (i > 2) op->u.sample.min_p = 0.02f;
            *(k ? &load[i] : &alone[i]) = op;
        }
        run_samples(m, NULL, &alone[i], 1, 1000);
    }
    run_samples(m, NULL, load, N, 13);
    for (int i = 0; i < N; i++) {
        same_sequences(alone[i], load[i]);
        tb_op_destroy(alone[i]);
        tb_op_destroy(load[i]);
    }
    tb_model_free(m);
}

/* What is told while a sample runs is what its result holds. */
static void test_progress(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int32_t prompt[20];
    random_tokens(prompt, 20, shapes[0].vocab, 1);
    struct tb_op *op = op_sample(prompt, 20, 25, 3);
    op->u.sample.n_samples = 3;
    op->u.sample.topk_sample_logprobs = 2;
    op->u.sample.stream = true;
    struct tb_sampling *s;
    struct tb_error err;
    int n_told[3] = {0}, n_last = 0, rows, steps = 0;
    struct tb_sampled_token told[3][25];
    int32_t ids[3][25][2];
    float lps[3][25][2];
    assert_int_equal(tb_sampling_create(&s, m, NULL, op), 0);
    for (; !tb_sampling_done(s); steps++) {
        assert_int_equal(tb_model_sample_step(m, &s, 1, 7, &rows, &err), 0);
        if (steps % 4 == 3 && !tb_sampling_done(s)) continue; /* a missed one is made up for */
        struct tb_progress *p = tb_sampling_progress(s);
        for (int i = 0; p && i < p->n; i++) {
            const struct tb_sampled_token *t = &p->tokens[i];
            int q = t->sequence, at = n_told[q]++;
            told[q][at] = *t;
            memcpy(ids[q][at], t->topk_ids, 8);
            memcpy(lps[q][at], t->topk_logprobs, 8);
            assert_int_equal(t->last, at == 24);
            n_last += t->last && !t->stopped;
        }
        tb_free(p);
        assert_null(tb_sampling_progress(s));
    }
    assert_int_equal(n_last, 3);
    for (int q = 0; q < 3; q++) {
        const struct tb_sequence *r = &op->result.sequences[q];
        assert_int_equal(n_told[q], r->n);
        for (int at = 0; at < r->n; at++)
            assert_true(told[q][at].token == r->tokens[at] &&
                        told[q][at].logprob == r->logprobs[at]);
        assert_memory_equal(ids[q], r->topk_ids, (size_t)r->n * 8);
        assert_memory_equal(lps[q], r->topk_logprobs, (size_t)r->n * 8);
    }
    tb_sampling_destroy(s);
    tb_op_destroy(op);
    tb_model_free(m);
}

/* A hundred prompts of one tenant and a short one of another that comes later. */
static void test_fair_prefill(void **state)
{
    (void)state;
    enum { N = 100, BUDGET = 20 };
    struct tb_model *big = open_model(backend_f32(), &shapes[0], NULL);
    size_t page = big->kv.bytes / (size_t)big->kv.n_pages;
    for (int tight = 0; tight < 2; tight++) {
        /* tight: the pages of two long prompts, so that most wait for pages, not for rows */
        struct tb_model_options o = {.kv_bytes = 22 * page};
        struct tb_model *m = tight ? open_model(backend_f32(), &shapes[0], &o) : big;
        struct tb_op *ops[N + 2];
        struct tb_sampling *s[N + 2];
        struct tb_error err;
        int rows, n = 0, steps = 0, first = -1, n_before = 0;
        for (; n < N; n++) {
            int32_t prompt[150];
            random_tokens(prompt, 150, shapes[0].vocab, (uint64_t)n);
            ops[n] = op_sample(prompt, 150, 10, 1);
            ops[n]->share = 1;
            assert_int_equal(tb_sampling_create(&s[n], m, NULL, ops[n]), 0);
        }
        for (; steps < 30; steps++)
            assert_int_equal(tb_model_sample_step(m, s, n, BUDGET, &rows, &err), 0);
        for (; n < N + 2; n++) {
            int32_t prompt[9];
            random_tokens(prompt, 9, shapes[0].vocab, (uint64_t)n);
            ops[n] = op_sample(prompt, 9, 5, 1);
            ops[n]->share =
                1 + (uint64_t)(n - N); /* one more of the first tenant, one of another */
            ops[n]->u.sample.stream = true;
            assert_int_equal(tb_sampling_create(&s[n], m, NULL, ops[n]), 0);
        }
        for (int i = 0; i < N; i++)
            n_before += tb_sampling_done(s[i]);
        for (; first < 0; steps++) {
            assert_int_equal(tb_model_sample_step(m, s, n, BUDGET, &rows, &err), 0);
            struct tb_progress *p = tb_sampling_progress(s[N + 1]);
            if (p) first = steps;
            tb_free(p);
            assert_null(tb_sampling_progress(s[N])); /* it waits for those of its own tenant */
        }
        if (tight) {
            /* It had to wait for pages, but for no more than those that had them. */
            for (int i = 0; i < N; i++)
                n_before -= tb_sampling_done(s[i]);
            assert_in_range(-n_before, 0, 2);
        } else {
            assert_int_equal(first, 30); /* in the very step */
        }
        for (int i = 0; i < n; i++) {
            tb_sampling_destroy(s[i]);
            tb_op_destroy(ops[i]);
        }
        assert_int_equal(tb_kv_room(&m->kv), m->kv.n_pages);
        if (tight) tb_model_free(m);
    }
    tb_model_free(big);
}

/* A step's rows for prompts, and pages, go to tenants in equal parts, however many sessions each
 * has; and of a tenant to its sessions. */
static void test_fair_tenants(void **state)
{
    (void)state;
    enum { N = 13, BUDGET = 24, LENGTH = 120 };
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_op *ops[N];
    struct tb_sampling *s[N];
    struct tb_error err;
    int rows;
    for (int i = 0; i < N; i++) { /* tenant 1: ten sessions; tenant 2: one with two, and one */
        int32_t prompt[LENGTH];
        random_tokens(prompt, LENGTH, shapes[0].vocab, (uint64_t)i);
        ops[i] = op_sample(prompt, LENGTH, 4, 1);
        ops[i]->share = i == 11 ? 10 : (uint64_t)i;
        ops[i]->tenant = i < 10 ? 1 : 2;
        assert_int_equal(tb_sampling_create(&s[i], m, NULL, ops[i]), 0);
    }
    for (int step = 0; step < 10; step++)
        assert_int_equal(tb_model_sample_step(m, s, N, BUDGET, &rows, &err), 0);
    int done[N], first = 0;
    for (int i = 0; i < N; i++)
        done[i] = s[i]->root.n_kv;
    for (int i = 0; i < 10; i++)
        first += done[i];
    assert_int_equal(first, 10 * BUDGET / 2);
    assert_int_equal(done[10] + done[11] + done[12], 10 * BUDGET / 2);
    assert_int_equal(done[10], 10 * BUDGET / 4); /* the older of its session */
    assert_int_equal(done[11], 0);
    assert_int_equal(done[12], 10 * BUDGET / 4);
    for (int i = 0; i < N; i++) {
        tb_sampling_destroy(s[i]);
        tb_op_destroy(ops[i]);
    }
    tb_model_free(m);
}

static struct tb_op *give_up_op(int i)
{
    int32_t prompt[80];
    random_tokens(prompt, 20 + 13 * i, shapes[0].vocab, (uint64_t)i);
    struct tb_op *op = op_sample(prompt, 20 + 13 * i, 60, 3);
    op->u.sample.n_samples = 1 + i % 3;
    return op;
}

/* A sample given up while it is prefilled, decodes, waits for pages or was sent away gives all its
 * pages back, and the others go on to the same results. */
static void test_give_up(void **state)
{
    (void)state;
    enum { N = 5 };
    struct tb_model *big = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_model_options o = {.kv_bytes = 13 * (big->kv.bytes / (size_t)big->kv.n_pages)};
    struct tb_model *m = open_model(backend_f32(), &shapes[0], &o);
    m->kv.no_reuse = true; /* so that the free pages alone are counted */
    struct tb_op *alone[N];
    int seen[4] = {0};
    for (int i = 0; i < N; i++) {
        alone[i] = give_up_op(i);
        run_samples(big, NULL, &alone[i], 1, 1000);
    }
    for (int round = 0; round < N * 24; round += sparse(11)) {
        struct tb_op *ops[N];
        struct tb_sampling *s[N];
        struct tb_error err;
        int rows, n = N, victim = round % N;
        for (int i = 0; i < N; i++) {
            ops[i] = give_up_op(i);
            assert_int_equal(tb_sampling_create(&s[i], m, NULL, ops[i]), 0);
        }
        for (int step = 0; step < round / N; step++)
            assert_int_equal(tb_model_sample_step(m, s, N, 16, &rows, &err), 0);
        const struct tb_sampling *v = s[victim];
        bool waits = !v->forked && v->root.state == TB_SEQ_WAITING, away = false;
        for (int i = 0; v->forked && i < v->req->n_samples; i++)
            away |= v->seqs[i].state == TB_SEQ_WAITING;
        seen[waits ? 0 : away ? 1 : v->forked ? 2 : 3]++;
        tb_sampling_destroy(s[victim]);
        s[victim] = s[--n];
        for (int step = 0, open = 1; open; step++) {
            assert_true(step < 10000);
            assert_int_equal(tb_model_sample_step(m, s, n, 16, &rows, &err), 0);
            open = 0;
            for (int i = 0; i < n; i++)
                open += !tb_sampling_done(s[i]);
        }
        assert_int_equal(m->kv.n_free, m->kv.n_pages);
        for (int i = 0; i < n; i++)
            tb_sampling_destroy(s[i]);
        for (int i = 0; i < N; i++) {
            if (i != victim) same_sequences(ops[i], alone[i]);
            tb_op_destroy(ops[i]);
        }
    }
    for (int i = 0; i < N; i++)
        tb_op_destroy(alone[i]);
    for (int i = 0; i < 4; i++)
        if (!seen[i]) fail_msg("no sample was given up in state %d", i);
    tb_model_free(m);
    tb_model_free(big);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_agreement),     cmocka_unit_test(test_seeds_and_preemption),
        cmocka_unit_test(test_changed_rows),  cmocka_unit_test(test_filters),
        cmocka_unit_test(test_stops),         cmocka_unit_test(test_prompt_outputs),
        cmocka_unit_test(test_validation),    cmocka_unit_test(test_room),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_token_filter),
        cmocka_unit_test(test_penalties),     cmocka_unit_test(test_edits_in_company),
        cmocka_unit_test(test_progress),      cmocka_unit_test(test_fair_prefill),
        cmocka_unit_test(test_fair_tenants),  cmocka_unit_test(test_give_up),
    };
    return cmocka_run_group_tests_name("model sampling", tests, NULL, teardown);
}
