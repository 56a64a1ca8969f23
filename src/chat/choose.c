/*
 * The renderer of a model's folder (chat.h): its chat template is searched for what only one format
 * has. Reads files, so it belongs to the start.
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "chat/chat.h"
#include "util/log.h"
#include "util/mem.h"

#define MAX_TEMPLATE (1 << 20)

static char *read_file(const char *dir, const char *name)
{
    char *path = tb_asprintf("%s/%s", dir, name), *text = NULL;
    FILE *f = fopen(path, "rb");
    tb_free(path);
    if (!f) return NULL;
    text = tb_calloc(1, MAX_TEMPLATE + 1);
    text[fread(text, 1, MAX_TEMPLATE, f)] = 0;
    fclose(f);
    return text;
}

/* "chat_template": a text, or a list of {name, template} of which "default" counts. */
static char *from_config(const char *dir)
{
    char *path = tb_asprintf("%s/tokenizer_config.json", dir);
    json_t *config = json_load_file(path, 0, NULL), *t = json_object_get(config, "chat_template");
    const char *text = json_string_value(t);
    size_t i;
    json_t *one;
    json_array_foreach(t, i, one)
    {
        const char *name = json_string_value(json_object_get(one, "name"));
        if (!text || (name && strcmp(name, "default") == 0))
            text = json_string_value(json_object_get(one, "template"));
    }
    char *copy = text ? tb_strdup(text) : NULL;
    json_decref(config);
    tb_free(path);
    return copy;
}

const struct tb_renderer *tb_renderer_choose(const char *dir, const struct tb_tokenizer *t)
{
    char *text = read_file(dir, "chat_template.jinja");
    const struct tb_renderer *r = NULL;
    if (!text) text = from_config(dir);
    if (text) {
        r = tb_renderer_by_template(text);
        if (!r)
            tb_log(TB_LOG_WARN, "chat",
                   "%s: its chat template is of no known kind, so chats are rendered as "
                   "role_colon; name another with renderer= (%s)",
                   dir, tb_renderer_names());
    }
    tb_free(text);
    if (r && tb_renderer_has_tokens(r, t)) return r;
    return tb_renderer_find("role_colon");
}
