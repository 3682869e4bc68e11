/*
 * Between the guest's init ("agent") and the host: a window of physical memory divided into slots, and a hypercall.
 * emulator/agent.py is the other end and has the same numbers; a test compares them.
 *
 * A task of the guest owns one slot. It executes CPUID with eax = HYPERCALL_LEAF and ecx = its slot number, and so
 * gives the slot to the host. eax on return says what to do:
 *   OP_SLEEP  wait until the slot's futex word is not 0 (the host wakes the task), then make the hypercall again
 *   OP_CALLS  make the slot's `ncalls` system calls in order, put their results beside them, make the hypercall again
 * A call with number CALL_SPAWN makes a new task: clone3(a[0], a[1]) whose child enters the loop with slot a[2], after
 * mapping that slot from physical address a[3], unless that is 0.
 * A number plus CALL_AFTER is a call that is only made if call a[5] of the batch has not failed; else it fails with
 * ECANCELED.
 * CALL_COPY copies a[2] bytes from address a[1] to a[0].
 * CALL_ENTER has the task run as the signal frame at a[0] says, from its struct ucontext on (rt_sigreturn(2)), until
 * there is a signal of a processor's exception, whose number is the result. Its alternate stack is to be in the task's
 * slot, and those signals not blocked. With a[1], handlers are installed first; exec(2) removes them.
 */
#ifndef GUEST_PROTOCOL_H
#define GUEST_PROTOCOL_H

#define HYPERCALL_LEAF 0x46414b45u

#define WINDOW_VIRTUAL 0x10000000000ul /* where the agent maps the window */
#define SLOT_SIZE 0x10000ul
#define SLOT_RETURN 8ul			/* offset of the stack pointer that CALL_ENTER comes back to */
#define SLOT_CALLS 64ul			/* offset of the calls */
#define SLOT_MAX_CALLS 128ul
#define SLOT_STACK_TOP 0x4000ul		/* the task's stack lies below, above the calls */
#define SLOT_DATA 0x4000ul		/* buffers and paths, to the end of the slot */

#define WINDOW_FD 63l /* init's descriptor of /dev/mem */
/*
 * The descriptors below the next are init's: the console, and the above. A task that wants a table of its own without
 * what the others have open (closing a copy of it can end what they do) calls close_range() from here with UNSHARE:
 * Linux copies tables in words of 64.
 */
#define FIRST_FD 64
#define OTHER_ROOT "/host"	/* root directory of processes that stand for those of the host */

#define OP_SLEEP 0u
#define OP_CALLS 1u

#define CALL_SPAWN 0x10000l
#define CALL_COPY 0x10001l
#define CALL_ENTER 0x10002l
#define CALL_AFTER 0x20000l

#endif
