/*
 * The table of renderers and what they do (chat.h). The formats are those of the Tinker cookbook's
 * renderers, which follow the models' own chat templates; test/data/chat has its output.
 *
 * A piece of text is encoded at once where the cookbook encodes it at once: where pieces meet,
 * tokens do not merge.
 */
#include "chat/chat.h"

#include <string.h>

#include "util/buf.h"
#include "util/mem.h"

#define MAX_TEXT  ((size_t)1 << 30)
#define THINK     "<think>"
#define THINK_END "</think>"

struct render {
    const struct tb_renderer *r;
    const struct tb_tokenizer *t;
    const struct tb_chat_message *m;
    size_t n;
    size_t last_user; /* index, or SIZE_MAX: none */
    struct tb_ids *out;
    struct tb_buf text; /* of the piece that is being put together */
    struct tb_error *err;
};

enum thinking { THINK_NONE, THINK_ON, THINK_OFF };

struct tb_renderer {
    const char *name;
    int (*message)(struct render *x, size_t i);
    int (*generate)(struct render *x);
    bool begins; /* with the tokenizer's own first token */
    enum thinking thinking;
    const char *stop_token, *stop_string;
    const char *without_thinking; /* name of the twin */
    const char *mark;             /* a chat template that holds it is this renderer's */
};

/* ---- pieces */

static int encode(struct render *x, struct tb_span s, unsigned flags)
{
    return s.n ? tb_tokenizer_encode(x->t, s, flags, x->out, x->err) : 0;
}

static int encode_str(struct render *x, const char *s)
{
    return encode(x, tb_span_str(s), 0);
}

static void put(struct render *x, struct tb_span s)
{
    tb_buf_append(&x->text, s.p, s.n);
}

static void put_str(struct render *x, const char *s)
{
    tb_buf_puts(&x->text, s);
}

/* Encodes what was put together and starts anew. */
static int flush(struct render *x, unsigned flags)
{
    if (x->text.failed)
        return tb_error_set(x->err, TB_ENOMEM, "no memory for the text of a conversation");
    int rc = encode(x, (struct tb_span){x->text.p, x->text.n}, flags);
    tb_buf_reset(&x->text);
    return rc;
}

static bool is_role(const struct tb_chat_message *m, const char *role)
{
    return tb_span_eq(m->role, role);
}

/* One of the roles that a format knows. */
static int check_role(struct render *x, size_t i, bool tools)
{
    const struct tb_chat_message *m = &x->m[i];
    if (is_role(m, "system") || is_role(m, "user") || is_role(m, "assistant") ||
        (tools && is_role(m, "tool")))
        return 0;
    return tb_error_set(x->err, TB_EINVAL,
                        "messages[%zu].role: \"%.*s\" is none of system, user, assistant%s", i,
                        (int)TB_MIN(m->role.n, 64), m->role.p, tools ? ", tool" : "");
}

static struct tb_span strip_left(struct tb_span s, const char *chars)
{
    while (s.n && memchr(chars, s.p[0], strlen(chars))) {
        s.p++;
        s.n--;
    }
    return s;
}

static struct tb_span strip(struct tb_span s, const char *chars)
{
    s = strip_left(s, chars);
    while (s.n && memchr(chars, s.p[s.n - 1], strlen(chars)))
        s.n--;
    return s;
}

static const char *find(struct tb_span s, const char *what)
{
    return s.n ? memmem(s.p, s.n, what, strlen(what)) : NULL;
}

/* ---- role_colon: "User: text\n\n" */

static int colon_message(struct render *x, size_t i)
{
    const struct tb_chat_message *m = &x->m[i];
    int rc = check_role(x, i, true);
    if (rc) return rc;
    put(x, m->role);
    put_str(x, ":");
    if (!x->text.failed) x->text.p[0] = (char)(x->text.p[0] - 'a' + 'A');
    if ((rc = flush(x, 0))) return rc;
    put_str(x, " ");
    put(x, m->content);
    put_str(x, "\n\n");
    return flush(x, TB_ENCODE_PLAIN);
}

static int colon_generate(struct render *x)
{
    return encode_str(x, "Assistant:");
}

/* ---- llama3 */

static int llama_message(struct render *x, size_t i)
{
    const struct tb_chat_message *m = &x->m[i];
    int rc = check_role(x, i, true);
    if (rc) return rc;
    put_str(x, "<|start_header_id|>");
    put(x, m->role);
    put_str(x, "<|end_header_id|>\n\n");
    if ((rc = flush(x, 0)) || (rc = encode(x, m->content, TB_ENCODE_PLAIN))) return rc;
    return encode_str(x, "<|eot_id|>");
}

static int llama_generate(struct render *x)
{
    return encode_str(x, "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

/* ---- qwen3: ChatML with blocks of thinking, which are kept on the last turn only */

static void put_header(struct render *x, size_t i, const char *role)
{
    if (i > 0) put_str(x, "\n");
    put_str(x, "<|im_start|>");
    put_str(x, role);
    put_str(x, "\n");
}

static const char *qwen_role(const struct tb_chat_message *m)
{
    return is_role(m, "system") ? "system" : is_role(m, "assistant") ? "assistant" : "user";
}

static void put_thinking(struct render *x, struct tb_span reasoning)
{
    put_str(x, THINK "\n");
    put(x, strip(reasoning, "\n"));
    put_str(x, "\n" THINK_END "\n\n");
}

/* The turn that is being produced, which the template gives a block whether it reasoned or not. */
static void put_framed(struct render *x, const struct tb_chat_message *m)
{
    const char *end = find(m->content, THINK_END);
    if (m->thinking.p) {
        put_thinking(x, m->thinking);
        put(x, strip_left(m->content, "\n"));
    } else if (end) { /* the block stands in the text */
        struct tb_span before = {m->content.p, (size_t)(end - m->content.p)};
        struct tb_span rest = {end + strlen(THINK_END), 0};
        rest.n = (size_t)(m->content.p + m->content.n - rest.p);
        bool open = false;
        for (const char *p; (p = find(before, THINK));) {
            before.n -= (size_t)(p + strlen(THINK) - before.p);
            before.p = p + strlen(THINK);
            open = true;
        }
        if (!open) put_thinking(x, TB_SPAN_LIT(""));
        put_thinking(x, before);
        put(x, strip_left(rest, "\n"));
    } else {
        bool open = find(m->content, THINK) != NULL;
        if (!open) put_thinking(x, TB_SPAN_LIT(""));
        put(x, open ? m->content : strip_left(m->content, "\n"));
    }
}

static int qwen3_message(struct render *x, size_t i)
{
    const struct tb_chat_message *m = &x->m[i];
    int rc = check_role(x, i, true);
    if (rc) return rc;
    put_header(x, i, qwen_role(m));
    if ((rc = flush(x, 0))) return rc;
    bool produced = is_role(m, "assistant") && i + 1 == x->n;
    if (is_role(m, "tool")) {
        put_str(x, "<tool_response>\n");
        put(x, m->content);
        put_str(x, "\n</tool_response>");
    } else if (produced && x->last_user != SIZE_MAX && x->r->thinking != THINK_NONE) {
        put_framed(x, m);
    } else {
        if (m->thinking.p && produced) {
            put_str(x, THINK);
            put(x, m->thinking);
            put_str(x, THINK_END);
        }
        put(x, m->content);
    }
    if ((rc = flush(x, TB_ENCODE_PLAIN))) return rc;
    return encode_str(x, "<|im_end|>");
}

static int qwen3_generate(struct render *x)
{
    put_header(x, x->n, "assistant");
    if (x->r->thinking == THINK_OFF) put_str(x, THINK "\n\n" THINK_END "\n\n");
    return flush(x, 0);
}

/* ---- qwen3_5: the prompt itself opens the block; runs of tool results share one turn */

static int qwen35_generate(struct render *x)
{
    put_header(x, x->n, "assistant");
    put_str(x, x->r->thinking == THINK_OFF ? THINK "\n\n" THINK_END "\n\n" : THINK "\n");
    return flush(x, 0);
}

static int qwen35_message(struct render *x, size_t i)
{
    static const char spaces[] = " \t\n\r\v\f";
    const struct tb_chat_message *m = &x->m[i];
    int rc = check_role(x, i, true);
    if (rc) return rc;
    struct tb_span content = strip(m->content, spaces);
    bool tool = is_role(m, "tool"), assistant = is_role(m, "assistant"), last = i + 1 == x->n;
    bool go_on = tool && i > 0 && is_role(&x->m[i - 1], "tool");
    bool thinks = m->thinking.p || find(content, THINK);
    bool empty_block = assistant && !thinks && (x->last_user == SIZE_MAX || i > x->last_user);
    if (go_on)
        put_str(x, "\n");
    else
        put_header(x, i, qwen_role(m));
    if (empty_block && last) { /* what the prompt would have written is a piece of its own */
        put_str(x, x->r->thinking == THINK_OFF ? THINK "\n\n" THINK_END "\n\n" : THINK "\n");
        if ((rc = flush(x, 0))) return rc;
        if (x->r->thinking != THINK_OFF) rc = encode_str(x, "\n" THINK_END "\n\n");
    } else {
        if (empty_block) put_str(x, THINK "\n\n" THINK_END "\n\n");
        rc = flush(x, 0);
    }
    if (rc) return rc;
    if (tool) put_str(x, "<tool_response>\n");
    if (m->thinking.p && last) {
        put_str(x, THINK "\n");
        put(x, m->thinking);
        put_str(x, "\n" THINK_END "\n\n");
    }
    put(x, content);
    if (tool) put_str(x, "\n</tool_response>");
    if ((rc = flush(x, TB_ENCODE_PLAIN))) return rc;
    bool open = tool && !last && is_role(&x->m[i + 1], "tool");
    return open ? 0 : encode_str(x, "<|im_end|>");
}

/* ---- the table. A folder's chat template is the first row's whose mark it holds. */

#define CHATML .message = qwen3_message, .generate = qwen3_generate, .stop_token = "<|im_end|>"
#define QWEN35 .message = qwen35_message, .generate = qwen35_generate, .stop_token = "<|im_end|>"

static const struct tb_renderer RENDERERS[] = {
    {.name = "llama3",
     .message = llama_message,
     .generate = llama_generate,
     .begins = true,
     .stop_token = "<|eot_id|>",
     .mark = "<|start_header_id|>"},
    {.name = "qwen3_5",
     QWEN35,
     .thinking = THINK_ON,
     .without_thinking = "qwen3_5_disable_thinking",
     .mark = "<function="},
    {.name = "qwen3_5_disable_thinking", QWEN35, .thinking = THINK_OFF},
    {.name = "qwen3",
     CHATML,
     .thinking = THINK_ON,
     .without_thinking = "qwen3_disable_thinking",
     .mark = "enable_thinking"},
    {.name = "qwen3_disable_thinking", CHATML, .thinking = THINK_OFF},
    {.name = "qwen3_instruct", CHATML, .mark = "<|im_start|>"},
    {.name = "role_colon",
     .message = colon_message,
     .generate = colon_generate,
     .begins = true,
     .stop_string = "\n\nUser:"},
};

const struct tb_renderer *tb_renderer_find(const char *name)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(RENDERERS); i++)
        if (strcmp(RENDERERS[i].name, name) == 0) return &RENDERERS[i];
    return NULL;
}

const char *tb_renderer_name(const struct tb_renderer *r)
{
    return r->name;
}

const char *tb_renderer_names(void)
{
    return "role_colon, llama3, qwen3, qwen3_disable_thinking, qwen3_instruct, qwen3_5, "
           "qwen3_5_disable_thinking";
}

const struct tb_renderer *tb_renderer_by_template(const char *text)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(RENDERERS); i++)
        if (RENDERERS[i].mark && strstr(text, RENDERERS[i].mark)) return &RENDERERS[i];
    return NULL;
}

bool tb_renderer_has_tokens(const struct tb_renderer *r, const struct tb_tokenizer *t)
{
    return !r->stop_token || tb_renderer_stop_token(r, t) >= 0;
}

const struct tb_renderer *tb_renderer_without_thinking(const struct tb_renderer *r)
{
    return r->without_thinking ? tb_renderer_find(r->without_thinking) : r;
}

int32_t tb_renderer_stop_token(const struct tb_renderer *r, const struct tb_tokenizer *t)
{
    return r->stop_token ? tb_tokenizer_added_id(t, tb_span_str(r->stop_token)) : -1;
}

const char *tb_renderer_stop_string(const struct tb_renderer *r)
{
    return r->stop_string;
}

int tb_chat_render(const struct tb_renderer *r, const struct tb_tokenizer *t,
                   const struct tb_chat_message *messages, size_t n, bool generate,
                   struct tb_ids *out, struct tb_error *err)
{
    struct render x = {
        .r = r, .t = t, .m = messages, .n = n, .last_user = SIZE_MAX, .out = out, .err = err};
    size_t start = out->n;
    int rc = 0;
    tb_buf_init(&x.text, MAX_TEXT);
    for (size_t i = 0; i < n; i++)
        if (is_role(&messages[i], "user")) x.last_user = i;
    if (r->begins) rc = tb_tokenizer_encode(t, TB_SPAN_LIT(""), TB_ENCODE_TEMPLATE, out, err);
    for (size_t i = 0; rc == 0 && i < n; i++)
        rc = r->message(&x, i);
    if (rc == 0 && generate) rc = r->generate(&x);
    tb_buf_fini(&x.text);
    if (rc) out->n = start;
    return rc;
}
