/* A tokenizer.json: what loads can render all of its tokens, encodes text into tokens it knows, and
 * decodes them to UTF-8. */
#include "fuzz.h"
#include "tokenizer/tokenizer.h"
#include "util/mem.h"

static void use(const struct tb_tokenizer *t)
{
    static const char text[] =
        "What is 3 + 4?\n\n  <|im_end|> caf\xc3\xa9 e\xcc\x81 it's \xe2\x82\xac 12345";
    struct tb_span bytes;
    int32_t size = tb_tokenizer_vocab_size(t);
    for (int32_t id = -1; id <= TB_MIN(size, 4096); id++)
        tb_tokenizer_token_bytes(t, id, &bytes);
    TB_BUG_ON(tb_tokenizer_eos_id(t) >= size);
    for (unsigned flags = 0; flags < 4; flags++) {
        struct tb_ids ids;
        struct tb_error err = {0};
        tb_ids_init(&ids);
        if (tb_tokenizer_encode(t, TB_SPAN_LIT(text), flags, &ids, &err) == 0) {
            for (size_t i = 0; i < ids.n; i++)
                TB_BUG_ON(tb_tokenizer_token_bytes(t, ids.p[i], &bytes));
        }
        for (int32_t id = TB_MIN(size, 300); id >= -1; id--)
            tb_ids_push(&ids, id);
        struct tb_buf out;
        tb_buf_init(&out, 1 << 24);
        if (tb_tokenizer_decode(t, ids.p, ids.n, flags, &out) == 0 && out.n)
            TB_BUG_ON(!tb_utf8_valid(out.p, out.n));
        tb_buf_fini(&out);
        tb_ids_fini(&ids);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct tb_tokenizer *t = NULL;
    struct tb_error err = {0};
    int rc = tb_tokenizer_create_from_json("tokenizer.json",
                                           (struct tb_span){(const char *)data, n}, &t, &err);
    TB_BUG_ON((rc == 0) != (t != NULL) || (rc != 0) != (err.code != 0));
    if (t) use(t);
    tb_tokenizer_destroy(t);
    return 0;
}
