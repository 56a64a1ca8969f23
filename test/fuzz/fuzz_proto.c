/* forward_backward in protobuf. */
#include "api/tinker/tinker.h"
#include "fuzz.h"
#include "util/mem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct tb_body body = {.bytes = {(const char *)data, n}, .proto = true};
    struct tb_op *op = NULL;
    struct tb_error err = {0};
    int rc = tb_tinker_decode_forward_backward(&body, &op, &err);
    TB_BUG_ON((rc == 0) != (op != NULL) || (rc != 0) != (err.code != 0));
    if (!op) return 0;
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    double sum = 0; /* every element may be read */
    for (int i = 0; i < fb->n_data; i++) {
        for (int k = 0; k < fb->data[i].n_tokens; k++)
            sum += fb->data[i].tokens[k];
        for (int k = 0; k < fb->data[i].n_inputs; k++) {
            const struct tb_tensor *t = &fb->data[i].inputs[k];
            for (int64_t e = 0; e < t->n; e++)
                sum += t->type == TB_TENSOR_F32 ? (double)t->data.f32[e] : (double)t->data.i64[e];
        }
    }
    TB_BUG_ON(sum != sum);
    tb_op_destroy(op);
    return 0;
}
