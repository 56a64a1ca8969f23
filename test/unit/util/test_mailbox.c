/* Mailbox: order, coalesced wake-ups, and many posters against one reader (for TSan). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "util/mailbox.h"
#include "util/mem.h"

enum { POSTERS = 4, PER_POSTER = 5000 };

struct item {
    struct tb_list node;
    int poster, seq;
};

static void test_order(void **state)
{
    struct tb_mailbox m;
    struct item items[3];
    struct tb_list out;
    tb_list_init(&out);
    assert_int_equal(tb_mailbox_init(&m), 0);
    assert_false(tb_mailbox_drain(&m, &out));
    assert_true(tb_mailbox_post(&m, &items[0].node));
    assert_false(tb_mailbox_post(&m, &items[1].node));
    assert_true(tb_mailbox_drain(&m, &out));
    assert_true(tb_mailbox_post(&m, &items[2].node));
    assert_true(tb_mailbox_drain(&m, &out)); /* appended */
    for (int i = 0; i < 3; i++)
        assert_ptr_equal(tb_list_pop(&out), &items[i].node);
    assert_null(tb_list_pop(&out));
    tb_mailbox_fini(&m);
}

struct shared {
    struct tb_mailbox box;
    uv_async_t wake;
    uv_thread_t threads[POSTERS];
    int got, next[POSTERS], wakes;
};
struct poster {
    struct shared *sh;
    int id;
};

static void post_all(void *arg)
{
    struct poster *p = arg;
    for (int i = 0; i < PER_POSTER; i++) {
        struct item *it = tb_calloc(1, sizeof(*it));
        it->poster = p->id;
        it->seq = i;
        if (tb_mailbox_post(&p->sh->box, &it->node)) uv_async_send(&p->sh->wake);
    }
}

static void on_wake(uv_async_t *h)
{
    struct shared *sh = h->data;
    struct tb_list out;
    tb_list_init(&out);
    sh->wakes++;
    tb_mailbox_drain(&sh->box, &out);
    for (struct tb_list *n; (n = tb_list_pop(&out));) {
        struct item *it = TB_LIST_ENTRY(n, struct item, node);
        assert_int_equal(it->seq, sh->next[it->poster]);
        sh->next[it->poster]++;
        sh->got++;
        tb_free(it);
    }
    if (sh->got == POSTERS * PER_POSTER) uv_close((uv_handle_t *)h, NULL);
}

static void test_threads(void **state)
{
    uv_loop_t loop;
    static struct shared sh;
    struct poster posters[POSTERS];
    uv_loop_init(&loop);
    assert_int_equal(tb_mailbox_init(&sh.box), 0);
    uv_async_init(&loop, &sh.wake, on_wake);
    sh.wake.data = &sh;
    for (int i = 0; i < POSTERS; i++) {
        posters[i] = (struct poster){&sh, i};
        assert_int_equal(uv_thread_create(&sh.threads[i], post_all, &posters[i]), 0);
    }
    uv_run(&loop, UV_RUN_DEFAULT); /* hangs (time-out) if a wake-up is lost */
    for (int i = 0; i < POSTERS; i++)
        uv_thread_join(&sh.threads[i]);
    assert_int_equal(sh.got, POSTERS * PER_POSTER);
    assert_true(sh.wakes <= sh.got);
    assert_int_equal(uv_loop_close(&loop), 0);
    tb_mailbox_fini(&sh.box);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
