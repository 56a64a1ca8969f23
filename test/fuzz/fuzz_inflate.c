/* Compressed bodies; the first byte chooses the encoding. */
#include "fuzz.h"
#include "util/mem.h"
#include "wire/inflate.h"

enum { MAX_OUT = 1 << 20 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const enum tb_encoding encodings[] = {TB_ENC_ZSTD, TB_ENC_GZIP, TB_ENC_DEFLATE};
    if (n < 1) return 0;
    char *out = NULL;
    size_t out_n = 0;
    struct tb_error err = {0};
    enum tb_encoding e = encodings[data[0] % TB_ARRAY_LEN(encodings)];
    int rc = tb_inflate(e, data + 1, n - 1, MAX_OUT, &out, &out_n, &err);
    TB_BUG_ON(rc == 0 && out_n > MAX_OUT);
    TB_BUG_ON(rc != 0 && (out != NULL || err.code == 0));
    tb_free(out);
    return 0;
}
