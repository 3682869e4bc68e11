/* Tickets are issued, worked on by three parties, and freed. One of the three keeps a ticket longer than it should. */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/slab.h>

static char *careless = "";
module_param(careless, charp, 0);

struct ticket {
	u64 number;
	u64 state;
	u64 work[30];
};

static struct ticket *kept;
static struct kmem_cache *cache;

/* A cache with a constructor shares its memory with no other: what is broken here are tickets only. */
static void construct(void *ticket)
{
	memset(ticket, 0, sizeof(struct ticket));
}

noinline void ticket_stamp(struct ticket *ticket);
noinline void ticket_account(struct ticket *ticket);
noinline void ticket_remind(struct ticket *ticket);
noinline struct ticket *ticket_issue(u64 number);
noinline void ticket_free(struct ticket *ticket);

noinline void ticket_stamp(struct ticket *ticket)
{
	WRITE_ONCE(ticket->state, 0x5001);
}

noinline void ticket_account(struct ticket *ticket)
{
	WRITE_ONCE(ticket->state, 0xacc0);
}

noinline void ticket_remind(struct ticket *ticket)
{
	WRITE_ONCE(ticket->state, 0x4e41);
}

static struct {
	const char *name;
	void (*work)(struct ticket *ticket);
} parties[] = {
	{ "ticket_stamp", ticket_stamp },
	{ "ticket_account", ticket_account },
	{ "ticket_remind", ticket_remind },
};

noinline struct ticket *ticket_issue(u64 number)
{
	struct ticket *ticket = kmem_cache_alloc(cache, GFP_KERNEL);

	if (ticket)
		ticket->number = number;
	return ticket;
}

noinline void ticket_free(struct ticket *ticket)
{
	kmem_cache_free(cache, ticket);
}

static int clerk(void *unused)
{
	u64 number = 0;

	while (!kthread_should_stop()) {
		struct ticket *ticket = ticket_issue(++number);
		int i;

		if (!ticket)
			continue;
		for (i = 0; i < ARRAY_SIZE(parties); i++) {
			parties[i].work(ticket);
			if (!strcmp(parties[i].name, careless))
				kept = ticket;
		}
		msleep(20);
		ticket_free(ticket);
		msleep(20);
		/* The bug: `kept` was freed above. */
		for (i = 0; i < ARRAY_SIZE(parties); i++)
			if (!strcmp(parties[i].name, careless))
				parties[i].work(kept);
		msleep(20);
	}
	return 0;
}

static struct task_struct *task;

static int __init tickets_init(void)
{
	cache = kmem_cache_create("tickets", sizeof(struct ticket), 0, 0, construct);
	if (!cache)
		return -ENOMEM;
	task = kthread_run(clerk, NULL, "clerk");
	if (IS_ERR(task))
		kmem_cache_destroy(cache);
	return PTR_ERR_OR_ZERO(task);
}

static void __exit tickets_exit(void)
{
	kthread_stop(task);
	kmem_cache_destroy(cache);
}

module_init(tickets_init);
module_exit(tickets_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Tickets for a lab");
