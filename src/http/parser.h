/*
 * From bytes to a request: llhttp behind limits of our own. One parser per connection; it fills one
 * exchange at a time and stops after each request, so that pipelined ones wait.
 *
 * Owner: the connection. Memory of the request goes into the exchange (its arena and body_mem),
 * never into the parser, and nothing points into the bytes given to feed. Thread: the loop's.
 */
#ifndef TB_HTTP_PARSER_H
#define TB_HTTP_PARSER_H

#include <stdbool.h>
#include <stddef.h>

struct tb_http_exchange;
struct tb_http_parser;

enum tb_http_parse {
    TB_HTTP_PARSE_MORE,     /* everything consumed, the request is not complete */
    TB_HTTP_PARSE_CONTINUE, /* the client waits for "100 Continue"; feed the rest then */
    TB_HTTP_PARSE_DONE,     /* a request is complete; what follows belongs to the next one */
    TB_HTTP_PARSE_ERROR, /* refused, see tb_http_parser_error; the connection's framing is lost */
};

struct tb_http_parser *tb_http_parser_create(size_t max_body);
void tb_http_parser_destroy(struct tb_http_parser *p);
/* Begins a request that goes into x. */
void tb_http_parser_begin(struct tb_http_parser *p, struct tb_http_exchange *x);
/* *used tells how much of data was consumed (after an error it means nothing). */
enum tb_http_parse tb_http_parser_feed(struct tb_http_parser *p, const char *data, size_t n,
                                       size_t *used);
bool tb_http_parser_in_body(const struct tb_http_parser *p);
/* Status and text of the answer to a refused request. */
int tb_http_parser_error(const struct tb_http_parser *p, const char **text);

#endif
