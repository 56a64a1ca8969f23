/*
 * Sampled tokens with their log-probabilities, as the dialects list them (see llm.h). Thread: the
 * loop's.
 */
#include "api/llm/llm.h"

struct tb_span tb_llm_token_bytes(const struct tb_llm *l, int32_t id)
{
    struct tb_span s = {"", 0};
    tb_tokenizer_token_bytes(tb_llm_model_info(l->model)->text, id, &s);
    return s;
}

void tb_llm_put_bytes(struct tb_json_out *j, const char *key, struct tb_span s)
{
    tb_jout_array(j, key);
    for (size_t i = 0; i < s.n; i++)
        tb_jout_int(j, NULL, (unsigned char)s.p[i]);
    tb_jout_array_end(j);
}

static void put_token(struct tb_json_out *j, const struct tb_llm *l, int32_t id, float logprob,
                      unsigned parts)
{
    struct tb_span s = tb_llm_token_bytes(l, id);
    if (parts & TB_LLM_TOKEN_ID) tb_jout_int(j, "id", id);
    tb_jout_strn(j, "token", s.p, s.n);
    tb_jout_f32(j, "logprob", logprob);
    if (parts & TB_LLM_TOKEN_BYTES) tb_llm_put_bytes(j, "bytes", s);
}

void tb_llm_put_logprobs(struct tb_json_out *j, const char *key, const struct tb_llm *l,
                         const struct tb_llm_choice *c, int32_t from, unsigned parts)
{
    size_t k = (size_t)l->top_logprobs;
    bool tops = k || (parts & TB_LLM_TOKEN_TOPS);
    tb_jout_array(j, key);
    for (int32_t i = from; i < c->n; i++) {
        tb_jout_object(j, NULL);
        put_token(j, l, c->tokens[i], c->logprobs[i], parts);
        if (tops) tb_jout_array(j, "top_logprobs");
        for (size_t t = (size_t)i * k; t < ((size_t)i + 1) * k; t++) {
            tb_jout_object(j, NULL);
            put_token(j, l, c->topk_ids[t], c->topk_logprobs[t], parts);
            tb_jout_object_end(j);
        }
        if (tops) tb_jout_array_end(j);
        tb_jout_object_end(j);
    }
    tb_jout_array_end(j);
}
