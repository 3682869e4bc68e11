/* A lock that checks keys. What it computes on the way is neither an argument nor a result. */
#include <linux/module.h>
#include <linux/workqueue.h>

static unsigned int hidden;
module_param(hidden, uint, 0);

noinline unsigned int lock_check(unsigned int key);
noinline unsigned int lock_check(unsigned int key)
{
	unsigned int product = (key ^ hidden) * 0x9e3779b1u;

	return (product >> 31) | 2;
}

static void attempt(struct work_struct *work);
static DECLARE_DELAYED_WORK(attempts, attempt);

static void attempt(struct work_struct *work)
{
	WRITE_ONCE(hidden, READ_ONCE(hidden) + (lock_check(7) == 0));
	schedule_delayed_work(&attempts, HZ / 10);
}

static int __init lock_init(void)
{
	schedule_delayed_work(&attempts, HZ / 10);
	return 0;
}

static void __exit lock_exit(void)
{
	cancel_delayed_work_sync(&attempts);
}

module_init(lock_init);
module_exit(lock_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A lock for a lab");
