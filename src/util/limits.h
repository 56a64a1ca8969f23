/*
 * Every limit on what a client decides, in one place. Those that an operator may want to change are
 * options; these are their defaults or hard bounds.
 */
#ifndef TB_UTIL_LIMITS_H
#define TB_UTIL_LIMITS_H

/* HTTP */
#define TB_MAX_URL                (8 * 1024)
#define TB_MAX_HEADER_BYTES       (64 * 1024)
#define TB_MAX_HEADERS            100
#define TB_MAX_BODY_DEFAULT       (256ull << 20)
#define TB_MAX_PIPELINED_BYTES    (64 * 1024) /* read ahead of a request that is being answered */
#define TB_HTTP_HEADER_TIMEOUT_MS 20000       /* first byte of a request to its last header */
#define TB_HTTP_BODY_TIMEOUT_MS   60000       /* without any progress of the body */
#define TB_HTTP_WRITE_TIMEOUT_MS  60000       /* without any progress of the response */
#define TB_HTTP_IDLE_TIMEOUT_MS   300000      /* keep-alive between requests */

/* JSON and protobuf */
#define TB_MAX_JSON_DEPTH         64
#define TB_MAX_JSON_VALUES        (16 << 20) /* numbers, strings, ... of one document */
#define TB_MAX_JSON_CONTAINERS    (1 << 20)  /* objects and arrays of one document */
#define TB_MAX_DATA               65536      /* datums in one request */
#define TB_MAX_DATUM_TOKENS       (1 << 20)  /* tokens of one datum, before the model's own limit */
#define TB_MAX_TARGETS_K          4096       /* targets per position */
#define TB_MAX_LOSS_INPUTS        64
#define TB_MAX_LOSS_TEXT          (4 << 20) /* a custom loss as JSON */
#define TB_MAX_SESSION_LOSSES     256
#define TB_MAX_INFLATE_RATIO_BODY (1ull << 30) /* bytes of a decompressed body, hard bound */

/* Names and ids */
#define TB_MAX_NAME     128  /* checkpoint names */
#define TB_MAX_ID       256  /* session, model, sampler and request ids */
#define TB_MAX_TENANT   64   /* tenants' names */
#define TB_MAX_TOKEN    4096 /* keys in a request, and what the SDK exchanges them for */
#define TB_MAX_METADATA (64 * 1024)

/* Sampling */
#define TB_MAX_SAMPLES       1024
#define TB_MAX_TOPK_LOGPROBS 1024
#define TB_MAX_STOPS         64
#define TB_MAX_LOGIT_BIAS    1024
#define TB_MAX_STOP_BYTES    4096

/* Futures */
#define TB_LONG_POLL_MS         25000        /* hold of retrieve_future before try_again */
#define TB_RESULT_TTL_MS        (15 * 60000) /* a delivered result stays readable */
#define TB_RESULT_UNREAD_TTL_MS (2 * 3600000)
#define TB_SESSION_LEASE_MS     (10 * 60000)
#define TB_MAX_QUEUED_BYTES     (2ull << 30) /* bodies waiting in all queues; beyond it 429 */

#endif
