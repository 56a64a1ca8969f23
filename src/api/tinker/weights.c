/* Weights: the handlers of saves and loads, and weights_info. */
#include <string.h>

#include "api/tinker/tinker.h"

void tb_tinker_save_weights(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_save_weights);
}

void tb_tinker_save_sampler(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_save_sampler);
}

void tb_tinker_save_external(struct tb_api *a, struct tb_http_request *req,
                             const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_save_external);
}

void tb_tinker_load_weights(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_load_weights);
}

static void on_ckpt(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_str(&j, "base_model", row->base_model);
    tb_jout_bool(&j, "is_lora", true);
    tb_jout_int(&j, "lora_rank", row->lora.rank);
    tb_jout_bool(&j, "train_unembed", row->lora.train_unembed);
    tb_jout_bool(&j, "train_mlp", row->lora.train_mlp);
    tb_jout_bool(&j, "train_attn", row->lora.train_attn);
    tb_jout_object(&j, "optimizer_config");
    tb_jout_str(&j, "type", "adamw");
    tb_jout_object_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_weights_info(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    struct tb_error e = {0};
    struct tb_tinker_path p;
    const char *path = tb_tinker_body_id(a, req, "tinker_path", NULL);
    (void)m;
    if (!path) return;
    if (tb_tinker_path_parse(path, strlen(path), &p, &e))
        tb_api_error(req, &e);
    else
        tb_store_get_ckpt(tb_core_store(tb_api_core(a)), tb_api_tenant(req), path, on_ckpt,
                          tb_tinker_call(a, req));
}
