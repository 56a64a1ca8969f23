/*
 * Feeds the files of a folder to a fuzz target, as a test: replay FOLDER. Each file is given in
 * memory of exactly its size, so that AddressSanitizer sees every byte read beyond it.
 */
#include "fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "util/mem.h"

static int replay(const char *path)
{
    FILE *f = fopen(path, "rb");
    struct stat st;
    if (!f || fstat(fileno(f), &st)) {
        perror(path);
        return 1;
    }
    size_t n = (size_t)st.st_size;
    uint8_t *data = tb_malloc(n);
    int rc = fread(data, 1, n, f) != n;
    fclose(f);
    if (rc) {
        fprintf(stderr, "%s: cannot be read\n", path);
    } else {
        printf("%s\n", path);
        fflush(stdout); /* before a crash */
        LLVMFuzzerTestOneInput(data, n);
    }
    tb_free(data);
    return rc;
}

int main(int argc, char **argv)
{
    struct dirent **names;
    int n = argc == 2 ? scandir(argv[1], &names, NULL, alphasort) : -1, rc = 0, replayed = 0;
    if (n < 0) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    for (int i = 0; i < n; i++) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", argv[1], names[i]->d_name);
        if (names[i]->d_name[0] != '.') {
            rc |= replay(path);
            replayed++;
        }
        free(names[i]);
    }
    free(names);
    printf("%d files\n", replayed);
    return rc || replayed == 0;
}
