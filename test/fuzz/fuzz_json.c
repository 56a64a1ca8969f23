/* JSON bodies of the Tinker API's ops; the first byte chooses the decoder. */
#include "api/tinker/tinker.h"
#include "fuzz.h"
#include "util/mem.h"

static const tb_decoder decoders[] = {
    tb_tinker_decode_create_model,     tb_tinker_decode_forward,
    tb_tinker_decode_forward_backward, tb_tinker_decode_create_custom_loss,
    tb_tinker_decode_optim_step,       tb_tinker_decode_save_weights,
    tb_tinker_decode_save_sampler,     tb_tinker_decode_save_external,
    tb_tinker_decode_load_weights,     tb_tinker_decode_unload_model,
    tb_tinker_decode_sample,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 1) return 0;
    struct tb_body body = {.bytes = {(const char *)data + 1, n - 1}};
    struct tb_op *op = NULL;
    struct tb_error err = {0};
    int rc = decoders[data[0] % TB_ARRAY_LEN(decoders)](&body, &op, &err);
    TB_BUG_ON((rc == 0) != (op != NULL) || (rc != 0) != (err.code != 0));
    TB_BUG_ON(rc && err.msg[0] == '\0');
    if (op) tb_op_destroy(op);
    return 0;
}
