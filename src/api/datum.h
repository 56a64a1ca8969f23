/*
 * The Tinker API's Datum as JSON, for every face that takes it. Pure; memory in the arena; errors
 * name the field. Thread: any.
 */
#ifndef TB_API_DATUM_H
#define TB_API_DATUM_H

#include "op/op.h"
#include "wire/json.h"

/* {"model_input": …, "loss_fn_inputs": {name: tensor}} */
int tb_json_datum(const struct tb_json *d, struct tb_arena *a, struct tb_datum *out,
                  struct tb_error *err);
/* {"data": […], "dtype", "shape", CSR's indices}; fill: what absent cells of a CSR tensor are. */
int tb_json_tensor(const struct tb_json *n, struct tb_arena *a, int64_t fill, struct tb_tensor *out,
                   struct tb_error *err);
/* {"chunks": […]} into one array of tokens. */
int tb_json_tokens(const struct tb_json *model_input, struct tb_arena *a, const int32_t **tokens,
                   int32_t *n, struct tb_error *err);

#endif
