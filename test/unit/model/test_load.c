/* Folders: config.json in its forms, safetensors well- and malformed, rope tables, refusals by
 * name. */
#include "helper.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/rope.h"
#include "util/mem.h"
#include "util/philox.h"

/* ---- config */

#define BASE                                                                                       \
    "\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":2,"      \
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"max_position_embeddings\":4096"
#define CFG(arch, rest) "{\"architectures\":[\"" arch "\"]," BASE rest "}"
#define LLAMA(rest)     CFG("LlamaForCausalLM", rest)
#define QWEN2(rest)     CFG("Qwen2ForCausalLM", rest)
#define QWEN3(rest)     CFG("Qwen3ForCausalLM", rest)

static void test_config_good(void **state)
{
    (void)state;
    struct tb_model_config c;
    CHECK_OK(tb_config_parse(&c, LLAMA(""), NULL, &check_err));
    assert_int_equal(c.head_dim, 16);
    assert_true(!c.qkv_bias && !c.o_bias && !c.qk_norm && !c.tied &&
                c.rope.type == TB_ROPE_DEFAULT);
    assert_true(c.rope.theta == 10000 && c.norm_eps == 1e-6f && c.n_eos == 0);
    CHECK_OK(tb_config_parse(&c, QWEN2(",\"tie_word_embeddings\":true,\"rms_norm_eps\":1e-5"), NULL,
                             &check_err));
    assert_true(c.qkv_bias && !c.o_bias && c.tied && c.norm_eps == 1e-5f);
    CHECK_OK(
        tb_config_parse(&c, QWEN3(",\"head_dim\":32,\"attention_bias\":true,\"rope_scaling\":null"),
                        NULL, &check_err));
    assert_true(c.qk_norm && c.head_dim == 32 && c.qkv_bias && c.o_bias);
    /* model_type stands in for a missing architectures; numbers of KV heads default to heads */
    CHECK_OK(
        tb_config_parse(&c,
                        "{\"model_type\":\"qwen3\",\"vocab_size\":9,\"hidden_size\":8,"
                        "\"intermediate_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":2,"
                        "\"max_position_embeddings\":9}",
                        NULL, &check_err));
    assert_int_equal(c.n_kv_heads, 2);
    /* windows */
    CHECK_OK(tb_config_parse(&c,
                             QWEN2(",\"use_sliding_window\":true,\"sliding_window\":9,"
                                   "\"max_window_layers\":1"),
                             NULL, &check_err));
    assert_int_equal(tb_config_window(&c, 0), 0);
    assert_int_equal(tb_config_window(&c, 1), 9);
    CHECK_OK(tb_config_parse(&c,
                             QWEN3(",\"use_sliding_window\":false,\"sliding_window\":9,"
                                   "\"max_window_layers\":0"),
                             NULL, &check_err));
    assert_int_equal(tb_config_window(&c, 1), 0);
    CHECK_OK(
        tb_config_parse(&c,
                        QWEN3(",\"use_sliding_window\":true,\"sliding_window\":9,\"layer_types\":"
                              "[\"sliding_attention\",\"full_attention\"]"),
                        NULL, &check_err));
    assert_int_equal(tb_config_window(&c, 0), 9);
    assert_int_equal(tb_config_window(&c, 1), 0);
    tb_config_fini(&c);
}

static void test_config_rope_forms(void **state)
{
    (void)state;
    static const struct {
        const char *rest;
        enum tb_rope_type type;
        double theta, factor;
    } cases[] = {
        {",\"rope_theta\":5e5", TB_ROPE_DEFAULT, 5e5, 1},
        {",\"rope_theta\":500000", TB_ROPE_DEFAULT, 5e5, 1},
        {",\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":1e6}", TB_ROPE_DEFAULT,
         1e6, 1},
        {",\"rope_parameters\":{\"rope_theta\":1e6}", TB_ROPE_DEFAULT, 1e6, 1},
        {",\"rope_theta\":7,\"rope_scaling\":{\"type\":\"linear\",\"factor\":4}", TB_ROPE_LINEAR, 7,
         4},
        {",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
         "\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}",
         TB_ROPE_LLAMA3, 10000, 8},
        {",\"rope_parameters\":{\"type\":\"yarn\",\"factor\":2.5,\"rope_theta\":50}", TB_ROPE_YARN,
         50, 2.5},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        char *text = tb_asprintf(LLAMA("%s"), cases[i].rest);
        struct tb_model_config c;
        CHECK_OK(tb_config_parse(&c, text, NULL, &check_err));
        assert_int_equal(c.rope.type, cases[i].type);
        assert_true(c.rope.theta == cases[i].theta && c.rope.factor == cases[i].factor);
        if (c.rope.type == TB_ROPE_YARN)
            assert_true(c.rope.original_max == 4096 && c.rope.beta_fast == 32);
        tb_free(text);
    }
}

static void test_config_eos(void **state)
{
    (void)state;
    struct tb_model_config c;
    CHECK_OK(tb_config_parse(&c, LLAMA(",\"eos_token_id\":5"), NULL, &check_err));
    assert_true(c.n_eos == 1 && c.eos[0] == 5);
    CHECK_OK(tb_config_parse(&c, LLAMA(",\"eos_token_id\":5"), "{\"eos_token_id\":[7,8,7]}",
                             &check_err));
    assert_true(c.n_eos == 2 && c.eos[0] == 7 && c.eos[1] == 8);
    CHECK_OK(tb_config_parse(&c, LLAMA(",\"eos_token_id\":[5,6]"), "{\"eos_token_id\":null}",
                             &check_err));
    assert_true(c.n_eos == 2 && c.eos[1] == 6);
}

static void test_config_bad(void **state)
{
    (void)state;
    static const struct {
        const char *text, *msg;
    } cases[] = {
        {"", "config.json: line"},
        {"[]", "not an object"},
        {"{\"a\":1,\"a\":2}", "duplicate"},
        {CFG("MistralForCausalLM", ""), "architectures: MistralForCausalLM is not served"},
        {"{" BASE "}", "architectures: (missing) is not served"},
        {"{\"architectures\":[\"LlamaForCausalLM\"]}", "vocab_size is missing"},
        {LLAMA(",\"head_dim\":0"), "head_dim is 0"},
        {LLAMA(",\"head_dim\":15"), "head_dim 15 is not served"},
        {LLAMA(",\"head_dim\":4096"), "head_dim is 4096"},
        {LLAMA(",\"head_dim\":\"x\""), "head_dim is not an integer"},
        {LLAMA(",\"hidden_act\":\"gelu\""), "hidden_act: gelu is not served"},
        {LLAMA(",\"mlp_bias\":true"), "mlp_bias true is not served"},
        {LLAMA(",\"attention_bias\":1"), "attention_bias is not true or false"},
        {LLAMA(",\"quantization_config\":{}"), "quantization_config"},
        {LLAMA(",\"rms_norm_eps\":0"), "rms_norm_eps is not a positive number"},
        {LLAMA(",\"rope_theta\":\"1e6\""), "rope_theta is not a positive number"},
        {LLAMA(",\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":2}"),
         "rope type dynamic is not served"},
        {LLAMA(",\"rope_parameters\":{\"rope_type\":\"longrope\"}"),
         "rope_parameters: rope type longrope is not served"},
        {LLAMA(",\"rope_scaling\":{\"rope_type\":\"mrope\"}"), "rope type mrope is not served"},
        {LLAMA(",\"rope_scaling\":{\"rope_type\":\"linear\"}"), "factor is missing"},
        {LLAMA(",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}"),
         "low_freq_factor is missing"},
        {LLAMA(",\"rope_scaling\":[]"), "rope_scaling is not an object"},
        {LLAMA(",\"partial_rotary_factor\":0.5"), "partial_rotary_factor"},
        {LLAMA(",\"use_sliding_window\":true"),
         "use_sliding_window is not served for LlamaForCausalLM"},
        {QWEN3(",\"layer_types\":[\"full_attention\"]"),
         "layer_types is not a list of num_hidden_layers"},
        {QWEN3(",\"layer_types\":[\"linear_attention\",\"full_attention\"]"),
         "layer_types[0]: linear_attention is not served"},
        {QWEN3(",\"layer_types\":[\"full_attention\",\"sliding_attention\"]"),
         "layer_types[1]: sliding_attention without use_sliding_window"},
        {QWEN3(",\"num_experts\":8"), "num_experts is not served"},
        {LLAMA(",\"eos_token_id\":\"x\""), "eos_token_id is not a token id"},
        {LLAMA(",\"eos_token_id\":-1"), "eos_token_id is not a token id"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":9,\"hidden_size\":9,"
         "\"intermediate_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":2,"
         "\"max_position_embeddings\":9}",
         "hidden_size 9 is not a multiple of num_attention_heads 2"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":9,\"hidden_size\":8,"
         "\"intermediate_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":4,"
         "\"num_key_value_heads\":3,\"max_position_embeddings\":9}",
         "num_attention_heads 4 is not a multiple of num_key_value_heads 3"},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_model_config c;
        struct tb_error err = {0};
        int rc = tb_config_parse(&c, cases[i].text, NULL, &err);
        if (rc >= 0 || !strstr(err.msg, cases[i].msg)) fail_msg("case %zu: %d %s", i, rc, err.msg);
    }
    struct tb_model_config c;
    struct tb_error err;
    assert_true(tb_config_parse(&c, LLAMA(""), "{", &err) < 0);
    assert_non_null(strstr(err.msg, "generation_config.json: line 1"));
}

/* ---- rope */

static void test_rope_tables(void **state)
{
    (void)state;
    json_t *all = oracle_json(oracle_path("rope_tables.json")), *j;
    size_t n;
    json_array_foreach(all, n, j)
    {
        int dim = (int)json_integer_value(json_object_get(j, "head_dim"));
        json_t *root = json_loads(LLAMA(""), 0, NULL);
        json_object_set(root, "rope_parameters", json_object_get(j, "rope"));
        json_object_set(root, "max_position_embeddings",
                        json_object_get(j, "max_position_embeddings"));
        char *text = json_dumps(root, 0);
        struct tb_model_config c;
        CHECK_OK(tb_config_parse(&c, text, NULL, &check_err));
        double inv[TB_ROPE_MAX_DIM / 2], factor;
        tb_rope_inv_freq(&c.rope, dim, inv, &factor);
        json_t *want = json_object_get(j, "inv_freq");
        assert_int_equal(json_array_size(want), (size_t)dim / 2);
        for (int i = 0; i < dim / 2; i++) {
            double w = json_number_value(json_array_get(want, (size_t)i));
            if (fabs(inv[i] - w) > 1e-6 * w)
                fail_msg("%s: inv_freq[%d] is %g, want %g",
                         json_string_value(json_object_get(j, "name")), i, inv[i], w);
        }
        double wf = json_number_value(json_object_get(j, "attention_factor"));
        assert_true(fabs(factor - wf) < 1e-6);
        float cs[512], sn[512];
        tb_rope_table(&c.rope, dim, 31, 1, cs, sn);
        assert_true(fabs((double)cs[1] - cos(31 * inv[1]) * factor) < 1e-6);
        assert_true(fabs((double)sn[1] - sin(31 * inv[1]) * factor) < 1e-6);
        free(text);
        json_decref(root);
    }
    assert_true(n >= 5);
    json_decref(all);
}

/* ---- sizes */

static struct tb_model *load_shape(struct tb_backend *be, const char *dir,
                                   const struct tb_model_options *o, struct tb_error *err)
{
    struct tb_model *m = NULL;
    *err = (struct tb_error){0};
    int rc = tb_model_load(&m, be, "m", dir, o, err);
    assert_int_equal(rc, err->code);
    return m;
}

/* What the backend says about itself and what the user asks for. */
static void test_sizes(void **state)
{
    struct tb_backend *be = new_backend("f32");
    struct tb_model_options o = {0};
    struct tb_error err;
    be->mem_limit = (size_t)256 << 20;
    char *dir = random_model(&shapes[0], 3, 0.2f);
    size_t row = (size_t)shapes[0].vocab * 4;

    be->sizes.activation_bytes = 3 << 20;
    be->sizes.activation_part = 4;
    be->sizes.logits_bytes = 200 * row;
    struct tb_model *m = load_shape(be, dir, NULL, &err);
    assert_int_equal(m->soft_bytes, 3 << 20);
    assert_int_equal(m->head_piece, 64);
    assert_int_equal(m->head_rows, 192);
    size_t page = m->kv.bytes / (size_t)m->kv.n_pages;
    tb_model_free(m);

    be->sizes.activation_bytes = SIZE_MAX;
    be->sizes.logits_bytes = row;
    be->sizes.kv_bytes = 7 * page + 1;
    m = load_shape(be, dir, NULL, &err);
    assert_int_equal(m->soft_bytes, be->mem_limit / 4);
    assert_int_equal(m->head_piece, 64); /* gradients do not depend on it */
    assert_int_equal(m->head_rows, 64);
    assert_int_equal(m->kv.n_pages, 7);
    tb_model_free(m);

    be->sizes.kv_bytes = SIZE_MAX; /* a hundred models, then 64 full contexts */
    o.kv_shares = 100;
    m = load_shape(be, dir, &o, &err);
    assert_int_equal(m->kv.n_pages, be->mem_limit / 8 / 100 / page);
    tb_model_free(m);
    o.kv_shares = 1;
    const int full = 64 * tb_kv_pages_for(shapes[0].max_pos);
    m = load_shape(be, dir, &o, &err);
    assert_int_equal(m->kv.n_pages, full);
    tb_model_free(m);

    o.kv_bytes = ((size_t)full + 9) * page; /* asked for: to the page */
    m = load_shape(be, dir, &o, &err);
    assert_int_equal(m->kv.bytes, o.kv_bytes);
    tb_model_free(m);
    o.kv_bytes = page - 1;
    assert_null(load_shape(be, dir, &o, &err));
    assert_int_equal(err.code, TB_EINVAL);
    assert_non_null(strstr(err.msg, " bytes of KV cache do not hold a page of 16 tokens"));
    o.kv_bytes = be->mem_limit;
    assert_null(load_shape(be, dir, &o, &err));
    assert_int_equal(err.code, TB_ENOMEM);
    assert_non_null(strstr(err.msg, "the KV pages need 256.0 MiB; "));

    remove_dir(dir);
    be->ops->destroy(be);
}

/* ---- safetensors */

static char *temp_file(const char *header, uint64_t header_len, size_t data)
{
    char *path = tb_strdup("/tmp/tb-st-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    unsigned char le[8];
    for (int i = 0; i < 8; i++)
        le[i] = (unsigned char)(header_len >> (8 * i));
    assert_int_equal(write(fd, le, 8), 8);
    size_t n = strlen(header);
    assert_int_equal(write(fd, header, n), (ssize_t)n);
    for (size_t i = 0; i < data; i++)
        assert_int_equal(write(fd, "\x3f", 1), 1);
    close(fd);
    return path;
}

static void test_safetensors_bad(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        uint64_t len; /* 0: the header's */
        const char *msg;
    } cases[] = {
        {"", 50, "header length 50 does not fit"},
        {"{}", UINT64_MAX, "does not fit"},
        {"{}", 1u << 20, "does not fit"},
        {"[]      ", 0, "header is not a JSON object"},
        {"{\"a\":     ", 0, "header is not a JSON object"},
        {"{\"a\":1}", 0, "tensor a: bad header entry"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 0, "tensor a: bad header entry"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.0]}}", 0,
         "bad header entry"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,99]}}", 0,
         "outside of the file"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 0,
         "outside of the file"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 0,
         "outside of the file"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 0,
         "do not match its shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 0, "bad shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4,2],\"data_offsets\":[0,8]}}",
         0, "bad shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,8]}}", 0,
         "do not match its shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 0,
         "more than 8 dimensions"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}", 0, "not aligned"},
        {"{\"a\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,4]}}", 0,
         "do not match its shape"},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        uint64_t len = cases[i].len ? cases[i].len : strlen(cases[i].header);
        char *path = temp_file(cases[i].header, len, 8);
        struct tb_st *st = NULL;
        struct tb_error err = {0};
        int rc = tb_st_open(&st, path, &err);
        if (rc != TB_ECORRUPT || !strstr(err.msg, cases[i].msg))
            fail_msg("case %zu: %d %s", i, rc, err.msg);
        unlink(path);
        tb_free(path);
    }
    struct tb_st *st;
    struct tb_error err;
    assert_int_equal(tb_st_open(&st, "/nonexistent/x", &err), TB_ENOTFOUND);
    char *path = temp_file("", 0, 0);
    assert_int_equal(truncate(path, 3), 0);
    assert_int_equal(tb_st_open(&st, path, &err), TB_ECORRUPT);
    unlink(path);
    tb_free(path);
}

/* Random damage to a real file and config: refused or readable, never a stray access. */
static void test_mutations(void **state)
{
    (void)state;
    FILE *f = fopen(oracle_path("llama/base_activations.safetensors"), "rb");
    static char bytes[40000], copy[40000];
    size_t n = fread(bytes, 1, sizeof(bytes), f), opened = 0, parsed = 0;
    fclose(f);
    f = fopen(oracle_path("llama/model/config.json"), "rb");
    char config[4096] = {0};
    size_t n_config = fread(config, 1, sizeof(config) - 1, f);
    fclose(f);
    char path[] = "/tmp/tb-st-XXXXXX";
    int fd = mkstemp(path);
    static const char nasty[] = "0123456789-[]{},:\"e.\0\xff";
    for (uint32_t round = 0; round < 1500; round++) {
        uint32_t key[2] = {round, 1}, ctr[4] = {0}, r[4];
        memcpy(copy, bytes, n);
        char text[4096];
        memcpy(text, config, sizeof(text));
        for (ctr[0] = 0; ctr[0] < 1 + round % 4; ctr[0]++) {
            tb_philox4x32(ctr, key, r);
            copy[r[0] % 700] = nasty[r[1] % sizeof(nasty)];
            text[r[2] % n_config] = nasty[r[3] % sizeof(nasty)];
        }
        size_t len = round % 5 ? n : r[0] % n;
        assert_int_equal(ftruncate(fd, 0), 0);
        assert_int_equal(pwrite(fd, copy, len, 0), (ssize_t)len);
        struct tb_st *st;
        struct tb_error err = {0};
        if (tb_st_open(&st, path, &err) == 0) {
            opened++;
            for (size_t i = 0; i < tb_st_count(st); i++) {
                const struct tb_st_tensor *t = tb_st_at(st, i);
                if (!t->readable) continue;
                size_t k = t->bytes / tb_dtype_size(t->dtype);
                float *v = tb_malloc(k * 4 + 4);
                tb_st_to_float(t, v, k);
                tb_free(v);
            }
            tb_st_close(st);
        } else {
            assert_true(err.code < 0 && err.msg[0]);
        }
        struct tb_model_config c;
        if (tb_config_parse(&c, text, NULL, &err) == 0) {
            parsed++;
            tb_config_fini(&c);
        }
    }
    close(fd);
    unlink(path);
    assert_true(opened > 50 && opened < 1450 && parsed > 10 && parsed < 1490);
}

/* An odd header length misaligns the mapping: the data is still read right. Unknown kinds are
 * listed. */
static void test_safetensors_odd(void **state)
{
    (void)state;
    const char *h = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                    "\"b\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[3,4]},"
                    "\"h\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[4,8]},"
                    "\"__metadata__\":{\"format\":\"pt\"}}";
    assert_true(strlen(h) % 8);
    char *path = temp_file(h, strlen(h), 8);
    struct tb_st *st;
    CHECK_OK(tb_st_open(&st, path, &check_err));
    assert_int_equal(tb_st_count(st), 3);
    assert_string_equal(tb_st_metadata(st, "format"), "pt");
    float v[2];
    const struct tb_st_tensor *t;
    CHECK_OK(tb_st_require(st, "a", 1, 2, 0, &t, &check_err));
    tb_st_to_float(t, v, 2);
    assert_true(v[0] == v[1] && fabs((double)v[0] - 0.747) < 1e-3); /* 0x3f3f3f3f */
    tb_st_to_float(tb_st_find(st, "h"), v, 2);
    assert_true(v[0] == 1.8115234375f); /* 0x3f3f */
    struct tb_error err;
    assert_int_equal(tb_st_require(st, "b", 1, 3, 0, &t, &err), TB_EUNSUPPORTED);
    assert_non_null(strstr(err.msg, "tensor b has dtype F4"));
    tb_st_close(st);
    unlink(path);
    tb_free(path);
}

static void test_safetensors_write(void **state)
{
    (void)state;
    char path[] = "/tmp/tb-st-XXXXXX";
    close(mkstemp(path));
    const float a[6] = {1, 2, 3, 4, 5, 6}, b[2] = {-0.0f, INFINITY};
    const struct tb_st_out out[] = {{"x.a", 2, 3, a}, {"x.b", 2, 0, b}};
    const struct tb_st_meta meta[] = {{"step", "12"}};
    CHECK_OK(tb_st_write_path(path, out, 2, meta, 1, &check_err));
    struct tb_st *st;
    CHECK_OK(tb_st_open(&st, path, &check_err));
    const struct tb_st_tensor *t;
    CHECK_OK(tb_st_require(st, "x.a", 2, 2, 3, &t, &check_err));
    assert_memory_equal(t->data, a, sizeof(a));
    CHECK_OK(tb_st_require(st, "x.b", 1, 2, 0, &t, &check_err));
    assert_memory_equal(t->data, b, sizeof(b));
    assert_string_equal(tb_st_metadata(st, "step"), "12");
    assert_null(tb_st_metadata(st, "none"));
    struct tb_error err;
    assert_int_equal(tb_st_require(st, "x.a", 2, 3, 2, &t, &err), TB_EINVAL);
    assert_string_equal(err.msg, "tensor x.a has shape [2, 3], expected [3, 2]");
    tb_st_close(st);
    /* A full disk is an error. */
    int fd = open("/dev/full", O_WRONLY);
    if (fd >= 0) {
        assert_int_equal(tb_st_write_fd(fd, out, 2, NULL, 0, &err), TB_EIO);
        close(fd);
    }
    unlink(path);
}

/* ---- folders */

static const struct shape tiny = {"Qwen3ForCausalLM", 33, 24, 40, 2, 2, 1, 8, 64, false, 0};

/* Splits a folder's one file into two shards with an index. */
static void shard(const char *dir, const char *second)
{
    char *path = tb_asprintf("%s/model.safetensors", dir);
    struct tb_st *st;
    CHECK_OK(tb_st_open(&st, path, &check_err));
    struct tb_st_out out[2][64];
    size_t n[2] = {0};
    json_t *map = json_object();
    for (size_t i = 0; i < tb_st_count(st); i++) {
        const struct tb_st_tensor *t = tb_st_at(st, i);
        int k = (int)(i % 2);
        out[k][n[k]++] = (struct tb_st_out){t->name, (int32_t)t->shape[0],
                                            t->n_dims == 2 ? (int32_t)t->shape[1] : 0, t->data};
        json_object_set_new(map, t->name, json_string(k ? second : "a.safetensors"));
    }
    for (int k = 0; k < 2; k++) {
        char *to = tb_asprintf("%s/%s.safetensors", dir, k ? "b" : "a");
        CHECK_OK(tb_st_write_path(to, out[k], n[k], NULL, 0, &check_err));
        tb_free(to);
    }
    tb_st_close(st);
    unlink(path);
    tb_free(path);
    path = tb_asprintf("%s/model.safetensors.index.json", dir);
    json_t *root = json_pack("{s:o}", "weight_map", map);
    assert_int_equal(json_dump_file(root, path, 0), 0);
    json_decref(root);
    tb_free(path);
}

static void test_shards(void **state)
{
    (void)state;
    char *one = random_model(&tiny, 3, 0.3f), *two = random_model(&tiny, 3, 0.3f);
    shard(two, "b.safetensors");
    struct tb_model *m[2] = {load_dir(backend_f32(), one, NULL),
                             load_dir(backend_f32(), two, NULL)};
    int32_t tokens[12];
    random_tokens(tokens, 12, 33, 1);
    struct tb_op *op[2];
    for (int i = 0; i < 2; i++) {
        struct tb_adapter *a = random_adapter(m[i], 2, 1, 0.1f);
        op[i] = op_cross_entropy(tokens, 12, true);
        run_train(m[i], a, op[i]);
        tb_adapter_free(a);
    }
    assert_memory_equal(op[0]->result.outputs[0].logprobs, op[1]->result.outputs[0].logprobs, 44);
    tb_op_destroy(op[0]);
    tb_op_destroy(op[1]);
    tb_model_free(m[0]);
    tb_model_free(m[1]);
    remove_dir(one);
    remove_dir(two);
    const struct {
        const char *file;
        const char *msg;
        int code;
    } bad[] = {{"c.safetensors", "c.safetensors", TB_ENOTFOUND},
               {"../b.safetensors", "file name", TB_ECORRUPT}};
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++) {
        char *dir = random_model(&tiny, 3, 0.3f);
        shard(dir, bad[i].file);
        struct tb_model *x = NULL;
        struct tb_error err;
        assert_int_equal(tb_model_load(&x, backend_f32(), "m", dir, NULL, &err), bad[i].code);
        if (!strstr(err.msg, bad[i].msg)) fail_msg("%s", err.msg);
        remove_dir(dir);
    }
}

/* Rewrites a folder's file without a tensor, or with one of another shape or name. */
static void rewrite(const char *dir, const char *name, const char *new_name, int drop_rows)
{
    char *path = tb_asprintf("%s/model.safetensors", dir),
         *to = tb_asprintf("%s/a.safetensors", dir);
    struct tb_st *st;
    CHECK_OK(tb_st_open(&st, path, &check_err));
    struct tb_st_out out[64];
    size_t n = 0;
    for (size_t i = 0; i < tb_st_count(st); i++) {
        const struct tb_st_tensor *t = tb_st_at(st, i);
        bool hit = !strcmp(t->name, name);
        if (hit && !new_name) continue;
        out[n++] = (struct tb_st_out){hit ? new_name : t->name,
                                      (int32_t)t->shape[0] - (hit ? drop_rows : 0),
                                      t->n_dims == 2 ? (int32_t)t->shape[1] : 0, t->data};
    }
    CHECK_OK(tb_st_write_path(to, out, n, NULL, 0, &check_err));
    tb_st_close(st);
    assert_int_equal(rename(to, path), 0);
    tb_free(path);
    tb_free(to);
}

static void test_load_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *name, *new_name;
        int drop;
        const char *msg;
    } cases[] = {
        {"lm_head.weight", NULL, 0, "tensor lm_head.weight is missing"},
        {"model.norm.weight", NULL, 0, "tensor model.norm.weight is missing"},
        {"model.embed_tokens.weight", "model.embed_tokens.weight", 1,
         "tensor model.embed_tokens.weight has shape [32, 24], expected [33, 24]"},
        {"model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight", 2,
         "tensor model.layers.1.self_attn.k_proj.weight has shape [6, 24], expected [8, 24]"},
        {"model.layers.0.self_attn.q_norm.weight", NULL, 0,
         "tensor model.layers.0.self_attn.q_norm.weight is missing"},
        {"model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight", 0,
         "tensor model.layers.1.mlp.down_proj.weight is missing"},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        char *dir = random_model(&tiny, 3, 0.3f);
        rewrite(dir, cases[i].name, cases[i].new_name, cases[i].drop);
        struct tb_model *m = NULL;
        struct tb_error err;
        int rc = tb_model_load(&m, backend_f32(), "m", dir, NULL, &err);
        if (rc != TB_EINVAL || !strstr(err.msg, cases[i].msg) || strchr(err.msg, '\n'))
            fail_msg("case %zu: %d %s", i, rc, err.msg);
        remove_dir(dir);
    }
    /* Extra tensors are ignored. */
    char *dir = random_model(&tiny, 3, 0.3f);
    struct shape tied = tiny;
    tied.tied = true;
    char *dir2 = random_model(&tied, 3, 0.3f);
    rewrite(dir2, "model.norm.weight", "model.norm.weight", 0);
    tb_model_free(load_dir(backend_f32(), dir2, NULL));
    char *cfg = tb_asprintf("%s/config.json", dir), *cfg2 = tb_asprintf("%s/config.json", dir2);
    assert_int_equal(rename(cfg2, cfg), 0); /* tied config over a file that has a head */
    tb_model_free(load_dir(backend_f32(), dir, NULL));
    struct tb_model *m = NULL;
    struct tb_error err;
    assert_int_equal(tb_model_load(&m, backend_f32(), "m", dir2, NULL, &err), TB_ENOTFOUND);
    assert_non_null(strstr(err.msg, "config.json"));
    assert_int_equal(tb_model_load(&m, backend_f32(), "m", "/nonexistent", NULL, &err),
                     TB_ENOTFOUND);
    tb_free(cfg);
    tb_free(cfg2);
    remove_dir(dir);
    remove_dir(dir2);
}

static void test_info(void **state)
{
    (void)state;
    struct tb_model_options o = {.max_context = 40, .max_rank = 8};
    struct tb_model *m = load_dir(backend_f32(), oracle_path("llama/model"), &o);
    const struct tb_model_info *i = tb_model_info(m);
    assert_string_equal(i->arch, "LlamaForCausalLM");
    assert_string_equal(i->name, "test");
    assert_int_equal(i->vocab, 320);
    assert_int_equal(i->max_context, 40);
    assert_int_equal(i->max_rank, 8);
    assert_int_equal(i->n_kv_heads, 2);
    assert_true(i->weight_bytes > 100000 && i->kv_pages_total > 0);
    struct tb_lora_config c = {9, 32, true, 1, true, true, true};
    struct tb_adapter *a;
    struct tb_error err;
    assert_int_equal(tb_adapter_create(&a, m, &c, &err), TB_EINVAL);
    size_t before = i->weight_bytes;
    CHECK_OK(tb_model_prepare_bwd(m, &check_err));
    assert_true(i->weight_bytes >= before);
    tb_model_free(m);
}

static int teardown(void **state)
{
    (void)state;
    backends_fini();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_config_good),
        cmocka_unit_test(test_config_rope_forms),
        cmocka_unit_test(test_config_eos),
        cmocka_unit_test(test_config_bad),
        cmocka_unit_test(test_rope_tables),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_safetensors_bad),
        cmocka_unit_test(test_safetensors_odd),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_safetensors_write),
        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_load_refusals),
        cmocka_unit_test(test_info),
    };
    return cmocka_run_group_tests_name("model loading", tests, NULL, teardown);
}
