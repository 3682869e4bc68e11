/* A driver that handles requests: allocate, work, free. The C files that include this say its name. */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/workqueue.h>

#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)
#define handle NAMED(DRIVER, _handle)
#define complete_request NAMED(DRIVER, _complete)
#define TEXT(a) #a
#define NAME(a) TEXT(a)

static char *leaky = "";
module_param(leaky, charp, 0);

static void run(struct work_struct *work);
static DECLARE_DELAYED_WORK(queue, run);
static unsigned int served;

void handle(int size);
void complete_request(void *request);

noinline void complete_request(void *request)
{
	/* The bug: each fourth request is forgotten. */
	if (!strcmp(leaky, NAME(DRIVER)) && ++served % 4 == 0)
		return;
	kfree(request);
}

noinline void handle(int size)
{
	void *request = kmalloc(size, GFP_KERNEL);

	if (!request)
		return;
	memset(request, served, size);
	complete_request(request);
}

static void run(struct work_struct *work)
{
	int i;

	for (i = 0; i < 8; i++)
		handle(256 + 32 * i);
	schedule_delayed_work(&queue, HZ / 20);
}

static int __init driver_init(void)
{
	schedule_delayed_work(&queue, HZ / 20);
	return 0;
}

static void __exit driver_exit(void)
{
	cancel_delayed_work_sync(&queue);
}

module_init(driver_init);
module_exit(driver_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A driver for a lab");
