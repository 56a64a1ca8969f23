/* A safetensors file: what opens can be read to its last element. */
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "model/safetensors.h"
#include "util/mem.h"

static void read_all(const struct tb_st *st)
{
    for (size_t i = 0; i < tb_st_count(st); i++) {
        const struct tb_st_tensor *t = tb_st_at(st, i);
        TB_BUG_ON(!tb_st_find(st, t->name));
        if (!t->readable) continue;
        size_t n = t->bytes / (t->dtype == TB_F32 ? 4 : 2);
        float *f = tb_malloc(n * sizeof(*f));
        tb_st_to_float(t, f, n);
        tb_free(f);
        tb_st_drop_pages(st, t);
    }
    tb_st_metadata(st, "format");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    int fd = memfd_create("safetensors", MFD_CLOEXEC);
    TB_BUG_ON(fd < 0 || write(fd, data, n) != (ssize_t)n);
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    struct tb_st *st = NULL;
    struct tb_error err = {0};
    int rc = tb_st_open(&st, path, &err);
    TB_BUG_ON((rc == 0) != (st != NULL) || (rc != 0) != (err.code != 0));
    if (st) read_all(st);
    tb_st_close(st);
    close(fd);
    return 0;
}
