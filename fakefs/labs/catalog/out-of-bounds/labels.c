/* Labels of 32 bytes in slab objects of 32 bytes: what one of the functions writes too much is in the neighbour. */
#include <linux/ctype.h>
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/slab.h>

#define SIZE 32

static struct kmem_cache *cache;
static char *shelf[64];

static char *culprit = "";
module_param(culprit, charp, 0);

noinline char *label_new(void);
noinline void label_free(char *label);
noinline void label_append(char *label, int size);
noinline void label_pad(char *label, int size);
noinline void label_upper(char *label, int size);

noinline char *label_new(void)
{
	return kmem_cache_zalloc(cache, GFP_KERNEL);
}

noinline void label_free(char *label)
{
	kmem_cache_free(cache, label);
}

noinline void label_append(char *label, int size)
{
	int i;

	for (i = 0; i < size; i++)
		WRITE_ONCE(label[i], 'a' + i % 26);
}

noinline void label_pad(char *label, int size)
{
	int i;

	for (i = 20; i < size; i++)
		WRITE_ONCE(label[i], ' ');
}

noinline void label_upper(char *label, int size)
{
	int i;

	for (i = 0; i < size; i++)
		WRITE_ONCE(label[i], toupper(READ_ONCE(label[i])));
}

static struct {
	const char *name;
	void (*work)(char *label, int size);
} steps[] = {
	{ "label_append", label_append },
	{ "label_pad", label_pad },
	{ "label_upper", label_upper },
};

static int printer(void *unused)
{
	while (!kthread_should_stop()) {
		char *label = label_new();
		int i;

		if (!label)
			continue;
		/* The bug: an end that counts one too many. */
		for (i = 0; i < ARRAY_SIZE(steps); i++)
			steps[i].work(label, strcmp(steps[i].name, culprit) ? SIZE : SIZE + 1);
		msleep(20);
		label_free(label);
		msleep(20);
	}
	return 0;
}

static struct task_struct *task;

static void clear(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(shelf); i++)
		if (shelf[i])
			label_free(shelf[i]);
	kmem_cache_destroy(cache);
}

static int __init labels_init(void)
{
	int i;

	/* A cache with memory that may be copied to programs is shared with no other: only labels are broken here. */
	cache = kmem_cache_create_usercopy("labels", SIZE, 0, 0, 0, SIZE, NULL);
	if (!cache)
		return -ENOMEM;
	for (i = 0; i < ARRAY_SIZE(shelf); i++)
		shelf[i] = label_new();
	task = kthread_run(printer, NULL, "printer");
	if (IS_ERR(task))
		clear();
	return PTR_ERR_OR_ZERO(task);
}

static void __exit labels_exit(void)
{
	kthread_stop(task);
	clear();
}

module_init(labels_init);
module_exit(labels_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Labels for a lab");
