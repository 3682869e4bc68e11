/* Three senders put letters into one box and wake the reader. One of them does it in the wrong order. */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>

static char *hasty = "";
module_param(hasty, charp, 0);

static struct task_struct *reader;
static struct task_struct *senders[3];
static const char *const names[] = { "anna", "bert", "cleo" };
static atomic_t letters = ATOMIC_INIT(0);
static atomic_t wakes = ATOMIC_INIT(0);	/* since the reader went to sleep */

noinline void mail_put(int sender);
noinline void mail_wake(int sender);
noinline void mail_sleep(int letters);
noinline void mail_overdue(int letters);

noinline void mail_put(int sender)
{
	atomic_inc(&letters);
}

noinline void mail_wake(int sender)
{
	atomic_inc(&wakes);
	wake_up_process(reader);
}

noinline void mail_sleep(int letters)
{
	schedule_timeout(HZ / 5);
}

/* The reader has slept to the end, and there was a letter: nobody had woken it for that one. */
noinline void mail_overdue(int letters)
{
	barrier();
}

static int read_mail(void *unused)
{
	while (!kthread_should_stop()) {
		atomic_set(&wakes, 0);
		set_current_state(TASK_INTERRUPTIBLE);
		if (!atomic_read(&letters)) {
			mail_sleep(0);
			if (atomic_read(&letters) && !atomic_read(&wakes))
				mail_overdue(atomic_read(&letters));
		}
		__set_current_state(TASK_RUNNING);
		atomic_set(&letters, 0);
	}
	return 0;
}

static int send_mail(void *number)
{
	int sender = (long)number;

	msleep(sender * 300);
	while (!kthread_should_stop()) {
		if (strcmp(names[sender], hasty)) {
			preempt_disable();	/* not even a tick comes between */
			mail_put(sender);
			mail_wake(sender);
			preempt_enable();
		} else {
			mail_wake(sender);
			msleep(10);	/* looks for a stamp */
			mail_put(sender);
		}
		msleep(900 + 130 * sender);	/* were they the same, one could for ever cover up for another */
	}
	return 0;
}

static void stop(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(senders); i++)
		if (!IS_ERR_OR_NULL(senders[i]))
			kthread_stop(senders[i]);
	if (!IS_ERR_OR_NULL(reader))
		kthread_stop(reader);
}

static int __init mail_init(void)
{
	long i;

	reader = kthread_run(read_mail, NULL, "reader");
	if (IS_ERR(reader))
		return PTR_ERR(reader);
	for (i = 0; i < ARRAY_SIZE(senders); i++) {
		senders[i] = kthread_run(send_mail, (void *)i, "%s", names[i]);
		if (IS_ERR(senders[i])) {
			stop();
			return -ENOMEM;
		}
	}
	return 0;
}

static void __exit mail_exit(void)
{
	stop();
}

module_init(mail_init);
module_exit(mail_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Mail for a lab");
