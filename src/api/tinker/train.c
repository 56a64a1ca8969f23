/* Models and training: the handlers; decoding is in decode_*.c. */
#include <string.h>

#include "api/tinker/tinker.h"

void tb_tinker_create_model(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_create_model);
}

void tb_tinker_create_custom_loss(struct tb_api *a, struct tb_http_request *req,
                                  const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_create_custom_loss);
}

void tb_tinker_unload_model(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_unload_model);
}

void tb_tinker_forward(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_forward);
}

void tb_tinker_forward_backward(struct tb_api *a, struct tb_http_request *req,
                                const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_forward_backward);
}

void tb_tinker_optim_step(struct tb_api *a, struct tb_http_request *req,
                          const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_optim_step);
}

/* What a client on this machine can load a tokenizer from: the operator's word, else the model's
 * folder (the SDK cuts ids at ':', so not with one), else the name. */
static const char *tokenizer_id(struct tb_api *a, const struct tb_model_answer *info)
{
    struct tb_core *c = tb_api_core(a);
    if (info->tokenizer_id) return info->tokenizer_id;
    for (int i = 0; i < tb_core_n_models(c); i++) {
        struct tb_served_model s;
        tb_core_served_model(c, i, &s);
        if (strcmp(s.name, info->base_model) != 0) continue;
        if (s.tokenizer) return s.tokenizer;
        if (tb_api_options_get(a)->loopback && s.dir && !strchr(s.dir, ':')) return s.dir;
    }
    return info->base_model;
}

void tb_tinker_get_info(struct tb_api *a, struct tb_http_request *req,
                        const struct tb_route_match *m)
{
    struct tb_error e = {0};
    struct tb_model_answer info = {0};
    const char *id = tb_tinker_body_id(a, req, "model_id", "get_info");
    (void)m;
    if (!id) return;
    if (tb_core_model_info(tb_api_core(a), tb_api_who(req), id, &info, &e)) {
        tb_api_error(req, &e);
        return;
    }
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "model_id", info.model_id);
    tb_jout_object(&j, "model_data");
    if (info.arch) tb_jout_str(&j, "arch", info.arch);
    tb_jout_str(&j, "model_name", info.base_model);
    tb_jout_str(&j, "tokenizer_id", tokenizer_id(a, &info));
    tb_jout_object_end(&j);
    tb_jout_object(&j, "optimizer_config");
    tb_jout_str(&j, "type", info.optimizer ? info.optimizer : "adamw");
    tb_jout_object_end(&j);
    tb_jout_bool(&j, "is_lora", true);
    tb_jout_int(&j, "lora_rank", info.lora.rank);
    tb_jout_str(&j, "model_name", info.base_model);
    tb_jout_str(&j, "type", "get_info");
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}
