/*
 * Chat renderers: how the messages of a conversation become a model's tokens. A renderer is a row
 * in a table, with the name that the Tinker cookbook gives it, and equal to the cookbook's token
 * for token. A model's renderer is named by an option or chosen from its folder; a chat template
 * (Jinja) is looked at for that choice and never executed.
 *
 * What people write is encoded without added tokens, so text cannot end a turn.
 *
 * Thread: any; renderers are constant. Owner: the caller owns what goes in and what comes out.
 */
#ifndef TB_CHAT_CHAT_H
#define TB_CHAT_CHAT_H

#include "tokenizer/tokenizer.h"
#include "util/error.h"
#include "util/span.h"

struct tb_chat_message {
    struct tb_span role; /* system, user, assistant, tool; others as the renderer takes them */
    struct tb_span content;
    struct tb_span thinking; /* of an assistant's message; p NULL: none */
};

struct tb_renderer;
const struct tb_renderer *tb_renderer_find(const char *name); /* NULL: no such name */
const char *tb_renderer_name(const struct tb_renderer *r);
/* The names of all, for messages: "role_colon, llama3, ..." */
const char *tb_renderer_names(void);
/* By the chat template in dir (chat_template.jinja, else tokenizer_config.json); role_colon when
 * there is none, or t lacks its tokens. Reads files. */
const struct tb_renderer *tb_renderer_choose(const char *dir, const struct tb_tokenizer *t);
/* The one whose mark the template's text holds, or NULL. */
const struct tb_renderer *tb_renderer_by_template(const char *text);
/* Does t have the token that ends r's turns? True for those that have none. */
bool tb_renderer_has_tokens(const struct tb_renderer *r, const struct tb_tokenizer *t);
/* The one that asks for no reasoning, where r has such a twin; else r. */
const struct tb_renderer *tb_renderer_without_thinking(const struct tb_renderer *r);

/* Appends the tokens of messages and, with `generate`, the beginning of the assistant's next turn.
 * TB_EINVAL names the message: a role that the renderer does not know. On failure out is as it was.
 * Costs as tb_tokenizer_encode. */
int tb_chat_render(const struct tb_renderer *r, const struct tb_tokenizer *t,
                   const struct tb_chat_message *messages, size_t n, bool generate,
                   struct tb_ids *out, struct tb_error *err);

/* What ends the assistant's turn: a token (-1: none) or a string (NULL: none). */
int32_t tb_renderer_stop_token(const struct tb_renderer *r, const struct tb_tokenizer *t);
const char *tb_renderer_stop_string(const struct tb_renderer *r);

#endif
